// A cell of a packed matrix in the hands of a block: its slices are found, and shared out to warps.
//
// Where a slice begins is known once those before it are read. So their bytes, some 3 % of the
// cell, come to shared memory first, where one warp walks over them.
#pragma once

#include "cuda/device.h"
#include "cuda/scan.h"
#include "kernels/sparse_matrix.h"

namespace confprune::cuda::sparse {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / int(kWarp);

// Where a slice begins, in the bytes and in the survivors of its cell.
struct SliceStart {
  int byte, survivor;
};

// In shared memory. A slice has a row at least, so that there are no more slices than rows.
struct CellMemory {
  // The slices of any cell that sparse_pack makes; those of stranger ones stay where they are.
  static constexpr int kHeld = int(kMostChunkRows / kSliceRows * (2 + kSparseBlock + kSliceRows));

  SliceStart starts[kMostChunkRows];
  int slices;
  uint8_t held[kHeld];
};

class Cell {
 public:
  // All threads of a block; none may be left that still reads `memory`.
  __device__ Cell(const SparseMatrix& sparse, int64_t index, CellMemory* memory)
      : memory_(memory), survivors_(sparse.cells[2 * index]) {
    const int64_t begin = sparse.cells[2 * index + 1];
    const int bytes = int(sparse.cells[2 * index + 3] - begin);
    slices_ = sparse.slices + begin;
    if (bytes <= CellMemory::kHeld) {
      hold(bytes);
      slices_ = memory->held;
    }
    __syncthreads();
    if (threadIdx.x < kWarp)
      find_slices(bytes);
    __syncthreads();
  }

  // Calls body(slice, its first survivor) on the slices of this warp. The longest ones come first,
  // so that warps which take turns have about the same to do.
  template <class Body>
  __device__ void each_slice(Body body) const {
    for (int i = int(threadIdx.x / kWarp); i < memory_->slices; i += kWarps) {
      const SliceStart start = memory_->starts[i];
      body(read_slice(slices_ + start.byte), survivors_ + start.survivor);
    }
  }

 private:
  // Copies the slices, with all loads under way before the first store.
  __device__ void hold(int bytes) {
    constexpr int kRounds = (CellMemory::kHeld + kThreads - 1) / kThreads;
    uint8_t loaded[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int at = round * kThreads + int(threadIdx.x);
      loaded[round] = at < bytes ? slices_[at] : uint8_t(0);
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int at = round * kThreads + int(threadIdx.x);
      if (at < bytes)
        memory_->held[at] = loaded[round];
    }
  }

  // The lanes of a warp walk over 32 slices together, and each counts the survivors of one.
  __device__ void find_slices(int bytes) {
    const int lane = int(threadIdx.x);
    int found = 0, survivors = 0;
    for (int next = 0; next < bytes;) {
      int own = -1, together = 0;
      for (; together < int(kWarp) && next < bytes; ++together) {
        own = together == lane ? next : own;
        next = int(read_slice(slices_ + next).next_slice - slices_);
      }
      const int counted = own < 0 ? 0 : int(survivors_of(read_slice(slices_ + own)));
      const int until = cumulative_in_warp(counted);
      if (own >= 0)
        memory_->starts[found + lane] = {own, survivors + until - counted};
      found += together;
      survivors += __shfl_sync(kAllLanes, until, kWarp - 1);
    }
    if (lane == 0)
      memory_->slices = found;
  }

  CellMemory* memory_;
  const uint8_t* slices_;
  int64_t survivors_;
};

// Two lanes take the survivors of a row in turn: body(number of the survivor in the slice) is
// called on those of this one, which is `lane` 0 or 1.
template <class Body>
__device__ void each_survivor(const Slice& slice, int row, int lane, Body body) {
  constexpr int kRows = int(kSliceRows);
  const int full = int(slice.full), partial = int(slice.partial);
#pragma unroll 4
  for (int step = lane; step < full; step += 2)
    body(step * kRows + row);
  int start = full * kRows;
#pragma unroll 2
  for (int step = 0; step < partial; step += 2) {
    const int even = slice.step_rows[step];
    const int odd = step + 1 < partial ? slice.step_rows[step + 1] : 0;
    if (row < (lane == 0 ? even : odd))
      body(start + lane * even + row);
    start += even + odd;
  }
}

}  // namespace confprune::cuda::sparse
