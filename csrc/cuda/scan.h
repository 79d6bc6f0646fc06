// Searches, sums over the threads of a block, and cumulative counts.
#pragma once

#include <cstdint>

#include "cuda/keys.h"

namespace confprune::cuda {

// The first index in [0, size) where holds(index), which then holds up to the end; or `size`.
template <class Holds>
__device__ int64_t first_where(int64_t size, Holds holds) {
  int64_t low = 0;
  for (int64_t high = size; low < high;) {
    const int64_t middle = low + (high - low) / 2;
    if (holds(middle))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The sum of the values of a warp's lanes up to this one.
template <class T>
__device__ T cumulative_in_warp(T value) {
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned by = 1; by < kWarp; by *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, by);
    value += lane >= by ? other : 0;
  }
  return value;
}

template <class T>
struct Sums {
  T before;  // of the threads before this one
  T all;
};

// Sums of the values of a block's threads, which all call it, with shared memory for kWarp values.
template <class T>
__device__ Sums<T> block_sums(T value, T* shared) {
  const unsigned lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp;
  const T sum = cumulative_in_warp(value);
  if (lane == kWarp - 1)
    shared[own] = sum;
  __syncthreads();
  Sums<T> sums{sum - value, 0};
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
    sums.before += warp < own ? shared[warp] : 0;
    sums.all += shared[warp];
  }
  __syncthreads();  // a next call writes
  return sums;
}

// Turns counts into cumulative counts, each with its own; all threads of a block together.
inline __device__ void cumulate(Count* counts, int64_t size, Count* shared) {
  const int64_t each = (size + blockDim.x - 1) / blockDim.x;
  const int64_t from = each * threadIdx.x;
  const int64_t until = from + each < size ? from + each : size;
  Count sum = 0;
  for (int64_t i = from; i < until; ++i)
    sum += counts[i];
  sum = block_sums(sum, shared).before;
  for (int64_t i = from; i < until; ++i)
    counts[i] = sum += counts[i];
  __syncthreads();
}

// Where the rank-th (from 1) of the counted things lies; the last cell, where there are fewer.
struct Place {
  int64_t cell;
  int64_t before;  // things in cells before
  int64_t inside;  // things in this cell
};

inline __device__ Place place_of(int64_t rank, const Count* cumulative, int64_t cells) {
  const int64_t cell =
      first_where(cells - 1, [&](int64_t i) { return int64_t(cumulative[i]) >= rank; });
  const int64_t before = cell == 0 ? 0 : int64_t(cumulative[cell - 1]);
  return {cell, before, int64_t(cumulative[cell]) - before};
}

}  // namespace confprune::cuda
