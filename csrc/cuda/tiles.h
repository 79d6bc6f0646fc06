// Many tensors as one row of tiles, each a part of one tensor that a block of threads reads at
// once.
//
// The list of tensors goes to the device in the parameters of small kernels: so a launch takes any
// number of tensors, no host memory has to outlive the call, and a graph can capture it.
#pragma once

#include <cstdint>

#include "cuda/keys.h"
#include "cuda/scan.h"

namespace confprune::cuda {

struct Segment {
  const void* data;
  void* levels;    // what is written for them, if anything
  int64_t size;    // elements
  int64_t before;  // elements of the segments before
  int64_t first;   // of its tiles
  int64_t tile;    // elements of a tile; the last one may have fewer
  Element element;
};

// The list ends with an empty segment behind the last tile.
struct Segments {
  const Segment* list;
  int64_t count;
  int64_t tiles;
  int64_t size;  // elements
};

namespace {  // internal linkage: each file has its own copy of the kernel

struct Batch {
  static constexpr int kMost = 48;  // a kernel's parameters have 4 KiB
  Segment segments[kMost];
};

__global__ void store_segments(Batch batch, int count, Segment* list) {
  if (int(threadIdx.x) < count)
    list[threadIdx.x] = batch.segments[threadIdx.x];
}

// Writes the list of `count` segments, the i-th of them as segment(i) gives it but for its place
// among the others. `list` has room for one more.
template <class SegmentOf>
Segments store(int64_t count, SegmentOf segment, Segment* list, Stream stream) {
  Segments all{list, 0, 0, 0};
  Batch batch{};
  int held = 0;
  const auto append = [&](Segment next) {
    next.before = all.size;
    next.first = all.tiles;
    batch.segments[held++] = next;
    if (held < Batch::kMost)
      return;
    launch(store_segments, 1, 2 * kWarp, 0, stream, batch, held, list);
    list += held;
    held = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const Segment next = segment(i);
    if (next.size == 0)
      continue;
    append(next);
    ++all.count;
    all.size += next.size;
    all.tiles += (next.size + next.tile - 1) / next.tile;
  }
  append(Segment{});
  if (held > 0)
    launch(store_segments, 1, 2 * kWarp, 0, stream, batch, held, list);
  return all;
}

}  // namespace

inline __device__ const Segment* segment_of_tile(const Segments& segments, int64_t tile) {
  return segments.list +
         first_where(segments.count, [&](int64_t i) { return segments.list[i + 1].first > tile; });
}

// A part of one tensor, in the hands of a block.
struct Tile {
  const Segment* segment;
  int64_t at;  // its first element
  int size;    // its elements

  __device__ Tile(const Segment* segment, int64_t number)
      : segment(segment), at((number - segment->first) * segment->tile) {
    const int64_t left = segment->size - at;
    size = int(left < segment->tile ? left : segment->tile);
  }

  template <class Bits>
  __device__ const Bits* data() const {
    return static_cast<const Bits*>(segment->data) + at;
  }
};

inline __device__ bool aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

}  // namespace confprune::cuda
