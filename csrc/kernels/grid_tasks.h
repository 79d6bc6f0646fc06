// A planned product, as all instruction sets run it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/grid_product.h"

namespace confprune {

// Input packing. Strided kernels see the padded input split into phases, one for each remainder of
// the kernel's offsets modulo the stride, so that neighbouring outputs always read neighbouring
// inputs.
struct PackedInput {
  int64_t chunk;                          // examples packed together
  std::vector<int64_t> phases[kSpatial];  // remainders in use, per dimension
  int64_t band;                           // output lines for which inputs are packed together
  int64_t extent[kSpatial];               // size of one phase plane
  int64_t plane;                          // elements of one phase plane, and a gap
  int64_t channel_size;                   // elements of one channel: all its phase planes
  std::vector<int32_t> offsets;           // [row_size] of a weight, from its group's first channel
  int64_t stride;                         // from offset to offset where that is the same, or 0
};

// Which levels are computed by minimal filtering, and its tiles of the output.
struct Winograd {
  int stride;                   // 1 or 2
  int64_t tiles[2];             // down and across
  std::vector<uint8_t> levels;  // [K], empty where none is
};

struct GridDetails {
  GridProduct product;
  PackedInput packed;
  Winograd winograd;
  bool in_place;  // x needs no packing
  bool leaves_residual;
  int64_t bands;        // of the output lines
  int64_t parts;        // chunks of the batch, times bands
  int64_t part_groups;  // tasks along the parts
  int64_t row_tile;     // rows of one task
  int64_t row_groups;   // tasks along the rows
  int64_t lanes;        // lanes of one tile
};

// Linear layers, each of which takes the outputs of the one before.
struct MlpDetails {
  std::vector<GridDetails> layers;
  int64_t parts;    // chunks of the batch
  int64_t widest;   // rows of a layer after the first
  int64_t between;  // rows of a layer between the first and the last
  int64_t group;    // levels of the first layer's outputs that are held together
};

constexpr int64_t kConvolutionChunk = 16;  // examples of a convolution that are packed together
constexpr int64_t kSharedRows = 16;        // rows whose K outputs are held while an input is shared

// Minimal filtering; what is held must leave room in the second-level cache.
constexpr int kOutputSide = 4;  // of the largest tile of outputs
constexpr int kWeightSide = 6;  // of the points at which weights are taken
constexpr int64_t kWeightPoints = kWeightSide * kWeightSide;
constexpr int64_t kPointGap = 16;  // elements that keep the points out of each other's cache lines
constexpr int64_t kFilteredTiles = 2;  // tiles that are held transformed
constexpr int64_t kFilteredRows = 16;  // rows whose products are held, a multiple of kDenseRows

namespace {  // internal linkage: each instruction set compiles its own copy

// The points of a tile at stride S, as many as its inputs. The first kLead share a weight: all odd
// inputs meet the middle one.
template <int S>
struct Filter {
  static constexpr int kLead = S == 1 ? 1 : kOutputSide;
  static constexpr int kSide = kLead + kWeightSide - 1;
  static_assert(kSide == (kOutputSide - 1) * S + 3);
  static constexpr int64_t kPoints = kSide * kSide;
  static constexpr int64_t kRoom = kPoints | 1;  // odd, so that a point's vectors share few sets

  // The points [first, end) of a weight, in a dimension of so many outputs: each odd input is for
  // one output, the last point for the fourth.
  static constexpr int first(int weight) { return weight == 0 ? 0 : kLead + weight - 1; }
  static constexpr int end(int weight, int outputs) {
    if (weight == 0)
      return kLead < outputs ? kLead : outputs;
    return first(weight) + (weight + 1 < kWeightSide || outputs == kOutputSide);
  }
};

// The first of `size` outputs that a tile has, in one dimension.
inline int64_t tile_start(int64_t size, int64_t tiles, int64_t tile) {
  return size * tile / tiles;
}

}  // namespace

}  // namespace confprune
