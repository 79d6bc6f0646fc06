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
// `offset_of(row)` is where a row begins, in numbers, or negative where the row is not used.
template <class T, int kRows, int kBytes, class Offset>
class Panels {
 public:
  __device__ Panels(const T* operand, Offset offset_of, bool aligned)
      : operand_(operand), offset_of_(offset_of), aligned_(aligned) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t offset = row(i) < kRows ? offset_of(row(i)) : -1;
      chunks_[i] = offset < 0 ? kUnused : unsigned(offset / kNumbers);
    }
  }

  // Begins to copy the inputs from `first` on; zeros stand for those from `inputs` on. Rows that
  // are not aligned to chunks are copied at once, number by number.
  __device__ void copy(unsigned char* panel, int first, int inputs) const {
    if (!aligned_)
      return copy_numbers(panel, first, inputs);
    const int at = first + chunk() * kNumbers;
    const T* inside = operand_ + (at < inputs ? at : 0);
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      if (chunks_[i] != kUnused)
        copy_async_or_zero(panel + kChunkBytes * place_of<kChunks>(row(i), chunk()),
                           inside + int64_t(chunks_[i]) * kNumbers, at < inputs);
  }

 private:
  static constexpr int kChunks = kBytes / kChunkBytes;
  static constexpr int kNumbers = kChunkBytes / int(sizeof(T));
  static constexpr int kCopies = (kRows * kChunks + kThreads - 1) / kThreads;
  static constexpr unsigned kUnused = ~0u;
  static_assert(kThreads % kChunks == 0, "a thread's copies are of one chunk of different rows");

  static __device__ int chunk() { return int(threadIdx.x) % kChunks; }
  static __device__ int row(int i) { return (int(threadIdx.x) + i * kThreads) / kChunks; }

  __device__ void copy_numbers(unsigned char* panel, int first, int inputs) const {
    const int at = first + chunk() * kNumbers;
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int64_t offset = row(i) < kRows ? offset_of_(row(i)) : -1;
      if (offset < 0)
        continue;
      T* to = reinterpret_cast<T*>(panel + kChunkBytes * place_of<kChunks>(row(i), chunk()));
#pragma unroll 1
      for (int n = 0; n < kNumbers; ++n)
        to[n] = at + n < inputs ? operand_[offset + at + n] : T{};
    }
  }

  const T* operand_;
  Offset offset_of_;
  bool aligned_;
  unsigned chunks_[kCopies];  // where the rows begin, in chunks: half the registers of pointers
};

template <class T, int kRows, int kBytes, class Offset>
__device__ Panels<T, kRows, kBytes, Offset> panels(const void* operand, Offset offset_of,
                                                   bool aligned) {
  return {static_cast<const T*>(operand), offset_of, aligned};
}

// Runs `copy(step, stage)` kStages - 1 steps ahead of `multiply(stage)`.
template <class Copy, class Multiply>
__device__ void pipeline(int steps, Copy copy, Multiply multiply) {
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps)
      copy(step, step);
    copy_async_commit();
  }
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
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
