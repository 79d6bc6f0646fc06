// Prune levels: one look-up an element, and a comparison for the few whose bin holds a cut.
#include <cstring>
#include <utility>

#include "kernels/prefix_index.h"
#include "kernels/selection.h"

namespace confprune {
namespace {

constexpr int16_t kMixed = -1;         // in place of a level: not all keys of the bin have the same
constexpr int64_t kLeastPerTie = 256;  // elements of a block for each tie whose place is kept

// Of eight levels the mixed ones, the first in bit 0. In a byte that is 255, which may be a level
// too: then it is looked up once more.
uint64_t mixed_among(const uint8_t* levels) {
  constexpr uint64_t low7 = 0x7f7f7f7f7f7f7f7f, low1 = 0x0101010101010101;
  uint64_t word;
  std::memcpy(&word, levels, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  const uint64_t flags = ((((word & low7) + low1) & word) >> 7) & low1;  // of each byte that is 255
  return (flags * 0x0102040810204080) >> 56;
}

uint64_t mixed_among(const int16_t* levels) {
  uint64_t mask = 0;
  for (int i = 0; i < 8; ++i)
    mask |= uint64_t(levels[i] == kMixed) << i;
  return mask;
}

// Writes the places of the mixed among `count` levels to `found`, in order; returns their number.
// Few are mixed and no branch can be predicted among them: so four places of 64 are taken without
// one, and there are seldom more. `found` has room for one more than there are.
template <class Level>
int64_t find_mixed(const Level* levels, int64_t count, int16_t* found) {
  int64_t size = 0, i = 0;
  for (; i + 64 <= count; i += 64) {
    uint64_t mask = 0;
    for (int j = 0; j < 64; j += 8)
      mask |= mixed_among(levels + i + j) << j;
    const auto take = [&] {
      found[size] = int16_t(i + __builtin_ctzll(mask | uint64_t(1) << 63));
      size += mask != 0;
      mask &= mask - 1;
    };
    for (int j = 0; j < 4; ++j)
      take();
    while (mask != 0)
      take();
  }
  for (; i < count; ++i)
    if (levels[i] == Level(kMixed))
      found[size++] = int16_t(i);
  return size;
}

// The levels of those equal to each value, which come in position order: so each straddled value
// walks through its levels once. Advances `ranks`, which hold how many have come.
class Walks {
 public:
  Walks(const Cuts& cuts, int64_t* ranks) : cuts_(cuts), ranks_(ranks), walks_(cuts.values.size()) {
    for (size_t cut = 0; cut < walks_.size(); ++cut)
      walks_[cut] = {0, cuts.first_level[cut]};
  }

  int32_t next_level(size_t cut) {
    Walk& walk = walks_[cut];
    if (!cuts_.straddled[cut])
      return walk.level;
    const int32_t last = cuts_.first_level[cut + 1];
    while (ranks_[cut] >= walk.until) {
      while (walk.level < last && cuts_.ties[walk.level] <= ranks_[cut])
        ++walk.level;
      walk.until = walk.level < last ? cuts_.ties[walk.level] : INT64_MAX;
    }
    ++ranks_[cut];
    return walk.level;
  }

 private:
  struct Walk {
    int64_t until;
    int32_t level;
  };
  const Cuts& cuts_;
  int64_t* const ranks_;
  std::vector<Walk> walks_;
};

}  // namespace

CutTable::CutTable(Cuts cuts) : cuts_(std::move(cuts)) {
  const int bits = key_bits(cuts_.key), shift = table_shift(bits);
  const size_t bins = size_t(1) << (bits - shift);
  level_.reserve(bins);
  first_cut_.reserve(bins);
  for (size_t cut = 0; cut < cuts_.values.size();) {
    const size_t bin = cuts_.values[cut] >> shift, first = cut;
    level_.resize(bin, int16_t(cuts_.first_level[cut]));
    first_cut_.resize(bin + 1, int16_t(cut));
    while (cut < cuts_.values.size() && cuts_.values[cut] >> shift == bin)
      ++cut;
    // A bin of one key that every level takes whole, or not at all, needs no search.
    const bool whole = shift == 0 && !cuts_.straddled[first];
    level_.push_back(whole ? int16_t(cuts_.first_level[first]) : kMixed);
  }
  level_.resize(bins, int16_t(cuts_.first_level.back()));
  first_cut_.resize(bins, int16_t(cuts_.values.size()));
}

// Writes to levels[position] what the table tells of each element, then calls
// special(position, cut, equal) where it tells only the first cut to compare with.
template <class T, class K, class Level, class Special>
void CutTable::scan(const Source& source, int64_t begin, int64_t end, Level* levels,
                    Special special) const {
  // Local, because a level that is written might otherwise be any of these.
  const std::vector<Level> level_of(level_.begin(), level_.end());
  const Level* const table = level_of.data();
  const int16_t* const first_cut = first_cut_.data();
  const uint64_t* const values = cuts_.values.data();
  const size_t size = cuts_.values.size();
  constexpr int shift = table_shift(K::kBits);
  int16_t found[kChunk + 1];
  for_chunks<T>(source, begin, end, [&, table, first_cut](int64_t at, const T* x, int64_t n) {
    Level* const out = levels + at;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {  // read ahead of the writing, which may alias what is read
      __builtin_prefetch(x + i + kAhead);
      const auto a = K::of(x[i]), b = K::of(x[i + 1]);
      const auto c = K::of(x[i + 2]), d = K::of(x[i + 3]);
      out[i] = table[a >> shift];
      out[i + 1] = table[b >> shift];
      out[i + 2] = table[c >> shift];
      out[i + 3] = table[d >> shift];
    }
    for (; i < n; ++i)
      out[i] = table[K::of(x[i]) >> shift];
    const int64_t mixed = find_mixed(out, n, found);
    for (int64_t i = 0; i < mixed; ++i) {
      const uint64_t key = K::of(x[found[i]]);
      size_t cut = size_t(first_cut[key >> shift]);
      if (shift > 0) {
        cut += cut < size && values[cut] < key;  // most bins hold one, and either side is as likely
        while (cut < size && values[cut] < key)
          ++cut;
      }
      special(at + found[i], cut, cut < size && values[cut] == key);
    }
  });
}

template <class Level>
void CutTable::assign(const Source& source, int64_t begin, int64_t end, int64_t* ranks,
                      Level* levels) const {
  Walks walks(cuts_, ranks);
  dispatch(source.element, cuts_.key, [&](auto element, auto key_tag) {
    scan<decltype(element), Key<key_tag()>>(
        source, begin, end, levels, [&](int64_t at, size_t cut, bool is_equal) {
          levels[at] = Level(is_equal ? walks.next_level(cut) : cuts_.first_level[cut]);
        });
  });
}

template <class Level>
void CutTable::assign_untied(const Source& source, int64_t begin, int64_t end, Ties* ties,
                             Level* levels) const {
  ties->equal.assign(cuts_.values.size(), 0);
  ties->complete = false;
  const int bits = key_bits(cuts_.key);
  if (bits <= kTableBits && any_straddled()) {  // most elements may be ties
    std::vector<int64_t> counts(size_t(1) << bits, 0);
    Blocks all(begin, end, end - begin);
    histogram(source, all, {cuts_.key, 0, bits, {}}, counts.data());
    for (size_t cut = 0; cut < cuts_.values.size(); ++cut)
      ties->equal[cut] = cuts_.straddled[cut] ? counts[cuts_.values[cut]] : 0;
    return;
  }
  const size_t room = size_t((end - begin) / kLeastPerTie);
  ties->complete = true;
  dispatch(source.element, cuts_.key, [&](auto element, auto key_tag) {
    scan<decltype(element), Key<key_tag()>>(source, begin, end, levels,
                                            [&](int64_t at, size_t cut, bool is_equal) {
                                              if (!is_equal || !cuts_.straddled[cut]) {
                                                levels[at] = Level(cuts_.first_level[cut]);
                                                return;
                                              }
                                              ++ties->equal[cut];
                                              ties->complete = ties->places.size() < room;
                                              if (ties->complete)
                                                ties->places.push_back({at, int32_t(cut)});
                                            });
  });
}

template <class Level>
void CutTable::assign_tied(const Source& source, int64_t begin, int64_t end, Ties* ties,
                           Level* levels) const {
  if (!ties->complete)
    return assign(source, begin, end, ties->equal.data(), levels);
  Walks walks(cuts_, ties->equal.data());
  for (const auto [position, cut] : ties->places)
    levels[position] = Level(walks.next_level(size_t(cut)));
}

template void CutTable::assign(const Source&, int64_t, int64_t, int64_t*, uint8_t*) const;
template void CutTable::assign(const Source&, int64_t, int64_t, int64_t*, int16_t*) const;
template void CutTable::assign_untied(const Source&, int64_t, int64_t, Ties*, uint8_t*) const;
template void CutTable::assign_untied(const Source&, int64_t, int64_t, Ties*, int16_t*) const;
template void CutTable::assign_tied(const Source&, int64_t, int64_t, Ties*, uint8_t*) const;
template void CutTable::assign_tied(const Source&, int64_t, int64_t, Ties*, int16_t*) const;

}  // namespace confprune
