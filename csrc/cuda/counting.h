// How a device counts keys: its blocks read tiles, and count in shared memory or in all of it.
#pragma once

#include <algorithm>

#include "cuda/selection.h"
#include "cuda/tiles.h"

namespace confprune::cuda {

constexpr int kThreads = 1024;  // of a block that counts
constexpr int kVectors = 4;     // of 16 bytes that a thread reads at once

inline int blocks_for(int64_t tiles, int a_multiprocessor) {
  const int64_t most = int64_t(device().multiprocessors) * a_multiprocessor;
  return int(std::max<int64_t>(1, std::min(tiles, most)));
}

inline Segment segment_of(const Scores& scores) {
  Segment segment{};
  segment.data = scores.data;
  segment.element = scores.element;
  segment.size = scores.size;
  segment.tile = int64_t(kThreads) * kVectors * 16 / element_bytes(scores.element);
  return segment;
}

// Calls body(key, valid) for each element of a tile, the lanes of a warp together; what is not
// valid stands for no element.
template <Element kKey, class Body>
__device__ void for_keys_of(const Tile& tile, Body body) {
  dispatch_element<kKey>(tile.segment->element, [&](auto tag) {
    constexpr Element kFrom = decltype(tag)::value;
    using Bits = typename Format<kFrom>::Bits;
    constexpr int kEach = 16 / sizeof(Bits);
    const Bits* const data = tile.data<Bits>();
    if (tile.size == kThreads * kVectors * kEach && aligned(data)) {
      const uint4* const vectors = reinterpret_cast<const uint4*>(data) + threadIdx.x;
      uint4 read[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        read[v] = __ldg(vectors + v * kThreads);
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          body(key_of<kFrom, kKey>(unpack<Bits>(read[v], i)), true);
      return;
    }
    for (int from = 0; from < tile.size; from += kThreads) {
      const int i = from + int(threadIdx.x);
      const bool valid = i < tile.size;
      body(key_of<kFrom, kKey>(valid ? data[i] : Bits(0)), valid);
    }
  });
}

// The same for the tiles of this block: successive ones, about as many as other blocks have.
template <Element kKey, class Body>
__device__ void for_keys(const Segments& segments, Body body) {
  const int64_t first = segments.tiles * blockIdx.x / gridDim.x;
  const int64_t last = segments.tiles * (blockIdx.x + 1) / gridDim.x;
  if (first == last)
    return;
  const Segment* segment = segment_of_tile(segments, first);
  for (int64_t tile = first; tile < last; ++tile) {
    while (segment[1].first <= tile)
      ++segment;
    for_keys_of<kKey>(Tile(segment, tile), body);
  }
}

// Counters in shared memory, added to those of all blocks in the end. 32 bits suffice: no device
// holds 2^32 scores for each of its blocks.
class BlockCounts {
 public:
  static size_t bytes(int64_t cells) { return size_t(cells) * sizeof(unsigned); }

  __device__ BlockCounts(Count* counts, unsigned cells)
      : counts_(counts), cells_(cells), own_(dynamic_shared<unsigned>()) {
    for (unsigned cell = threadIdx.x; cell < cells_; cell += blockDim.x)
      own_[cell] = 0;
    __syncthreads();
  }

  // An increment whose old value nobody asks for is added up by the hardware over the lanes with
  // the same address, so that keys which come again and again cost no more.
  __device__ void add(bool counting, unsigned cell) {
    if (counting)
      atomicAdd(own_ + cell, 1u);
  }

  __device__ void flush() {
    __syncthreads();
    for (unsigned cell = threadIdx.x; cell < cells_; cell += blockDim.x)
      if (own_[cell] > 0)
        atomicAdd(counts_ + cell, Count(own_[cell]));
  }

 private:
  Count* const counts_;
  const unsigned cells_;
  unsigned* const own_;
};

// Counters that all blocks share. A warp keeps the number for one cell to itself while it meets it
// again and again: else such keys would queue for one address.
class WarpCounts {
 public:
  __device__ WarpCounts(Count* counts, unsigned) : counts_(counts) {}

  // By all lanes together, each for its own cell if it counts.
  __device__ void add(bool counting, unsigned cell) {
    const unsigned lanes = __ballot_sync(kAllLanes, counting);
    if (lanes == 0)
      return;
    unsigned same = __ballot_sync(kAllLanes, counting && cell == held_);
    if (same == 0) {
      flush();
      held_ = __shfl_sync(kAllLanes, cell, __ffs(int(lanes)) - 1);
      same = __ballot_sync(kAllLanes, counting && cell == held_);
    }
    number_ += unsigned(__popc(same));
    if (counting && cell != held_)
      atomicAdd(counts_ + cell, Count(1));
  }

  __device__ void flush() {
    if (number_ > 0 && threadIdx.x % kWarp == 0)
      atomicAdd(counts_ + held_, Count(number_));
    number_ = 0;
  }

 private:
  Count* const counts_;
  unsigned held_ = ~0u;  // that cell
  unsigned number_ = 0;
};

}  // namespace confprune::cuda
