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
  int64_t tiles[2];             // down and across
  int64_t step;                 // tiles that are held transformed
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

constexpr int kOutputSide = 4;          // of a tile of outputs, in minimal filtering
constexpr int kSide = kOutputSide + 2;  // of its inputs
constexpr int64_t kPoints = kSide * kSide;
constexpr int64_t kPointRoom = kPoints + 1;  // odd, so that a point's vectors share few sets
constexpr int64_t kPointGap = 16;  // elements that keep the points out of each other's cache lines
constexpr int64_t kFilteredRows = 32;  // rows whose products are held, a multiple of kDenseRows
constexpr int64_t kSharedRows = 16;    // rows whose K outputs are held while an input is shared

}  // namespace confprune
