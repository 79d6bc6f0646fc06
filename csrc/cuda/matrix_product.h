// The masked product of 16-bit numbers, by the matrix instruction.
//
// A block of eight warps makes 32 kFragments rows by 256 columns, a column being a token at a
// level; a warp 16 kFragments rows by 64 columns, of kLevels levels. The weights and their prune
// levels come to shared memory once a tile, and are masked in registers for every level.
//
// Cost of a level, for 16 x 16 weights: four comparisons, four ands, and one matrix instruction for
// every eight tokens. Limit: the rate of the matrix instruction where a level has many tokens,
// that of the ordinary instructions beside it where it has few.
//
// The matrix instruction wants the weights of a lane apart, but any order of the inputs and of the
// rows will do that all operands share. So a lane takes eight adjacent inputs, 16 bytes, for two
// instructions; and its rows are adjacent outputs, that leave the registers as 16 bytes a token.
#pragma once

#include "cuda/grid_tiles.h"
#include "cuda/matrix.h"

namespace confprune::cuda::grid {

constexpr int kDepth = 32;        // inputs of a panel
constexpr int kWarpColumns = 64;  // of a warp
constexpr int kColumnGroup = 8;   // of a matrix instruction
constexpr int kGroups = kWarpColumns / kColumnGroup;
constexpr int kWarpsAcross = 4;  // over the columns of a block; two over its rows
constexpr int kColumns = kWarpColumns * kWarpsAcross;

// The block: its tiling, and how its warps stand.
struct MatrixTiling {
  Tiling tiling;
  int token_warps;  // side by side over the tokens of the same levels
  int panels;       // that are copied at once
  bool aligned;     // rows of the operands, to chunks
  bool aligned_y;
};

template <int kFragments>
struct MatrixShape {
  static constexpr int kWarpRows = 16 * kFragments;
  static constexpr int kRows = 2 * kWarpRows;
  static constexpr int kLaneRows = 2 * kFragments;  // adjacent rows of a lane
  static constexpr int kWeightBytes = kRows * kDepth * 2;
  static constexpr int kLevelBytes = kRows * kDepth;
  static constexpr int kPanelBytes = kWeightBytes + kLevelBytes + kColumns * kDepth * 2;

  // The row of the weight that stands in a row of its panel: eight lanes read adjacent rows of the
  // panel for rows of the weight that are kLaneRows apart.
  static __device__ int weight_row(int row) {
    const int place = row % kWarpRows;
    return row - place + place / 8 + place % 8 * kLaneRows;
  }
};

// A level as the bits of a half float, twice, for comparison with `spread` prune levels. Below them
// all where the level is negative.
inline __device__ uint32_t cut_of(int64_t level) {
  const uint32_t half = level < 0 ? 0u : 0x4000u | unsigned(level < 255 ? level : 255);
  return half << 16 | half;
}

// Two of the four prune levels of a word, each as the low byte of a half float from 2 to 3.
template <int kPair>
__device__ uint32_t spread(uint32_t levels) {
  return __byte_perm(levels, 0x40404040u, kPair == 0 ? 0x4140 : 0x4342);
}

// What a lane reads of a panel, in chunks: its places do not change from panel to panel.
struct Reader {
  int weights, levels, x;
  int x_level;  // from the x of a level to that of the next

  template <int kFragments, int kLevels>
  static __device__ Reader make(const GridLinear& product, const MatrixTiling& shape) {
    constexpr int kTokens = kWarpColumns / kLevels;
    const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
    const int g = lane / 4, t = lane % 4, column_warp = warp / 2;
    const int row = warp % 2 * MatrixShape<kFragments>::kWarpRows + g;
    const bool shared = product.x_level_stride == 0;
    const int column =
        (shared ? column_warp % shape.token_warps * kTokens : column_warp * kWarpColumns) + g;
    return {place_of<4>(row, t), 2 * place_of<2>(row, t / 2) + t % 2, place_of<4>(column, t),
            shared ? 0 : kTokens * 4};
  }
};

// Adds the products of one panel.
template <class T, int kFragments, int kLevels>
__device__ void multiply_panel(const unsigned char* panel, const Reader& reader,
                               const uint32_t (&cuts)[kLevels],
                               float (&sums)[kFragments][kGroups][4]) {
  using Shape = MatrixShape<kFragments>;
  constexpr int kLevelGroups = kGroups / kLevels;
  const uint4* weights = reinterpret_cast<const uint4*>(panel) + reader.weights;
  const uint2* levels = reinterpret_cast<const uint2*>(panel + Shape::kWeightBytes) + reader.levels;
  const uint4* x =
      reinterpret_cast<const uint4*>(panel + Shape::kWeightBytes + Shape::kLevelBytes) + reader.x;

  uint32_t b[kGroups][2][2];
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const uint4 chunk = x[n / kLevelGroups * reader.x_level + n % kLevelGroups * kColumnGroup * 4];
    b[n][0][0] = chunk.x, b[n][0][1] = chunk.y, b[n][1][0] = chunk.z, b[n][1][1] = chunk.w;
  }
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
    const uint4 upper = weights[2 * i * 8 * 4], lower = weights[(2 * i + 1) * 8 * 4];
    const uint2 over = levels[2 * i * 8 * 4], under = levels[(2 * i + 1) * 8 * 4];
    const uint32_t a[2][4] = {{upper.x, lower.x, upper.y, lower.y},
                              {upper.z, lower.z, upper.w, lower.w}};
    const uint32_t ranks[2][4] = {
        {spread<0>(over.x), spread<0>(under.x), spread<1>(over.x), spread<1>(under.x)},
        {spread<0>(over.y), spread<0>(under.y), spread<1>(over.y), spread<1>(under.y)}};
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t masked[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          masked[r] = a[half][r] & greater(ranks[half][r], cuts[level]);
#pragma unroll
        for (int n = level * kLevelGroups; n < (level + 1) * kLevelGroups; ++n)
          multiply<T>(sums[i][n], masked, b[n][half]);
      }
    }
  }
}

// Writes a warp's outputs, of its columns from `level` and `token` on.
template <class T, int kFragments, int kLevels>
__device__ void store_sums(const GridLinear& product, int64_t row, int64_t level, int64_t token,
                           bool aligned, const float (&sums)[kFragments][kGroups][4]) {
  constexpr int kLaneRows = 2 * kFragments, kTokens = kWarpColumns / kLevels;
  const int g = int(threadIdx.x % kWarp) / 4, t = int(threadIdx.x % kWarp) % 4;
  row += g * kLaneRows;
  if (row >= product.outputs)
    return;
  const Follow<float, kLaneRows> follow(product, row);
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int column = n * kColumnGroup + 2 * t + side;
      const int64_t k = level + column / kTokens, at = token + column % kTokens;
      if (k >= product.num_levels || at >= product.batch)
        continue;
      union {
        uint32_t pairs[kFragments];
        T values[kLaneRows];
      } packed;
#pragma unroll
      for (int i = 0; i < kFragments; ++i)
        packed.pairs[i] =
            pack<T>(follow(2 * i, sums[i][n][side]), follow(2 * i + 1, sums[i][n][2 + side]));
      T* y = static_cast<T*>(product.y) + (k * product.batch + at) * product.outputs + row;
      store(y, packed.values, product.outputs - row, aligned);
    }
  }
}

// Where the x of a column begins; -1 if it is not used. A shared x stands once for all levels.
template <int kLevels>
__device__ int64_t x_offset(const GridLinear& product, const MatrixTiling& shape, const Tile& tile,
                            int column) {
  constexpr int kTokens = kWarpColumns / kLevels;
  const int warp = column / kWarpColumns, inside = column % kWarpColumns;
  int64_t level = tile.level + warp / shape.token_warps * kLevels + inside / kTokens;
  int64_t token = tile.token + warp % shape.token_warps * kTokens + inside % kTokens;
  if (product.x_level_stride == 0) {
    level = column < shape.tiling.tokens ? 0 : product.num_levels;
    token = tile.token + column;
  }
  if (level >= product.num_levels)
    return -1;
  return level * product.x_level_stride +
         (token < product.batch ? token : product.batch - 1) * product.x_stride;
}

template <class T, int kFragments, int kLevels>
__global__ void __launch_bounds__(kThreads, 1)
    matrix_product(GridLinear product, MatrixTiling shape) {
  using Shape = MatrixShape<kFragments>;
  constexpr int kTokens = kWarpColumns / kLevels;
  const Tile tile = tile_of(shape.tiling, blockIdx.x);
  const auto row_of = [=](int row) {
    const int64_t found = tile.row + Shape::weight_row(row);
    return found < product.outputs ? found : product.outputs - 1;  // computed and not stored
  };
  const auto weights = panels<T, Shape::kRows, kDepth * 2>(
      product.weight, [=](int row) { return row_of(row) * product.weight_stride; }, shape.aligned);
  const auto levels = panels<uint8_t, Shape::kRows, kDepth>(
      product.levels, [=](int row) { return row_of(row) * product.levels_stride; }, shape.aligned);
  const auto x = panels<T, kColumns, kDepth * 2>(
      product.x, [=](int column) { return x_offset<kLevels>(product, shape, tile, column); },
      shape.aligned);

  const int warp = int(threadIdx.x / kWarp);
  const int64_t level = tile.level + warp / 2 / shape.token_warps * kLevels;
  const int64_t token = tile.token + warp / 2 % shape.token_warps * kTokens;
  const bool active = level < product.num_levels && token < product.batch;
  uint32_t cuts[kLevels];
#pragma unroll
  for (int i = 0; i < kLevels; ++i)
    cuts[i] = cut_of(level + i < product.num_levels ? product.level[level + i] : 255);

  unsigned char* memory = dynamic_shared<unsigned char>();
  const Reader reader = Reader::make<kFragments, kLevels>(product, shape);
  float sums[kFragments][kGroups][4] = {};
  const int inputs = int(product.inputs);
  pipeline(
      int(ceil_div(inputs, kDepth * shape.panels)),
      [&](int step, int stage) {
#pragma unroll 1
        for (int i = 0; i < shape.panels; ++i) {
          unsigned char* panel = memory + (stage * shape.panels + i) * Shape::kPanelBytes;
          const int first = (step * shape.panels + i) * kDepth;
          weights.copy(panel, first, inputs);
          levels.copy(panel + Shape::kWeightBytes, first, inputs);
          x.copy(panel + Shape::kWeightBytes + Shape::kLevelBytes, first, inputs);
        }
      },
      [&](int stage) {
#pragma unroll 1
        for (int i = 0; active && i < shape.panels; ++i)
          multiply_panel<T, kFragments, kLevels>(
              memory + (stage * shape.panels + i) * Shape::kPanelBytes, reader, cuts, sums);
      });
  if (active)
    store_sums<T, kFragments, kLevels>(product, tile.row + warp % 2 * Shape::kWarpRows, level,
                                       token, shape.aligned_y, sums);
}

}  // namespace confprune::cuda::grid
