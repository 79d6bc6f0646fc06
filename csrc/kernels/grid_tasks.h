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
  int64_t extent[kSpatial];               // size of one phase plane
  int64_t channel_size;                   // elements of one channel: all its phase planes
  std::vector<int32_t> offsets;           // [row_size] of a weight, from its group's first channel
};

// Which levels are computed by minimal filtering, and its 2 x 2 tiles of the output.
struct Winograd {
  int64_t tiles[2];
  int64_t step;                 // tiles of a row that are held transformed
  std::vector<uint8_t> levels;  // [K], empty where none is
};

struct GridDetails {
  GridProduct product;
  PackedInput packed;
  Winograd winograd;
  bool in_place;       // x needs no packing
  int64_t chunks;      // of the batch
  int64_t row_tile;    // rows of one task
  int64_t row_groups;  // tasks along the rows
  int64_t lanes;       // lanes of one tile
};

constexpr int64_t kPoints = 16;    // of a transformed tile
constexpr int64_t kPointGap = 16;  // elements that keep the points out of each other's cache lines
constexpr int64_t kSharedRows = 16;  // rows whose K outputs are held while an input is shared

}  // namespace confprune
