#include "kernels/selection.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "kernels/instruction_set.h"

namespace confprune {
namespace {

constexpr int kTableBits = 17;    // of prefixes: what weights use of the table stays in L1
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

// Finds the row of a key's prefix: a table over the prefix's own high bits gives the first
// candidate.
class PrefixIndex {
 public:
  // The prefixes are a key's bits above `shift`.
  PrefixIndex(const std::vector<uint64_t>& prefixes, Element key, int shift)
      : prefixes_(prefixes),
        table_shift_(std::max(shift, key_bits(key) - kTableBits)),
        shift_(shift),
        first_(size_t(1) << (key_bits(key) - table_shift_), -1),
        window_{} {
    const int between = table_shift_ - shift_;
    for (size_t i = prefixes.size(); i-- > 0;)
      first_[prefixes[i] >> between] = int32_t(i);
    for (int32_t row : first_)
      holds_.push_back(row >= 0);
    if (prefixes.empty() || key != Element::float32)
      return;
    const uint32_t top = uint32_t(prefixes.back() >> between);
    const uint32_t base = std::max(top, KeyWindow::kBins - 2) - (KeyWindow::kBins - 2);
    window_.shift = table_shift_;
    window_.base = base << table_shift_;
    for (uint64_t prefix : prefixes) {
      const uint32_t bin = std::max(uint32_t(prefix >> between), base) - base;
      window_.flags[bin / 32] |= 1u << (bin % 32);
    }
  }

  // Writes the keys that may have a known prefix to `found`, in order; returns their number.
  template <class K, class T, class Bits>
  int64_t filter(const T* x, int64_t count, Bits* found) const {
    if constexpr (std::is_same<T, float>::value && sizeof(Bits) == sizeof(float))
      if (const KeyFilter vectorised = instruction_set().filter)
        return vectorised(x, count, window_, found);
    int64_t size = 0;
    for (int64_t i = 0; i < count; ++i) {  // without a branch: what is not wanted is overwritten
      const Bits key = K::of(x[i]);
      found[size] = key;
      size += holds_[key >> table_shift_];
    }
    return size;
  }

  int64_t row(uint64_t key) const {
    int64_t at = first_[key >> table_shift_];
    if (at < 0 || table_shift_ == shift_)
      return at;
    const uint64_t prefix = key >> shift_;
    const int64_t size = int64_t(prefixes_.size());
    while (at < size && prefixes_[at] < prefix)
      ++at;
    return at < size && prefixes_[at] == prefix ? at : -1;
  }

 private:
  const std::vector<uint64_t>& prefixes_;
  int table_shift_;
  int shift_;
  std::vector<int32_t> first_;  // by bin, or -1
  std::vector<uint8_t> holds_;  // the same question in less cache
  KeyWindow window_;
};

// Calls body(key, row) for every element with a known prefix, until it returns false. Few have, and
// no branch can be predicted among them: so the candidates are gathered without one.
template <class T, class K, class Body>
void for_prefixed(const Source& source, int64_t begin, int64_t end, const PrefixIndex& index,
                  Body body) {
  typename K::Bits found[kChunk];
  for_chunks<T>(source, begin, end, [&](int64_t, const T* x, int64_t n) {
    const int64_t size = index.template filter<K>(x, n, found);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t row = index.row(found[i]);
      if (row >= 0)
        body(uint64_t(found[i]), row);
    }
  });
}

template <class Count>
void histogram_any(const Source& source, int64_t begin, int64_t end, const Digit& digit,
                   Count* counts) {
  dispatch(source.element, digit.key, [&](auto element, auto key_tag) {
    using T = decltype(element);
    using K = Key<key_tag()>;
    const int shift = digit.shift;
    if (digit.prefixes.empty())
      return for_chunks<T>(source, begin, end, [=](int64_t, const T* x, int64_t n) {
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) {  // read ahead of the counting, which may alias what is read
          const auto a = K::of(x[i]), b = K::of(x[i + 1]);
          const auto c = K::of(x[i + 2]), d = K::of(x[i + 3]);
          ++counts[a >> shift];
          ++counts[b >> shift];
          ++counts[c >> shift];
          ++counts[d >> shift];
        }
        for (; i < n; ++i)
          ++counts[K::of(x[i]) >> shift];
      });
    const int above = shift + digit.digit_bits;
    const uint64_t mask = (uint64_t(1) << digit.digit_bits) - 1;
    const PrefixIndex index(digit.prefixes, digit.key, above);
    for_prefixed<T, K>(source, begin, end, index, [&](uint64_t key, int64_t row) {
      ++counts[(row << digit.digit_bits) + int64_t((key >> shift) & mask)];
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

void collect(const Source& source, int64_t begin, int64_t end, const Brackets& brackets,
             int64_t* below, std::vector<int64_t>* keys) {
  const PrefixIndex index(brackets.prefixes, brackets.key, brackets.shift);
  dispatch(source.element, brackets.key, [&](auto element, auto key_tag) {
    using K = Key<key_tag()>;
    typename K::Bits candidates[kChunk];
    int64_t kept[kChunk];
    for_chunks<decltype(element)>(source, begin, end, [&](int64_t, const auto* x, int64_t n) {
      if (int64_t(keys->size()) > brackets.limit)
        return;
      const int64_t size = index.template filter<K>(x, n, candidates);
      int64_t keeping = 0;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t key = int64_t(candidates[i]);
        const int64_t row = index.row(uint64_t(key));
        if (row < 0)
          continue;
        below[row] += key < brackets.low[row];
        kept[keeping] = key;
        keeping += (key >= brackets.low[row]) & (key <= brackets.high[row]);
      }
      keys->insert(keys->end(), kept, kept + keeping);
    });
  });
}

CutTable::CutTable(Cuts cuts)
    : cuts_(std::move(cuts)), shift_(std::max(0, key_bits(cuts_.key) - kTableBits)) {
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
  for (size_t i = 0; i < cuts_.values.size(); ++i)
    if (cuts_.straddled[i])
      straddled_.push_back(cuts_.values[i]);
}

void CutTable::count_equal(const Source& source, int64_t begin, int64_t end, int64_t* equal) const {
  const PrefixIndex index(straddled_, cuts_.key, 0);
  std::vector<int64_t> counts(straddled_.size(), 0);
  dispatch(source.element, cuts_.key, [&](auto element, auto key_tag) {
    for_prefixed<decltype(element), Key<key_tag()>>(source, begin, end, index,
                                                    [&](uint64_t, int64_t row) { ++counts[row]; });
  });
  size_t row = 0;
  for (size_t cut = 0; cut < cuts_.values.size(); ++cut)
    if (cuts_.straddled[cut])
      equal[cut] += counts[row++];
}

// Writes to levels[position] what the table tells of each element, then calls
// special(position, cut, equal) where it tells only the first cut to compare with: few positions,
// told apart without a branch.
template <class T, class K, class Level, class Special>
void CutTable::scan(const Source& source, int64_t begin, int64_t end, Level* levels,
                    Special special) const {
  // Copies, because a level that is written might otherwise be any of these.
  const int16_t* const table = table_.data();
  const uint64_t* const values = cuts_.values.data();
  const size_t size = cuts_.values.size();
  const int shift = shift_;
  int16_t found[kChunk];
  for_chunks<T>(source, begin, end, [&, table, shift](int64_t at, const T* x, int64_t n) {
    Level* const out = levels + at;
    int64_t searched = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int16_t entry = table[K::of(x[i]) >> shift];
      out[i] = Level(entry);
      found[searched] = int16_t(i);
      searched += entry < 0;
    }
    for (int64_t i = 0; i < searched; ++i) {
      const uint64_t key = K::of(x[found[i]]);
      size_t cut = size_t(-1 - table[key >> shift]);
      cut += values[cut] < key;  // most bins hold one cut, and either side is as likely
      while (cut < size && values[cut] < key)
        ++cut;
      special(at + found[i], cut, cut < size && values[cut] == key);
    }
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
    scan<decltype(element), Key<key_tag()>>(
        source, begin, end, levels, [&](int64_t at, size_t cut, bool is_equal) {
          levels[at] = Level(is_equal ? next_level(cut) : cuts_.first_level[cut]);
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
