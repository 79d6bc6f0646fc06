// The masked product of float and double, in full precision on the ordinary cores.
//
// A block makes 128 rows by 128 columns (64 of double), a column being a token at a level; a thread
// eight rows by eight (four) columns of one level, so that a weight is masked once and multiplied
// eight (four) times. Limit: the rate of multiply-adds; for the mask there are three
// more instructions to eight (four) of them.
#pragma once

#include "cuda/grid_tiles.h"

namespace confprune::cuda::grid {

template <class Real>
struct ScalarTile {
  static constexpr int kDepth = 16;   // inputs of a panel
  static constexpr int kAcross = 16;  // threads over the rows, and over the columns
  static constexpr int kLaneRows = 8;
  static constexpr int kLaneColumns = sizeof(Real) == 8 ? 4 : 8;
  static constexpr int kRows = kAcross * kLaneRows;
  static constexpr int kColumns = kAcross * kLaneColumns;
  static constexpr int kNumbers = kChunkBytes / int(sizeof(Real));  // of a chunk
  static constexpr int kChunks = kDepth / kNumbers;
  using Layout = PanelLayout<Real, kRows, kColumns, kDepth>;

  // The row of the weight that stands in a row of its panel: threads side by side read adjacent
  // rows of the panel for rows of the weight that are kLaneRows apart. Columns alike.
  static __device__ int weight_row(int row) { return row % kAcross * kLaneRows + row / kAcross; }
  static __device__ int column(int place) {
    return place % kAcross * kLaneColumns + place / kAcross;
  }
};

// A chunk of weights, or of x, and the prune levels of a chunk.
template <class Real>
struct alignas(kChunkBytes) Chunk {
  Real numbers[ScalarTile<Real>::kNumbers];
};
template <class Real>
struct alignas(ScalarTile<Real>::kNumbers) ChunkLevels {
  uint8_t levels[ScalarTile<Real>::kNumbers];
};

// Adds the products of one panel, input by input.
template <class Real, class Size = ScalarTile<Real>>
__device__ void multiply_panel(const unsigned char* panel, int row, int column, int cut,
                               Real (&sums)[Size::kLaneRows][Size::kLaneColumns]) {
  const auto* weights = reinterpret_cast<const Chunk<Real>*>(panel);
  const auto* levels = reinterpret_cast<const ChunkLevels<Real>*>(panel + Size::Layout::kLevels);
  const auto* x = reinterpret_cast<const Chunk<Real>*>(panel + Size::Layout::kX);
#pragma unroll
  for (int c = 0; c < Size::kChunks; ++c) {
    Chunk<Real> masked[Size::kLaneRows];
#pragma unroll
    for (int i = 0; i < Size::kLaneRows; ++i) {
      const int place = i * Size::kAcross + row;
      masked[i] = weights[place_of<Size::kChunks>(place, c)];
      const ChunkLevels<Real> ranks = levels[place * Size::kChunks + c];
#pragma unroll
      for (int v = 0; v < Size::kNumbers; ++v)
        masked[i].numbers[v] = int(ranks.levels[v]) > cut ? masked[i].numbers[v] : Real(0);
    }
#pragma unroll
    for (int j = 0; j < Size::kLaneColumns; ++j) {
      const Chunk<Real> inputs = x[place_of<Size::kChunks>(j * Size::kAcross + column, c)];
#pragma unroll
      for (int v = 0; v < Size::kNumbers; ++v)
#pragma unroll
        for (int i = 0; i < Size::kLaneRows; ++i)
          sums[i][j] += masked[i].numbers[v] * inputs.numbers[v];
    }
  }
}

// Where the x of a column of the panel begins, in numbers; -1 if there is none.
template <class Real>
__device__ int64_t x_of(const GridLinear& product, const Tiling& tiling, const Tile& tile,
                        int place) {
  const int column = ScalarTile<Real>::column(place);
  const int64_t level = tile.level + column / tiling.tokens;
  const int64_t token = tile.token + column % tiling.tokens;
  if (level >= product.num_levels)
    return -1;
  return level * product.x_level_stride +
         (token < product.batch ? token : product.batch - 1) * product.x_stride;
}

// Writes a thread's outputs.
template <class Real, class Size = ScalarTile<Real>>
__device__ void store_sums(const GridLinear& product, int64_t row, int64_t level, int64_t token,
                           bool aligned, const Real (&sums)[Size::kLaneRows][Size::kLaneColumns]) {
  if (level >= product.num_levels || row >= product.outputs)
    return;
  const Follow<Real, Size::kLaneRows> follow(product, row);
#pragma unroll
  for (int j = 0; j < Size::kLaneColumns; ++j) {
    if (token + j >= product.batch)
      continue;
    Real values[Size::kLaneRows];
#pragma unroll
    for (int i = 0; i < Size::kLaneRows; ++i)
      values[i] = follow(i, sums[i][j]);
    Real* y =
        static_cast<Real*>(product.y) + (level * product.batch + token + j) * product.outputs + row;
    store(y, values, product.outputs - row, aligned);
  }
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    scalar_product(GridLinear product, Tiling tiling, Alignment aligned) {
  using Size = ScalarTile<Real>;
  const Tile tile = tile_of(tiling, blockIdx.x);
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
  const int row = lane / 8 + warp / 2 * 4, column = lane % 8 + warp % 2 * 8;
  const int64_t level = tile.level + column * Size::kLaneColumns / tiling.tokens;
  const int64_t token = tile.token + column * Size::kLaneColumns % tiling.tokens;
  const int64_t wanted = level < product.num_levels ? product.level[level] : 255;
  const int cut = int(wanted < -1 ? -1 : wanted > 255 ? 255 : wanted);

  const auto sources = operands<Real, Size::kRows, Size::kColumns, Size::kDepth>(
      product, aligned.operands, [=](int place) { return tile.row + Size::weight_row(place); },
      [=](int place) { return x_of<Real>(product, tiling, tile, place); });
  unsigned char* memory = dynamic_shared<unsigned char>();
  Real sums[Size::kLaneRows][Size::kLaneColumns] = {};
  pipeline(
      int(ceil_div(product.inputs, Size::kDepth)),
      [&](int step, int stage) {
        sources.copy(memory + stage * Size::Layout::kBytes, step * Size::kDepth);
      },
      [&](int stage) {
        multiply_panel<Real>(memory + stage * Size::Layout::kBytes, row, column, cut, sums);
      });
  store_sums<Real>(product, tile.row + row * Size::kLaneRows, level, token, aligned.y, sums);
}

}  // namespace confprune::cuda::grid
