#include "kernels/selection.h"

#include <algorithm>
#include <utility>

namespace confprune {
namespace {

constexpr int kTableBits = 18;    // what stays in the caches, and leaves few keys beside a cut
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

// Finds the row of a key's prefix: a table over the prefix's own high bits gives the few
// candidates.
class PrefixIndex {
 public:
  PrefixIndex(const std::vector<uint64_t>& prefixes, int prefix_bits)
      : prefixes_(prefixes), shift_(std::max(0, prefix_bits - kTableBits)) {
    const size_t bins = size_t(1) << (prefix_bits - shift_);
    table_.assign(bins + 1, 0);
    for (uint64_t prefix : prefixes)
      ++table_[(prefix >> shift_) + 1];
    for (size_t bin = 1; bin <= bins; ++bin)
      table_[bin] += table_[bin - 1];
    holds_.resize(bins);
    for (size_t bin = 0; bin < bins; ++bin)
      holds_[bin] = table_[bin] < table_[bin + 1];
  }

  // Whether some prefix shares this one's high bits.
  bool may_hold(uint64_t prefix) const { return holds_[prefix >> shift_]; }

  int64_t row(uint64_t prefix) const {
    const size_t bin = prefix >> shift_;
    if (!holds_[bin])
      return -1;
    for (int32_t at = table_[bin]; at < table_[bin + 1]; ++at)
      if (prefixes_[at] == prefix)
        return at;
    return -1;
  }

 private:
  const std::vector<uint64_t>& prefixes_;
  int shift_;
  std::vector<int32_t> table_;
  std::vector<uint8_t> holds_;
};

// Counts all elements. Two tables in turn, so that a run of equal keys need not wait for its own
// last increment.
template <class T, class K, class Count>
void count_all(const Source& source, int64_t begin, int64_t end, int shift, size_t cells,
               Count* counts) {
  std::vector<Count> other(size_t(end - begin) >= cells ? cells : 0);
  Count* second = other.empty() ? counts : other.data();
  for_chunks<T>(source, begin, end, [&](int64_t, const T* x, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      ++counts[K::of(x[i]) >> shift];
      ++second[K::of(x[i + 1]) >> shift];
      ++counts[K::of(x[i + 2]) >> shift];
      ++second[K::of(x[i + 3]) >> shift];
    }
    for (; i < n; ++i)
      ++counts[K::of(x[i]) >> shift];
  });
  for (size_t cell = 0; cell < other.size(); ++cell)
    counts[cell] += other[cell];
}

template <class Count>
void histogram_any(const Source& source, int64_t begin, int64_t end, const Digit& digit,
                   Count* counts) {
  dispatch(source.element, digit.key, [&](auto element, auto key_tag) {
    using T = decltype(element);
    using K = Key<key_tag()>;
    const int shift = digit.shift;
    if (digit.prefixes.empty())
      return count_all<T, K>(source, begin, end, shift, size_t(1) << digit.digit_bits, counts);
    const int above = shift + digit.digit_bits;
    const uint64_t mask = (uint64_t(1) << digit.digit_bits) - 1;
    const PrefixIndex index(digit.prefixes, key_bits(digit.key) - above);
    for_chunks<T>(source, begin, end, [&](int64_t, const T* x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t key = K::of(x[i]);
        const int64_t row = index.row(key >> above);
        if (row >= 0)
          ++counts[(row << digit.digit_bits) + ((key >> shift) & mask)];
      }
    });
  });
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

void histogram(const Source& source, int64_t begin, int64_t end, const Digit& digit,
               uint32_t* counts) {
  histogram_any(source, begin, end, digit, counts);
}

void histogram(const Source& source, int64_t begin, int64_t end, const Digit& digit,
               int64_t* counts) {
  histogram_any(source, begin, end, digit, counts);
}

void collect(const Source& source, int64_t begin, int64_t end, Element key, int shift,
             const std::vector<uint64_t>& prefixes, std::vector<int64_t>* keys) {
  const PrefixIndex index(prefixes, key_bits(key) - shift);
  dispatch(source.element, key, [&](auto element, auto key_tag) {
    using T = decltype(element);
    using K = Key<key_tag()>;
    for_chunks<T>(source, begin, end, [&](int64_t, const T* x, int64_t n) {
      int64_t found[kChunk];
      int64_t size = 0;
      for (int64_t i = 0; i < n; ++i) {  // without a branch: what is not wanted is overwritten
        const auto bits = K::of(x[i]);
        found[size] = int64_t(bits);
        size += index.may_hold(uint64_t(bits) >> shift);
      }
      for (int64_t i = 0; i < size; ++i)
        if (index.row(uint64_t(found[i]) >> shift) >= 0)
          keys->push_back(found[i]);
    });
  });
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
    const size_t first = cut;
    while (cut < cuts_.values.size() && (cuts_.values[cut] >> shift_) == bin)
      ++cut;
    // A bin of one key that every level takes whole, or not at all, needs no search.
    const bool whole = cut == first || (shift_ == 0 && !cuts_.straddled[first]);
    table_[bin] = whole ? int16_t(cuts_.first_level[first]) : int16_t(-1 - int16_t(first));
  }
}

size_t CutTable::cut_at(uint64_t key, int16_t entry) const {
  const auto first = cuts_.values.begin() + (-1 - entry);
  if (shift_ == 0)
    return size_t(-1 - entry);  // a bin is one key
  return size_t(std::lower_bound(first, cuts_.values.end(), key) - cuts_.values.begin());
}

void CutTable::count_equal(const Source& source, int64_t begin, int64_t end, int64_t* equal) const {
  dispatch(source.element, cuts_.key, [&](auto element, auto key_tag) {
    using K = Key<key_tag()>;
    for_chunks<decltype(element)>(source, begin, end, [&](int64_t, const auto* x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t key = K::of(x[i]);
        const int16_t entry = table_[key >> shift_];
        if (entry >= 0)
          continue;
        const size_t cut = cut_at(key, entry);
        if (cut < cuts_.values.size() && cuts_.values[cut] == key && cuts_.straddled[cut])
          ++equal[cut];
      }
    });
  });
}

template <class Level>
void CutTable::assign_any(const Source& source, int64_t begin, int64_t end, int64_t* ranks,
                          Level* levels) const {
  // Equals come in position order, so each straddled value walks through its levels once.
  struct Walk {
    int64_t rank, until;
    int32_t level;
  };
  std::vector<Walk> walks(cuts_.values.size());
  for (size_t cut = 0; cut < walks.size(); ++cut)
    walks[cut] = {ranks[cut], 0, cuts_.first_level[cut]};
  const auto next_level = [&](size_t cut) {
    Walk& walk = walks[cut];
    if (!cuts_.straddled[cut])
      return walk.level;
    const int32_t last = cuts_.first_level[cut + 1];
    while (walk.rank >= walk.until) {
      while (walk.level < last && cuts_.ties[walk.level] <= walk.rank)
        ++walk.level;
      walk.until = walk.level < last ? cuts_.ties[walk.level] : INT64_MAX;
    }
    ++walk.rank;
    return walk.level;
  };
  dispatch(source.element, cuts_.key, [&](auto element, auto key_tag) {
    using K = Key<key_tag()>;
    for_chunks<decltype(element)>(source, begin, end, [&](int64_t at, const auto* x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t key = K::of(x[i]);
        const int16_t entry = table_[key >> shift_];
        if (entry >= 0) {
          levels[at + i] = Level(entry);
          continue;
        }
        const size_t cut = cut_at(key, entry);
        const bool equal = cut < cuts_.values.size() && cuts_.values[cut] == key;
        levels[at + i] = Level(equal ? next_level(cut) : cuts_.first_level[cut]);
      }
    });
  });
  for (size_t cut = 0; cut < walks.size(); ++cut)
    ranks[cut] = walks[cut].rank;
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
