// Keys on the device: the bits of scores, exact widening to a common type, and cells of keys.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device.h"
#include "kernels/elements.h"

namespace confprune::cuda {

using Count = unsigned long long;  // what atomicAdd takes

// A key of `Element` is its bits without the sign, `kBits` of them.
template <class Integer, int kMantissaBits>
struct IeeeFormat {
  using Bits = Integer;
  static constexpr int kBits = 8 * int(sizeof(Integer)) - 1;
  static constexpr int kMantissa = kMantissaBits;
  static constexpr int kExponent = kBits - kMantissa;
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr Bits kMagnitude = Bits(Bits(~Bits(0)) >> 1);
  static constexpr Bits kInfinity = Bits(Bits((1 << kExponent) - 1) << kMantissa);
};
template <Element>
struct Format;
template <>
struct Format<Element::float32> : IeeeFormat<uint32_t, 23> {};
template <>
struct Format<Element::float64> : IeeeFormat<uint64_t, 52> {};
template <>
struct Format<Element::float16> : IeeeFormat<uint16_t, 10> {};
template <>
struct Format<Element::bfloat16> : IeeeFormat<uint16_t, 7> {};

inline int key_bits(Element element) {
  switch (element) {
    case Element::float32:
      return Format<Element::float32>::kBits;
    case Element::float64:
      return Format<Element::float64>::kBits;
    default:
      return Format<Element::float16>::kBits;
  }
}

inline int element_bytes(Element element) {
  return (key_bits(element) + 1) / 8;
}

// Keys are computed with in whole registers.
template <Element kKey>
using Key = std::conditional_t<kKey == Element::float64, uint64_t, uint32_t>;

// Whether keys of `kKey` hold the magnitudes of `kFrom`.
template <Element kFrom, Element kKey>
constexpr bool kWidens = kFrom == kKey || kKey == Element::float64 ||
                         (kKey == Element::float32 && kFrom != Element::float64);

template <Element kFrom, Element kKey>
__device__ Key<kKey> key_of(typename Format<kFrom>::Bits bits) {
  using From = Format<kFrom>;
  using To = Format<kKey>;
  const Key<kKey> magnitude = Key<kKey>(bits) & From::kMagnitude;
  if constexpr (kFrom == kKey) {
    return magnitude;
  } else {
    constexpr int kUp = To::kMantissa - From::kMantissa;
    constexpr int kBias = To::kBias - From::kBias;
    if constexpr (kBias == 0)
      return magnitude << kUp;
    if (magnitude >= From::kInfinity)
      return To::kInfinity | magnitude << kUp;
    if (magnitude >> From::kMantissa != 0)
      return (magnitude << kUp) + (Key<kKey>(kBias) << To::kMantissa);
    if (magnitude == 0)
      return 0;
    // A subnormal: its highest bit becomes the hidden one.
    const int up = __clzll((long long)(magnitude)) - (63 - From::kMantissa);
    return (magnitude << (kUp + up)) + (Key<kKey>(kBias - up) << To::kMantissa);
  }
}

template <Element kElement>
using ElementTag = std::integral_constant<Element, kElement>;

// Calls body(tag) for the type of some elements, of those that `kKey` can hold.
template <Element kKey, class Body>
__device__ void dispatch_element(Element element, Body body) {
  switch (element) {
    case Element::float32:
      if constexpr (kWidens<Element::float32, kKey>)
        body(ElementTag<Element::float32>{});
      break;
    case Element::float64:
      if constexpr (kWidens<Element::float64, kKey>)
        body(ElementTag<Element::float64>{});
      break;
    case Element::float16:
      if constexpr (kWidens<Element::float16, kKey>)
        body(ElementTag<Element::float16>{});
      break;
    case Element::bfloat16:
      if constexpr (kWidens<Element::bfloat16, kKey>)
        body(ElementTag<Element::bfloat16>{});
      break;
  }
}

// Calls body(tag) on the host for the type of the keys.
template <class Body>
void dispatch_key(Element key, Body body) {
  switch (key) {
    case Element::float32:
      return body(ElementTag<Element::float32>{});
    case Element::float64:
      return body(ElementTag<Element::float64>{});
    case Element::float16:
      return body(ElementTag<Element::float16>{});
    case Element::bfloat16:
      return body(ElementTag<Element::bfloat16>{});
  }
}

// The i-th of the elements in 16 bytes.
template <class Bits>
__device__ Bits unpack(const uint4& vector, int i) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  if constexpr (sizeof(Bits) == 2)
    return Bits(words[i / 2] >> (16 * (i % 2)));
  else if constexpr (sizeof(Bits) == 4)
    return words[i];
  else
    return words[2 * i] | uint64_t(words[2 * i + 1]) << 32;
}

// Cells of keys, in order: one of 0 alone, one of the other keys under `low`, then those of 2^shift
// keys each, and the last one with all that is above.
struct Window {
  uint64_t low;  // at least 1
  int shift;
  unsigned cells;

  template <class K>
  __device__ unsigned cell(K key) const {
    const K at = (key - K(low)) >> shift;
    const unsigned inside = at < K(cells - 3) ? unsigned(at) : cells - 3;
    return key < K(low) ? unsigned(key != 0) : inside + 2;
  }

  // Its smallest key; of cell `cells`, a key above all.
  __device__ uint64_t start(unsigned cell, int bits) const {
    if (cell < 2)
      return cell;
    return cell < cells ? low + (uint64_t(cell - 2) << shift) : uint64_t(1) << bits;
  }
};

// The window from `low` to `high`, both within it, of the narrowest cells.
inline __device__ Window window_of(uint64_t low, uint64_t high, unsigned cells) {
  Window window{low == 0 ? 1 : low, 0, cells};
  if (high > window.low)
    while ((high - window.low) >> window.shift > cells - 4)
      ++window.shift;
  return window;
}

// A cell for each key of 15 bits.
struct EveryKey {
  static constexpr unsigned cells = 1u << 15;

  template <class K>
  __device__ unsigned cell(K key) const {
    return unsigned(key);
  }
  __device__ uint64_t start(unsigned cell, int) const { return cell; }
};

}  // namespace confprune::cuda
