// From a key to its code: its prune level, or the cut that it ties with.
//
// A table over cells of keys gives the code where a cell has one, and the first cut to compare with
// where it has several. Codes have 8 bits up to kMostNarrow levels, else 16; the highest bit says
// that the rest is the number of a cut.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/levels.h"
#include "cuda/scan.h"

namespace confprune::cuda {

constexpr unsigned kCells = 1u << 15;   // of the table
constexpr int kMostNarrow = 126;        // levels; with more, shared memory would not suffice
constexpr unsigned kSearch = 1u << 15;  // marks the number of a cut in a table of windows

template <class Code>
constexpr unsigned kTie = 1u << (8 * sizeof(Code) - 1);

// A cell for each key of 15 bits, whose entries are codes; else a window over the cuts.
template <Element kKey>
using Cells = std::conditional_t<Format<kKey>::kBits == 15, EveryKey, Window>;
template <Element kKey>
constexpr bool kWindow = std::is_same_v<Cells<kKey>, Window>;
template <Element kKey, class Code>
using Entry = std::conditional_t<kWindow<kKey>, uint16_t, Code>;

template <Element kKey>
struct Cut {
  Key<kKey> value;
  uint16_t below;  // the level of keys between this value and the one before
  uint16_t equal;  // the code of this key
};

// On the device; made anew for each call, because making it costs less than asking what changed.
struct Table {
  void* entries;   // [kCells] Entry
  void* cuts;      // [size + 1] Cut; the last one is above all keys
  Window* window;  // if it has one
  int* tie;        // whether any value is straddled; zero at first
};

template <Element kKey>
__device__ Cells<kKey> cells_of(const Cuts& cuts) {
  if constexpr (kWindow<kKey>)
    return cuts.size == 0
               ? window_of(1, 1, kCells)
               : window_of(uint64_t(cuts.values[0]), uint64_t(cuts.values[cuts.size - 1]), kCells);
  else
    return EveryKey{};
}

template <Element kKey, class Code>
__device__ Cut<kKey> cut_of(const Cuts& cuts, int64_t i) {
  const uint16_t below = uint16_t(cuts.first_level[i]);
  if (i == cuts.size)
    return {Key<kKey>(~Key<kKey>(0)), below, below};
  const bool tie = cuts.straddled[i];
  return {Key<kKey>(cuts.values[i]), below, tie ? uint16_t(kTie<Code> | unsigned(i)) : below};
}

// A thread for each cell, and for each cut with what is above them all.
template <Element kKey, class Code>
__global__ void make_table(Cuts cuts, Table table) {
  const Cells<kKey> cells = cells_of<kKey>(cuts);
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  if constexpr (kWindow<kKey>)
    if (thread == 0)
      *table.window = cells;
  if (thread <= cuts.size)
    static_cast<Cut<kKey>*>(table.cuts)[thread] = cut_of<kKey, Code>(cuts, thread);
  if (thread < cuts.size && cuts.straddled[thread])
    store_relaxed(table.tie, 1);
  if (thread >= kCells)
    return;
  const uint64_t start = cells.start(thread, Format<kKey>::kBits);
  const uint64_t end = cells.start(thread + 1, Format<kKey>::kBits);
  const int64_t first =
      first_where(cuts.size, [&](int64_t i) { return uint64_t(cuts.values[i]) >= start; });
  const Cut<kKey> cut = cut_of<kKey, Code>(cuts, first);
  const bool within = first < cuts.size && cut.value < end;
  const unsigned entry = !within         ? cut.below
                         : kWindow<kKey> ? kSearch | unsigned(first)
                                         : cut.equal;
  static_cast<Entry<kKey, Code>*>(table.entries)[thread] = Entry<kKey, Code>(entry);
}

// The code of a key, from a table's entries and cuts wherever they are kept.
template <Element kKey, class Code>
__device__ unsigned code_of(Key<kKey> key, const Cells<kKey>& cells,
                            const Entry<kKey, Code>* entries, const Cut<kKey>* cuts) {
  const unsigned entry = entries[cells.cell(key)];
  if constexpr (kWindow<kKey>)
    if (entry & kSearch) {
      const Cut<kKey>* cut = cuts + (entry & ~kSearch);
      while (cut->value < key)
        ++cut;
      return cut->value == key ? cut->equal : cut->below;
    }
  return entry;
}

// `kCount` codes or levels of `kSize` bytes, in whole words.
template <int kSize, int kCount>
struct Pack {
  static constexpr int kBytes = kSize * kCount;
  static constexpr int kEach = 4 / kSize;  // in a word
  static constexpr int kWords = (kCount + kEach - 1) / kEach;
  uint32_t words[kWords];

  __device__ Pack() {
    for (int i = 0; i < kWords; ++i)
      words[i] = 0;
  }
  __device__ unsigned get(int i) const {
    return words[i / kEach] >> (8 * kSize * (i % kEach)) & ((1u << (8 * kSize)) - 1);
  }
  __device__ void set(int i, unsigned value) {  // once
    words[i / kEach] |= value << (8 * kSize * (i % kEach));
  }

  // Memory is aligned to kBytes.
  __device__ void load(const void* from) {
    static_assert(kBytes % 16 == 0, "loads are of whole vectors");
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 vector = static_cast<const uint4*>(from)[i];
      words[4 * i] = vector.x;
      words[4 * i + 1] = vector.y;
      words[4 * i + 2] = vector.z;
      words[4 * i + 3] = vector.w;
    }
  }
  __device__ void store(void* to) const {
    if constexpr (kBytes == 16)
      *static_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    else if constexpr (kBytes == 8)
      *static_cast<uint2*>(to) = {words[0], words[1]};
    else if constexpr (kBytes == 4)
      *static_cast<uint32_t*>(to) = words[0];
    else
      *static_cast<uint16_t*>(to) = uint16_t(words[0]);
  }
};

}  // namespace confprune::cuda
