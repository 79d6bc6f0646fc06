#include "kernels/selection.h"

#include <algorithm>
#include <utility>

namespace confprune {
namespace {

constexpr int kTableBits = 16;
constexpr int64_t kChunk = 4096;  // elements gathered at a time from a strided tensor

template <Element>
struct Key;

template <>
struct Key<Element::float32> {
  using Bits = uint32_t;
  static Bits of(float value) { return bit_cast<uint32_t>(value) & 0x7fffffffu; }
  static Bits of(BFloat16 value) { return of(widen(value)); }
  static Bits of(Half value) { return of(widen(value)); }
};

template <>
struct Key<Element::float64> {
  using Bits = uint64_t;
  static Bits of(double value) { return bit_cast<uint64_t>(value) & 0x7fffffffffffffffull; }
  template <class T>
  static Bits of(T value) {
    return of(double(widen(value)));
  }
};

template <>
struct Key<Element::float16> {
  using Bits = uint16_t;
  static Bits of(Half value) { return value.bits & 0x7fffu; }
};

template <>
struct Key<Element::bfloat16> {
  using Bits = uint16_t;
  static Bits of(BFloat16 value) { return value.bits & 0x7fffu; }
};

// Elements [begin, begin + count) in logical order: in place when contiguous, else gathered.
template <class T>
const T* read(const Source& source, int64_t begin, int64_t count, T* buffer) {
  const T* data = static_cast<const T*>(source.data);
  if (source.contiguous) return data + begin;
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
      if (++index[d] < source.sizes[d]) break;
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

// Calls body(element tag, key tag) with the types that `source` and `key` name. Only widenings exist.
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

// Finds the row of a key's prefix: a table over the prefix's own high bits gives the few candidates.
class PrefixIndex {
 public:
  PrefixIndex(const std::vector<uint64_t>& prefixes, int prefix_bits)
      : prefixes_(prefixes), shift_(std::max(0, prefix_bits - kTableBits)) {
    table_.assign((size_t(1) << (prefix_bits - shift_)) + 1, 0);
    for (uint64_t prefix : prefixes) ++table_[(prefix >> shift_) + 1];
    for (size_t bin = 1; bin < table_.size(); ++bin) table_[bin] += table_[bin - 1];
  }

  int64_t row(uint64_t prefix) const {
    const size_t bin = prefix >> shift_;
    for (int32_t at = table_[bin]; at < table_[bin + 1]; ++at)
      if (prefixes_[at] == prefix) return at;
    return -1;
  }

 private:
  const std::vector<uint64_t>& prefixes_;
  int shift_;
  std::vector<int32_t> table_;
};

template <class Count>
uint64_t histogram_any(const Source& source, int64_t begin, int64_t end, const Digit& digit,
                       Count* counts) {
  uint64_t largest = 0;
  const int shift = digit.shift;
  dispatch(source.element, digit.key, [&](auto element, auto key_tag) {
    using K = Key<key_tag()>;
    using Bits = typename K::Bits;
    Bits top = 0;
    if (digit.prefixes.empty()) {
      for_chunks<decltype(element)>(source, begin, end, [&](int64_t, const auto* x, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
          const Bits key = K::of(x[i]);
          top = std::max(top, key);
          ++counts[key >> shift];
        }
      });
    } else {
      const int above = shift + digit.digit_bits;
      const uint64_t mask = (uint64_t(1) << digit.digit_bits) - 1;
      const PrefixIndex index(digit.prefixes, key_bits(digit.key) - above);
      for_chunks<decltype(element)>(source, begin, end, [&](int64_t, const auto* x, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
          const Bits key = K::of(x[i]);
          top = std::max(top, key);
          const int64_t row = index.row(uint64_t(key) >> above);
          if (row >= 0) ++counts[(row << digit.digit_bits) + ((uint64_t(key) >> shift) & mask)];
        }
      });
    }
    largest = top;
  });
  return largest;
}

}  // namespace

int key_bits(Element element) {
  switch (element) {
    case Element::float32:
      return 31;
    case Element::float64:
      return 63;
    default:
      return 15;
  }
}

uint64_t histogram(const Source& source, int64_t begin, int64_t end, const Digit& digit,
                   uint32_t* counts) {
  return histogram_any(source, begin, end, digit, counts);
}

uint64_t histogram(const Source& source, int64_t begin, int64_t end, const Digit& digit,
                   int64_t* counts) {
  return histogram_any(source, begin, end, digit, counts);
}

CutTable::CutTable(Cuts cuts)
    : cuts_(std::move(cuts)),
      shift_(std::max(0, key_bits(cuts_.key) - kTableBits)),
      any_straddled_(std::any_of(cuts_.straddled.begin(), cuts_.straddled.end(),
                                 [](uint8_t flag) { return flag != 0; })) {
  const size_t bins = size_t(1) << (key_bits(cuts_.key) - shift_);
  table_.resize(bins);
  size_t cut = 0;
  for (size_t bin = 0; bin < bins; ++bin) {
    const bool holds_cut = cut < cuts_.values.size() && (cuts_.values[cut] >> shift_) == bin;
    table_[bin] = holds_cut ? -1 - int32_t(cut) : cuts_.first_level[cut];
    while (cut < cuts_.values.size() && (cuts_.values[cut] >> shift_) == bin) ++cut;
  }
}

int32_t CutTable::search(uint64_t key, int32_t entry, int64_t* ranks) const {
  size_t cut = size_t(-1 - entry);
  while (cut < cuts_.values.size() && cuts_.values[cut] < key) ++cut;
  if (cut == cuts_.values.size() || cuts_.values[cut] != key || !cuts_.straddled[cut])
    return cuts_.first_level[cut];
  const int64_t rank = ranks[cut]++;
  int32_t level = cuts_.first_level[cut];
  while (level < cuts_.first_level[cut + 1] && cuts_.ties[level] <= rank) ++level;
  return level;
}

void CutTable::count_equal(const Source& source, int64_t begin, int64_t end, int64_t* equal) const {
  dispatch(source.element, cuts_.key, [&](auto element, auto key_tag) {
    using K = Key<key_tag()>;
    for_chunks<decltype(element)>(source, begin, end, [&](int64_t, const auto* x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t key = K::of(x[i]);
        const int32_t entry = table_[key >> shift_];
        if (entry >= 0) continue;
        size_t cut = size_t(-1 - entry);
        while (cut < cuts_.values.size() && cuts_.values[cut] < key) ++cut;
        if (cut < cuts_.values.size() && cuts_.values[cut] == key && cuts_.straddled[cut])
          ++equal[cut];
      }
    });
  });
}

template <class Level>
void CutTable::assign_any(const Source& source, int64_t begin, int64_t end, int64_t* ranks,
                          Level* levels) const {
  dispatch(source.element, cuts_.key, [&](auto element, auto key_tag) {
    using K = Key<key_tag()>;
    for_chunks<decltype(element)>(source, begin, end, [&](int64_t at, const auto* x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t key = K::of(x[i]);
        const int32_t entry = table_[key >> shift_];
        levels[at + i] = Level(entry >= 0 ? entry : search(key, entry, ranks));
      }
    });
  });
}

void CutTable::assign(const Source& source, int64_t begin, int64_t end, int64_t* ranks,
                      uint8_t* levels) const {
  assign_any(source, begin, end, ranks, levels);
}

void CutTable::assign(const Source& source, int64_t begin, int64_t end, int64_t* ranks,
                      int16_t* levels) const {
  assign_any(source, begin, end, ranks, levels);
}

}  // namespace confprune
