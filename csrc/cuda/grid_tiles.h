// What the kernels of the masked product share: the tile of a block, its panels in shared memory,
// and what follows the sums.
//
// A block makes the outputs of some rows of the weight for some tokens at some levels. Its operands
// come through shared memory in panels: for every row a few inputs, 16 bytes a chunk, copied
// asynchronously some stages ahead of their use.
#pragma once

#include "cuda/device.h"
#include "cuda/grid_linear.h"

namespace confprune::cuda::grid {

constexpr int kThreads = 256;
constexpr int kStages = 3;
constexpr int kChunkBytes = 16;

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How a product is cut into tiles, one a block.
struct Tiling {
  int64_t rows, tokens, levels;  // of a tile
  int64_t row_tiles, token_tiles, level_tiles;

  int64_t blocks() const { return row_tiles * token_tiles * level_tiles; }
};

inline Tiling tiling(const GridLinear& product, int64_t rows, int64_t tokens, int64_t levels) {
  return {rows,
          tokens,
          levels,
          ceil_div(product.outputs, rows),
          ceil_div(product.batch, tokens),
          ceil_div(product.num_levels, levels)};
}

// Where a tile begins.
struct Tile {
  int64_t row, token, level;
};

// Blocks run in about the order of their numbers. Those that run together shall share rows and
// tokens, which the L2 cache then holds: up to eight tiles of rows, then the next tokens.
inline __device__ Tile tile_of(const Tiling& tiling, unsigned block) {
  constexpr unsigned kTogether = 8;
  const unsigned columns = unsigned(tiling.token_tiles * tiling.level_tiles);
  const unsigned first = block / (kTogether * columns) * kTogether;
  const unsigned place = block % (kTogether * columns);
  const unsigned left = unsigned(tiling.row_tiles) - first;
  const unsigned together = left < kTogether ? left : kTogether;
  const unsigned column = place / together, token_tiles = unsigned(tiling.token_tiles);
  return {tiling.rows * (first + place % together), tiling.tokens * (column % token_tiles),
          tiling.levels * (column / token_tiles)};
}

// Where a chunk lies in a panel of rows of kChunks chunks, in chunks. Turned so that eight lanes
// that take the same chunk of eight rows, or all chunks of adjacent rows, meet different banks.
template <int kChunks>
__device__ int place_of(int row, int chunk) {
  return row * kChunks + (chunk ^ (row * kChunks / 8 % kChunks));
}

// One operand's panels: kRows rows of kBytes bytes, copied by all threads of the block.
template <class T, int kRows, int kBytes>
class Panels {
 public:
  static constexpr int kSize = kRows * kBytes;

  // `find(row)` is where the inputs of a row begin, or null where the row is not used.
  template <class Find>
  __device__ explicit Panels(Find find) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = copy_of(i) / kChunks;
      rows_[i] = row < kRows ? find(row) : nullptr;
    }
  }

  // Begins to copy the inputs from `first` on; zeros stand for those from `inputs` on. Rows that
  // are not `aligned` to chunks are copied at once, number by number.
  __device__ void copy(unsigned char* panel, int64_t first, int64_t inputs, bool aligned) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (rows_[i] == nullptr)
        continue;
      const int row = copy_of(i) / kChunks, chunk = copy_of(i) % kChunks;
      unsigned char* to = panel + kChunkBytes * place_of<kChunks>(row, chunk);
      const int64_t at = first + chunk * kNumbers;
      if (aligned)
        copy_async_or_zero(to, rows_[i] + (at < inputs ? at : 0), at < inputs);
      else
        copy_numbers(reinterpret_cast<T*>(to), rows_[i] + at, inputs - at);
    }
  }

 private:
  static constexpr int kChunks = kBytes / kChunkBytes;
  static constexpr int kNumbers = kChunkBytes / int(sizeof(T));
  static constexpr int kCopies = (kRows * kChunks + kThreads - 1) / kThreads;

  static __device__ int copy_of(int i) { return int(threadIdx.x) + i * kThreads; }

  static __device__ void copy_numbers(T* to, const T* from, int64_t left) {
#pragma unroll 1
    for (int i = 0; i < kNumbers; ++i)
      to[i] = i < left ? from[i] : T{};
  }

  const T* rows_[kCopies];
};

// Runs `copy(step, stage)` kStages - 1 steps ahead of `multiply(stage)`.
template <class Copy, class Multiply>
__device__ void pipeline(int64_t steps, Copy copy, Multiply multiply) {
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps)
      copy(step, step);
    copy_async_commit();
  }
  int stage = 0;
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    // The stage that all threads have just left.
    if (step + kStages - 1 < steps)
      copy(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    copy_async_commit();
    multiply(stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

template <class Real>
__device__ Real number_at(const void* numbers, Element element, int64_t index) {
  switch (element) {
    case Element::float64:
      return Real(static_cast<const double*>(numbers)[index]);
    case Element::float16:
      return Real(widen(static_cast<const Half*>(numbers)[index]));
    case Element::bfloat16:
      return Real(widen(static_cast<const BFloat16*>(numbers)[index]));
    default:
      return Real(static_cast<const float*>(numbers)[index]);
  }
}

// The steps that follow the sums of kRows adjacent rows.
template <class Real, int kRows>
class Follow {
 public:
  __device__ Follow(const GridLinear& product, int64_t row) : relu_(product.relu) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool inside = row + i < product.outputs;
      scale_[i] = product.scale != nullptr && inside
                      ? number_at<Real>(product.scale, product.follow, row + i)
                      : Real(1);
      bias_[i] = product.bias != nullptr && inside
                     ? number_at<Real>(product.bias, product.follow, row + i)
                     : Real(0);
    }
  }

  __device__ Real operator()(int i, Real sum) const {
    const Real value = scale_[i] * sum + bias_[i];
    return relu_ && value < 0 ? Real(0) : value;  // NaN stays
  }

 private:
  Real scale_[kRows], bias_[kRows];
  bool relu_;
};

// Writes the outputs of kRows adjacent rows, of which `left` are inside; in chunks if `aligned`.
template <class T, int kRows>
__device__ void store(T* y, const T (&values)[kRows], int64_t left, bool aligned) {
  struct alignas(sizeof(T) * kRows < kChunkBytes ? sizeof(T) * kRows : kChunkBytes) Row {
    T values[kRows];
  };
  if (aligned && left >= kRows) {
    Row row;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      row.values[i] = values[i];
    *reinterpret_cast<Row*>(y) = row;
    return;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (i < left)
      y[i] = values[i];
}

}  // namespace confprune::cuda::grid
