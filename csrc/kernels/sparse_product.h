// y = W x + b for a sparse W: a linear layer, or a convolution of up to three dimensions.
//
// Examples stand in the vector lanes, or the positions of a convolution's example: inputs are
// packed as [column, lanes], so that a survivor meets 16 of them with one multiply-add, whatever
// the pattern. A single vector x has nothing to fill lanes with; there sixteen rows stand in them,
// and x is looked up in registers.
//
// Operations: 2 · survivors · lanes. The limits are one 64-byte load a cycle for a multiply-add,
// and for a single x the permutations of its look-ups, four for 16 survivors. Survivors of a 16-bit
// type, and their inputs, are computed with in float.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/sparse_matrix.h"

namespace confprune {

constexpr int kWindowDims = 3;  // positions; those not in use have size 1

struct Window {
  int64_t channels;  // of the input, all groups
  int64_t input[kWindowDims];
  int64_t output[kWindowDims];
  int64_t kernel[kWindowDims];
  int64_t stride[kWindowDims];
  int64_t padding[kWindowDims];
  int64_t dilation[kWindowDims];
};

// A borrowed tensor [batch, channels, positions], strides in elements.
struct Batch {
  void* data;
  Element element;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t position_strides[kWindowDims];
};

struct SparseProduct {
  SparseMatrix weight;
  Window window;
  Batch x;
  Batch y;
  const void* bias;  // double for float64 weights, else float; or null
  int64_t batch;
};

// Input packing. A strided kernel sees the padded input split into phases, one for each remainder
// of its offsets modulo the stride, so that neighbouring outputs always read neighbouring inputs.
struct PackedLayout {
  std::vector<int64_t> phases[kWindowDims];  // remainders in use
  int64_t reach[kWindowDims]{};              // further inputs of a phase than outputs
  int64_t extent[kWindowDims];               // size of a phase, of one task
  int64_t plane;                             // elements of one phase
  int64_t channel_size;                      // elements of a channel
  std::vector<int32_t> offsets;  // [row_size], of a column from the group's first channel
};

// A product cut into independent tasks: some examples, a band of their positions, some rows. Each
// output is computed by one task, in an order of additions that depends on its row alone.
struct SparsePlan {
  SparseProduct product;
  bool single;       // one position, hardly an example: rows in the lanes
  bool linear;       // one position: columns are channels
  int64_t together;  // examples of a task: side by side in the lanes, or one
  int64_t band_dim;  // the dimension that is cut into bands
  int64_t band;      // positions of a band in it
  int64_t bands;
  int64_t example_groups;
  int64_t row_groups;
  int64_t chunks_per_group;  // of rows
  PackedLayout packed;

  SparsePlan(const SparseProduct& product, int threads);
  int64_t tasks() const;
  int64_t scratch_bytes() const;  // that `run` needs, 64-byte aligned
  void run(int64_t task, void* scratch) const;
};

}  // namespace confprune
