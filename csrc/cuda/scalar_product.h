// The masked product of float and double, in full precision on the ordinary cores.
//
// A block makes 128 rows by 128 columns (64 of double), a column being a token at a level; a thread
// eight rows by eight (four) columns of one level, so that a weight is masked once and multiplied
// eight (four) times. Limit: the rate of multiply-adds; beside each of them stand a quarter (half)
// of another instruction for the mask.
#pragma once

#include "cuda/grid_tiles.h"

namespace confprune::cuda::grid {

struct ScalarTiling {
  Tiling tiling;
  bool aligned;  // rows of the operands, to chunks
  bool aligned_y;
};

template <class Real>
struct ScalarShape {
  static constexpr int kDepth = 16;   // inputs of a panel
  static constexpr int kAcross = 16;  // threads over the rows, and over the columns
  static constexpr int kLaneRows = 8;
  static constexpr int kLaneColumns = sizeof(Real) == 8 ? 4 : 8;
  static constexpr int kRows = kAcross * kLaneRows;
  static constexpr int kColumns = kAcross * kLaneColumns;
  static constexpr int kRowBytes = kDepth * int(sizeof(Real));
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kNumbers = kDepth / kChunks;  // of a chunk
  static constexpr int kWeightBytes = kRows * kRowBytes;
  static constexpr int kLevelBytes = kRows * kDepth;
  static constexpr int kPanelBytes = kWeightBytes + kLevelBytes + kColumns * kRowBytes;
};

// A chunk of weights, or of x, and the prune levels of a chunk.
template <class Real>
struct alignas(kChunkBytes) Chunk {
  Real numbers[ScalarShape<Real>::kNumbers];
};
template <class Real>
struct alignas(ScalarShape<Real>::kNumbers) ChunkLevels {
  uint8_t levels[ScalarShape<Real>::kNumbers];
};

// Adds the products of one panel, input by input.
template <class Real, class Shape = ScalarShape<Real>>
__device__ void multiply_panel(const unsigned char* panel, int row, int column, int cut,
                               Real (&sums)[Shape::kLaneRows][Shape::kLaneColumns]) {
  const auto* weights = reinterpret_cast<const Chunk<Real>*>(panel);
  const auto* levels = reinterpret_cast<const ChunkLevels<Real>*>(panel + Shape::kWeightBytes);
  const auto* x =
      reinterpret_cast<const Chunk<Real>*>(panel + Shape::kWeightBytes + Shape::kLevelBytes);
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    Chunk<Real> masked[Shape::kLaneRows];
#pragma unroll
    for (int i = 0; i < Shape::kLaneRows; ++i) {
      const int place = i * Shape::kAcross + row;
      masked[i] = weights[place_of<Shape::kChunks>(place, c)];
      const ChunkLevels<Real> ranks = levels[place * Shape::kChunks + c];
#pragma unroll
      for (int v = 0; v < Shape::kNumbers; ++v)
        masked[i].numbers[v] = int(ranks.levels[v]) > cut ? masked[i].numbers[v] : Real(0);
    }
#pragma unroll
    for (int j = 0; j < Shape::kLaneColumns; ++j) {
      const Chunk<Real> inputs = x[place_of<Shape::kChunks>(j * Shape::kAcross + column, c)];
#pragma unroll
      for (int v = 0; v < Shape::kNumbers; ++v)
#pragma unroll
        for (int i = 0; i < Shape::kLaneRows; ++i)
          sums[i][j] += masked[i].numbers[v] * inputs.numbers[v];
    }
  }
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    scalar_product(GridLinear product, ScalarTiling shape) {
  using Shape = ScalarShape<Real>;
  const Tile tile = tile_of(shape.tiling, blockIdx.x);
  // Threads of a panel's adjacent rows read places next to each other, and make outputs that are
  // kLaneRows apart; columns alike.
  const auto row_of = [=](int place) {
    const int64_t found =
        tile.row + place % Shape::kAcross * Shape::kLaneRows + place / Shape::kAcross;
    return found < product.outputs ? found : product.outputs - 1;  // computed and not stored
  };
  const auto weights = panels<Real, Shape::kRows, Shape::kRowBytes>(
      product.weight, [=](int place) { return row_of(place) * product.weight_stride; },
      shape.aligned);
  const auto levels = panels<uint8_t, Shape::kRows, Shape::kDepth>(
      product.levels, [=](int place) { return row_of(place) * product.levels_stride; },
      shape.aligned);
  const auto x = panels<Real, Shape::kColumns, Shape::kRowBytes>(
      product.x,
      [=](int place) {
        const int64_t column =
            place % Shape::kAcross * Shape::kLaneColumns + place / Shape::kAcross;
        const int64_t level = tile.level + column / shape.tiling.tokens;
        const int64_t token = tile.token + column % shape.tiling.tokens;
        if (level >= product.num_levels)
          return int64_t(-1);
        return level * product.x_level_stride +
               (token < product.batch ? token : product.batch - 1) * product.x_stride;
      },
      shape.aligned);

  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
  const int row = lane / 8 + warp / 2 * 4, column = lane % 8 + warp % 2 * 8;
  const int64_t level = tile.level + column * Shape::kLaneColumns / shape.tiling.tokens;
  const int64_t token = tile.token + column * Shape::kLaneColumns % shape.tiling.tokens;
  const bool active = level < product.num_levels;
  const int64_t wanted = active ? product.level[level] : 255;
  const int cut = int(wanted < -1 ? -1 : wanted > 255 ? 255 : wanted);

  unsigned char* memory = dynamic_shared<unsigned char>();
  Real sums[Shape::kLaneRows][Shape::kLaneColumns] = {};
  const int inputs = int(product.inputs);
  pipeline(
      int(ceil_div(inputs, Shape::kDepth)),
      [&](int step, int stage) {
        unsigned char* panel = memory + stage * Shape::kPanelBytes;
        const int first = step * Shape::kDepth;
        weights.copy(panel, first, inputs);
        levels.copy(panel + Shape::kWeightBytes, first, inputs);
        x.copy(panel + Shape::kWeightBytes + Shape::kLevelBytes, first, inputs);
      },
      [&](int stage) {
        multiply_panel<Real>(memory + stage * Shape::kPanelBytes, row, column, cut, sums);
      });

  const int64_t output = tile.row + row * Shape::kLaneRows;
  if (!active || output >= product.outputs)
    return;
  const Follow<Real, Shape::kLaneRows> follow(product, output);
#pragma unroll
  for (int j = 0; j < Shape::kLaneColumns; ++j) {
    if (token + j >= product.batch)
      continue;
    Real values[Shape::kLaneRows];
#pragma unroll
    for (int i = 0; i < Shape::kLaneRows; ++i)
      values[i] = follow(i, sums[i][j]);
    Real* y = static_cast<Real*>(product.y) +
              (level * product.batch + token + j) * product.outputs + output;
    store(y, values, product.outputs - output, shape.aligned_y);
  }
}

}  // namespace confprune::cuda::grid
