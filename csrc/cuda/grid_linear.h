// The masked product of a linear layer at many levels, in one launch:
//
//   y[k] = floor(scale · x[k] (W ⊙ (levels > level[k]))ᵀ + bias), floor(v) = max(v, 0) where `relu`
//
// Accumulated in float (double for float64), each output's inputs in one order, whatever else the
// call holds: results depend neither on the batch nor on the other levels. A pruned weight is a
// zero: times infinity it is NaN, as in the masked network.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "kernels/elements.h"

namespace confprune::cuda {

// All pointers are to device memory. Rows are contiguous; strides are from one row to the next, in
// elements. There are fewer than 2^31 inputs, and 2^31 tiles of 64 rows by 256 tokens and levels.
struct GridLinear {
  const void* x;          // [1 or K, N, inputs]
  const void* weight;     // [outputs, inputs]
  const uint8_t* levels;  // [outputs, inputs]
  const int64_t* level;   // [K]
  const void* scale;      // [outputs], of type `follow`; null: 1
  const void* bias;       // the same; null: 0
  void* y;                // [K, N, outputs], contiguous
  Element element;        // of x, weight and y
  Element follow;         // of scale and bias
  int64_t num_levels;     // K
  int64_t batch;          // N
  int64_t inputs;
  int64_t outputs;
  int64_t x_level_stride;  // 0: one x for all levels
  int64_t x_stride;
  int64_t weight_stride;
  int64_t levels_stride;
  bool relu;
};

// Returns once the work is in the stream; errors are left for cudaGetLastError. Fastest where
// inputs and strides are multiples of 16 and the pointers are aligned to 16 bytes.
void grid_linear(const GridLinear& product, Stream stream);

}  // namespace confprune::cuda
