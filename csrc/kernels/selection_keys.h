// The elements of a tensor as integer keys, in chunks: what all functions of selection.h begin
// with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/selection.h"

namespace confprune {
namespace {  // internal linkage, as elements.h

constexpr int kTableBits = 17;    // of prefixes: what weights use of the table stays in L1
constexpr int64_t kChunk = 4096;  // elements at a time; as many are gathered from a strided tensor
constexpr int64_t kAhead = 512;   // elements that a loop of look-ups, slow to ask, asks ahead for

// What tables leave out of a key: its bits below kTableBits.
constexpr int table_shift(int bits) {
  return bits > kTableBits ? bits - kTableBits : 0;
}

template <Element>
struct Key;

template <>
struct Key<Element::float32> {
  using Bits = uint32_t;
  static constexpr int kBits = 31;
  static Bits of(float value) { return bit_cast<uint32_t>(value) & 0x7fffffffu; }
  static Bits of(BFloat16 value) { return of(widen(value)); }
  static Bits of(Half value) { return of(widen(value)); }
};

template <>
struct Key<Element::float64> {
  using Bits = uint64_t;
  static constexpr int kBits = 63;
  static Bits of(double value) { return bit_cast<uint64_t>(value) & 0x7fffffffffffffffull; }
  template <class T>
  static Bits of(T value) {
    return of(double(widen(value)));
  }
};

template <>
struct Key<Element::float16> {
  using Bits = uint16_t;
  static constexpr int kBits = 15;
  static Bits of(Half value) { return value.bits & 0x7fffu; }
};

template <>
struct Key<Element::bfloat16> {
  using Bits = uint16_t;
  static constexpr int kBits = 15;
  static Bits of(BFloat16 value) { return value.bits & 0x7fffu; }
};

// Elements [begin, begin + count) in logical order: in place when contiguous, else gathered.
template <class T>
const T* read(const Source& source, int64_t begin, int64_t count, T* buffer) {
  const T* data = static_cast<const T*>(source.data);
  if (source.contiguous)
    return data + begin;
  int64_t index[Source::kMaxDims];
  int64_t offset = 0;
  for (int d = source.dims - 1; d >= 0; --d) {
    index[d] = begin % source.sizes[d];
    begin /= source.sizes[d];
    offset += index[d] * source.strides[d];
  }
  for (int64_t i = 0; i < count; ++i) {
    buffer[i] = data[offset];
    for (int d = source.dims - 1; d >= 0; --d) {
      offset += source.strides[d];
      if (++index[d] < source.sizes[d])
        break;
      offset -= source.sizes[d] * source.strides[d];
      index[d] = 0;
    }
  }
  return buffer;
}

// Calls body(first position, elements, count) over [begin, end) in chunks.
template <class T, class Body>
void for_chunks(const Source& source, int64_t begin, int64_t end, Body body) {
  T buffer[kChunk];
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t count = std::min(kChunk, end - at);
    body(at, read(source, at, count, buffer), count);
  }
}

// Calls body(element tag, key tag) with the types that `source` and `key` name. Only widenings
// exist.
template <class Body>
void dispatch(Element element, Element key, Body body) {
  using std::integral_constant;
  const auto f32 = integral_constant<Element, Element::float32>{};
  const auto f64 = integral_constant<Element, Element::float64>{};
  switch (element) {
    case Element::float32:
      return key == Element::float64 ? body(float{}, f64) : body(float{}, f32);
    case Element::float64:
      return body(double{}, f64);
    case Element::float16:
      if (key == Element::float16)
        return body(Half{}, integral_constant<Element, Element::float16>{});
      return key == Element::float64 ? body(Half{}, f64) : body(Half{}, f32);
    case Element::bfloat16:
      if (key == Element::bfloat16)
        return body(BFloat16{}, integral_constant<Element, Element::bfloat16>{});
      return key == Element::float64 ? body(BFloat16{}, f64) : body(BFloat16{}, f32);
  }
}

}  // namespace
}  // namespace confprune
