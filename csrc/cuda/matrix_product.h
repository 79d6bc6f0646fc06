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
constexpr int kWarpsAcross = 4;   // over the columns of a block; two over its rows
constexpr int kColumns = kWarpColumns * kWarpsAcross;
constexpr int kGroups = kWarpColumns / 8;  // of the columns of one matrix instruction

// What the size of a block's tile fixes.
template <int kFragments>
struct MatrixTile {
  static constexpr int kWarpRows = 16 * kFragments;
  static constexpr int kRows = 2 * kWarpRows;
  static constexpr int kLaneRows = 2 * kFragments;  // adjacent rows of a lane
  using Layout = PanelLayout<uint16_t, kRows, kColumns, kDepth>;

  // The row of the weight that stands in a row of its panel: eight lanes read adjacent rows of the
  // panel for rows of the weight that are kLaneRows apart.
  static __device__ int weight_row(int row) {
    const int place = row % kWarpRows;
    return row - place + place / 8 + place % 8 * kLaneRows;
  }
};

// The columns of a block: those of a warp are kTokens tokens at kLevels levels, and warps stand
// side by side over the tokens of a tile, then over its levels. An x that all levels share comes to
// shared memory once.
template <int kLevels>
struct Columns {
  static constexpr int kTokens = kWarpColumns / kLevels;

  Tile tile;
  int token_warps;
  bool shared;

  __device__ Columns(const GridLinear& product, const Tiling& tiling, const Tile& tile)
      : tile(tile), token_warps(tiling.tokens / kTokens), shared(product.x_level_stride == 0) {}

  // Of a warp of the block.
  __device__ int64_t level(int warp) const { return tile.level + warp / token_warps * kLevels; }
  __device__ int64_t token(int warp) const { return tile.token + warp % token_warps * kTokens; }

  // Where the x of a warp begins, in columns of its panel.
  __device__ int first(int warp) const {
    return shared ? warp % token_warps * kTokens : warp * kWarpColumns;
  }

  // Where the x of a column of the panel begins, in numbers; -1 if there is none.
  __device__ int64_t x_of(const GridLinear& product, int column) const {
    const int warp = shared ? column / kTokens : column / kWarpColumns;
    const int inside = column % kWarpColumns;
    const int64_t at = shared ? 0 : level(warp) + inside / kTokens;
    const int64_t wanted = token(warp) + inside % kTokens;
    if (at >= product.num_levels || (shared && warp >= token_warps))
      return -1;
    return at * product.x_level_stride +
           (wanted < product.batch ? wanted : product.batch - 1) * product.x_stride;
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

// Where a lane reads in every panel: in pieces of 16 bytes, of prune levels in pieces of 8.
struct Places {
  int weights, levels, x;
  int x_level;  // from the x of a level to that of the next
};

template <int kFragments, int kLevels>
__device__ Places places_of(const Columns<kLevels>& columns, int row_warp, int column_warp) {
  const int g = int(threadIdx.x % kWarp) / 4, t = int(threadIdx.x % kWarp) % 4;
  const int row = row_warp * MatrixTile<kFragments>::kWarpRows + g;
  return {place_of<4>(row, t), 2 * place_of<2>(row, t / 2) + t % 2,
          place_of<4>(columns.first(column_warp) + g, t), columns.shared ? 0 : columns.kTokens * 4};
}

// Adds the products of one panel.
template <class T, int kFragments, int kLevels>
__device__ void multiply_panel(const unsigned char* panel, const Places& places,
                               const uint32_t (&cuts)[kLevels],
                               float (&sums)[kFragments][kGroups][4]) {
  using Layout = typename MatrixTile<kFragments>::Layout;
  constexpr int kLevelGroups = kGroups / kLevels;
  const uint4* weights = reinterpret_cast<const uint4*>(panel) + places.weights;
  const uint2* levels = reinterpret_cast<const uint2*>(panel + Layout::kLevels) + places.levels;
  const uint4* x = reinterpret_cast<const uint4*>(panel + Layout::kX) + places.x;

  uint32_t b[kGroups][2][2];
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const uint4 chunk = x[n / kLevelGroups * places.x_level + n % kLevelGroups * 8 * 4];
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
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int level = 0; level < kLevels; ++level) {
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
      const int column = n * 8 + 2 * t + side;
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

template <class T, int kFragments, int kLevels>
__global__ void __launch_bounds__(kThreads, 1)
    matrix_product(GridLinear product, Tiling tiling, Alignment aligned, int panels) {
  using Size = MatrixTile<kFragments>;
  const Tile tile = tile_of(tiling, blockIdx.x);
  const Columns<kLevels> columns(product, tiling, tile);
  const int row_warp = int(threadIdx.x / kWarp) % 2, column_warp = int(threadIdx.x / kWarp) / 2;
  const int64_t level = columns.level(column_warp), token = columns.token(column_warp);
  const bool active = level < product.num_levels && token < product.batch;
  uint32_t cuts[kLevels];
#pragma unroll
  for (int i = 0; i < kLevels; ++i)
    cuts[i] = cut_of(level + i < product.num_levels ? product.level[level + i] : 255);

  const auto sources = operands<T, Size::kRows, kColumns, kDepth>(
      product, aligned.operands, [=](int row) { return tile.row + Size::weight_row(row); },
      [=](int column) { return columns.x_of(product, column); });
  const Places places = places_of<kFragments>(columns, row_warp, column_warp);
  unsigned char* memory = dynamic_shared<unsigned char>();
  const int stage_bytes = panels * Size::Layout::kBytes;
  float sums[kFragments][kGroups][4] = {};
  pipeline(
      int(ceil_div(product.inputs, kDepth * panels)),
      [&](int step, int stage) {
#pragma unroll 1
        for (int i = 0; i < panels; ++i)
          sources.copy(memory + stage * stage_bytes + i * Size::Layout::kBytes,
                       (step * panels + i) * kDepth);
      },
      [&](int stage) {
#pragma unroll 1
        for (int i = 0; active && i < panels; ++i)
          multiply_panel<T>(memory + stage * stage_bytes + i * Size::Layout::kBytes, places, cuts,
                            sums);
      });
  if (active)
    store_sums<T, kFragments, kLevels>(product, tile.row + row_warp * Size::kWarpRows, level, token,
                                       aligned.y, sums);
}

}  // namespace confprune::cuda::grid
