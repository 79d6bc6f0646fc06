// Selection by magnitude: histograms of integer keys, the keys near a cut, and prune levels.
//
// The IEEE bits of |w| read as an unsigned integer order as |w| does (-0 is 0, +inf the largest,
// NaN above it). All functions work on ranges of one tensor's elements, in logical (row-major)
// order, so that any split over threads, tensors, files or machines gives the same answer.
//
// Cost: one read of the elements a call; `assign` writes one prune level each. Limit: one counter a
// cycle is as many as a core stores, so a histogram takes one cycle per element and a little more
// (float32: less than twice what memory takes); what is filtered, and what is looked up, comes near
// memory. A core that is shared with another program's thread is slower where memory is not: so
// what is counted and filtered is handed out in blocks, most to the fastest.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/elements.h"

namespace confprune {

// A borrowed tensor of up to 8 dimensions; strides in elements.
struct Source {
  static constexpr int kMaxDims = 8;
  const void* data;
  Element element;
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];
  bool contiguous;
};

// Elements [begin, end) in blocks, each taken once by one of the threads that share them.
class Blocks {
 public:
  Blocks(int64_t begin, int64_t end, int64_t size) : next_(begin), end_(end), size_(size) {}

  // Sets [*begin, *end) to a block; false when none is left.
  bool take(int64_t* begin, int64_t* end) {
    *begin = next_.fetch_add(size_, std::memory_order_relaxed);
    *end = std::min(end_, *begin + size_);
    return *begin < end_;
  }

 private:
  std::atomic<int64_t> next_;
  int64_t end_, size_;
};

// Bits of a key made from `element`: the width of the type less the sign.
int key_bits(Element element);

// The digit of a key is `digit_bits` bits above its lowest `shift` bits; what stands above is its
// prefix. Counts are kept for the keys whose prefix is in `prefixes` (sorted; empty: all keys).
struct Digit {
  Element key;  // the type whose bits are the key; elements are widened to it
  int shift;
  int digit_bits;
  std::vector<uint64_t> prefixes;
};

// Adds the counts of the elements of all blocks left to `counts`, [max(1, prefixes), 2^digit_bits].
void histogram(const Source& source, Blocks& blocks, const Digit& digit, uint32_t* counts);
void histogram(const Source& source, Blocks& blocks, const Digit& digit, int64_t* counts);

// Where some order statistics are expected: among the keys whose bits above `shift` are
// prefixes[i], those in [low[i], high[i]].
struct Brackets {
  Element key;
  int shift;
  std::vector<uint64_t> prefixes;
  const int64_t* low;
  const int64_t* high;
  int64_t limit;  // of the keys worth keeping
};

// Appends to `keys` the bracketed keys of the elements of all blocks left, and adds to below[i] the
// number of those with prefix i under their bracket. Stops after a block when there are more than
// `limit`.
void collect(const Source& source, Blocks& blocks, const Brackets& brackets, int64_t* below,
             std::vector<int64_t>* keys);

// Where the levels cut: distinct threshold keys, increasing. A key below values[i] and above
// values[i - 1] is pruned first at level first_level[i] (first_level[size] = number of levels:
// never). Of the keys equal to values[i], in position order, the first ties[j] are pruned at level
// j, for j in [first_level[i], first_level[i + 1]). A value is straddled when some level takes only
// a part.
struct Cuts {
  Element key;
  std::vector<uint64_t> values;
  std::vector<int32_t> first_level;
  std::vector<int64_t> ties;
  std::vector<uint8_t> straddled;
};

// The elements of a block that equal a straddled value: their levels depend on how many equals
// stand before the block.
struct Ties {
  struct Place {
    int64_t position;
    int32_t cut;
  };
  std::vector<int64_t> equal;  // [values]
  std::vector<Place> places;   // in order; where they are too many to be kept, some
  bool complete;               // whether all are in `places`
};

// A table from the high bits of a key to its prune level, or to the search among the cuts.
class CutTable {
 public:
  explicit CutTable(Cuts cuts);
  const Cuts& cuts() const { return cuts_; }
  bool any_straddled() const {
    return std::find(cuts_.straddled.begin(), cuts_.straddled.end(), 1) != cuts_.straddled.end();
  }

  // Writes the prune levels of elements [begin, end) to levels[begin..end), uint8_t or int16_t.
  // `ranks`, [values], holds how many equals of each straddled value stand before `begin`, and is
  // advanced.
  template <class Level>
  void assign(const Source& source, int64_t begin, int64_t end, int64_t* ranks,
              Level* levels) const;

  // The same in two steps, so that blocks need not wait for those before: first what can be known
  // without the ranks, and `ties`; then the rest, with ties->equal replaced by the ranks.
  template <class Level>
  void assign_untied(const Source& source, int64_t begin, int64_t end, Ties* ties,
                     Level* levels) const;
  template <class Level>
  void assign_tied(const Source& source, int64_t begin, int64_t end, Ties* ties,
                   Level* levels) const;

 private:
  template <class T, class K, class Level, class Special>
  void scan(const Source& source, int64_t begin, int64_t end, Level* levels, Special special) const;

  Cuts cuts_;
  std::vector<int16_t> level_;      // by bin, or -1 where a cut divides the bin's keys
  std::vector<int16_t> first_cut_;  // by bin: the first that is not below it
};

}  // namespace confprune
