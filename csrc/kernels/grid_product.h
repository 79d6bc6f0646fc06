// The masked product of one layer at many levels, and the simple steps that follow a layer:
//
//   y[k] = max(floor, scale · conv(x[k], W ⊙ (levels > level[k])) + shift + residual[k])
//
// A linear layer is the convolution with one position. The batch stands in the vector lanes: inputs
// are packed as [channel, position, batch], so that a weight meets 16 or more examples (or
// neighbouring positions) with one multiply-add, whatever the sparsity pattern. Weights come as
// prefix rows.
//
// Shapes (positions are up to three-dimensional, unused dimensions have size 1):
//   x [1 or K, N, channels, input], y [K, N, rows, output], both with any strides.
// Operations: 2 · N · positions · Σ_k alive(level[k]); the limit is one vector load and one
// multiply-add per weight and vector. With one input for all levels (x[1, ...]) a suffix sum gives
// all K outputs for the operations of the densest.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/prefix_rows.h"

namespace confprune {

constexpr int kSpatial = 3;

struct Convolution {
  int64_t channels;  // of the input, all groups
  int64_t groups;
  int64_t input[kSpatial];
  int64_t output[kSpatial];
  int64_t kernel[kSpatial];
  int64_t stride[kSpatial];
  int64_t padding[kSpatial];
  int64_t dilation[kSpatial];
};

struct Activation {
  void* data;
  Element element;
  int64_t level_stride;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t position_strides[kSpatial];
};

struct GridProduct {
  PrefixRows rows;
  Convolution convolution;
  Activation x;
  Activation y;
  const void* scale;          // [rows] float, or double for float64 weights; null: 1
  const void* shift;          // the same; null: 0
  Activation residual;        // like y, or one for all levels; without data: 0
  bool relu;                  // whether the floor is 0
  const int64_t* levels;      // [K] grid levels, increasing
  int64_t num_levels;         // K
  int64_t batch;              // N
  bool shared;                // one x for all levels, and rows of one block: suffix sums
  bool wide;                  // compute in double
  std::atomic<bool>* finite;  // set to false where x holds infinity or NaN
};

// A product cut into independent tasks; each output element is computed in one task, in an order of
// additions that depends on its row and level alone.
class GridPlan {
 public:
  GridPlan(const GridProduct& product, int threads);
  ~GridPlan();
  GridPlan(const GridPlan&) = delete;
  GridPlan& operator=(const GridPlan&) = delete;

  int64_t tasks() const;
  int64_t scratch_bytes() const;  // that `run` needs, 64-byte aligned
  void run(int64_t task, void* scratch) const;
  // Whether the residual, and the ReLU after it, are left to the caller.
  bool leaves_residual() const;

 private:
  struct Details;
  Details* details_;
};

// Linear layers that follow each other, from one input for all levels; what is between them is
// neither written nor read, so that only the first has an x and the last a y. They compute in the
// type of both. The parts are independent of each other, and the outputs are to the last bit those
// of one layer at a time.
class MlpPlan {
 public:
  MlpPlan(const std::vector<GridProduct>& layers, int threads);
  ~MlpPlan();
  MlpPlan(const MlpPlan&) = delete;
  MlpPlan& operator=(const MlpPlan&) = delete;

  int64_t parts() const;
  int64_t scratch_bytes() const;  // that `run` needs, 64-byte aligned
  void run(int64_t part, void* scratch) const;

 private:
  struct Details;
  Details* details_;
};

}  // namespace confprune
