// What the kernels of the masked product share: the tile of a block, its panels in shared memory,
// and what follows the sums.
//
// A block makes the outputs of some rows of the weight for some tokens at some levels. Its operands
// come through shared memory in panels: for every row a few inputs, 16 bytes a chunk, copied
// asynchronously some stages ahead of their use.
#pragma once

#include "cuda/device.h"
#include "cuda/grid_linear.h"
#include "cuda/numbers.h"

namespace confprune::cuda::grid {

constexpr int kThreads = 256;
constexpr int kStages = 3;
constexpr int kChunkBytes = 16;

// How a product is cut into tiles, one a block.
struct Tiling {
  int rows, tokens, levels;  // of a tile
  int row_tiles, token_tiles, level_tiles;

  int64_t blocks() const { return int64_t(row_tiles) * token_tiles * level_tiles; }
};

inline Tiling tiling_of(const GridLinear& product, int rows, int tokens, int levels) {
  return {rows,
          tokens,
          levels,
          int(ceil_div(product.outputs, rows)),
          int(ceil_div(product.batch, tokens)),
          int(ceil_div(product.num_levels, levels))};
}

// What may be read and written in chunks.
struct Alignment {
  bool operands, y;
};

// Where a tile begins.
struct Tile {
  int64_t row, token, level;
};

// Blocks run in about the order of their numbers. Those that run together shall share rows and
// tokens, which the L2 cache then holds: up to eight tiles of rows, then the next tokens.
inline __device__ Tile tile_of(const Tiling& tiling, unsigned block) {
  constexpr unsigned kTogether = 8;
  const unsigned token_tiles = unsigned(tiling.token_tiles);
  const unsigned columns = token_tiles * unsigned(tiling.level_tiles);
  const unsigned first = block / (kTogether * columns) * kTogether;
  const unsigned place = block % (kTogether * columns);
  const unsigned left = unsigned(tiling.row_tiles) - first;
  const unsigned together = left < kTogether ? left : kTogether;
  const unsigned column = place / together;
  return {int64_t(tiling.rows) * (first + place % together),
          int64_t(tiling.tokens) * (column % token_tiles),
          int64_t(tiling.levels) * (column / token_tiles)};
}

// Where a chunk lies in a panel of rows of kChunks chunks, in chunks. Turned so that eight lanes
// that take the same chunk of eight rows, or all chunks of adjacent rows, meet different banks.
template <int kChunks>
__device__ int place_of(int row, int chunk) {
  return row * kChunks + (chunk ^ (row * kChunks / 8 % kChunks));
}

// A block's panels of one operand: kRows rows of kBytes bytes. `offset_of(row)` is where the inputs
// of a row begin, in numbers, or negative where the row is not used.
template <class T, int kRows, int kBytes>
class Panels {
 public:
  template <class Offset>
  __device__ explicit Panels(Offset offset_of) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t offset = row(i) < kRows ? offset_of(row(i)) : -1;
      chunks_[i] = offset < 0 ? kUnused : unsigned(offset / kNumbers);
    }
  }

  // Begins to copy the inputs from `first` on; zeros stand for those from `inputs` on. All rows are
  // aligned to chunks.
  __device__ void copy(unsigned char* panel, const T* operand, int first, int inputs) const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(operand);
    const unsigned at = unsigned(first) / kNumbers + unsigned(chunk());
    const bool inside = at * kNumbers < unsigned(inputs);
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      if (kRows * kChunks % kThreads == 0 || row(i) < kRows)
        copy_async_or_zero(place(panel, i), bytes + uint64_t(chunks_[i] + at) * kChunkBytes,
                           inside && chunks_[i] != kUnused);
  }

  // Copies any rows, number by number, at once.
  template <class Offset>
  static __device__ void copy_numbers(unsigned char* panel, const T* operand, int first, int inputs,
                                      Offset offset_of) {
    const int at = first + chunk() * kNumbers;
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int64_t offset = row(i) < kRows ? offset_of(row(i)) : -1;
      T* to = reinterpret_cast<T*>(place(panel, i));
#pragma unroll 1
      for (int n = 0; offset >= 0 && n < kNumbers; ++n)
        to[n] = at + n < inputs ? operand[offset + at + n] : T{};
    }
  }

 private:
  static constexpr int kChunks = kBytes / kChunkBytes;
  static constexpr int kNumbers = kChunkBytes / int(sizeof(T));
  static constexpr int kCopies = (kRows * kChunks + kThreads - 1) / kThreads;
  static constexpr unsigned kUnused = ~0u;
  static_assert(kThreads % (8 * kChunks) == 0, "a thread copies one chunk, of different rows");

  static __device__ int chunk() { return int(threadIdx.x) % kChunks; }
  static __device__ int row(int i) { return (int(threadIdx.x) + i * kThreads) / kChunks; }
  // Rows that are a multiple of eight apart are turned alike.
  static __device__ unsigned char* place(unsigned char* panel, int i) {
    return panel + kChunkBytes * (place_of<kChunks>(row(0), chunk()) + i * kThreads);
  }

  unsigned chunks_[kCopies];  // where the rows begin, in chunks: half the registers of pointers
};

// Where the operands lie in a panel of kDepth inputs: weights, prune levels, x.
template <class T, int kRows, int kColumns, int kDepth>
struct PanelLayout {
  static constexpr int kLevels = kRows * kDepth * int(sizeof(T));
  static constexpr int kX = kLevels + kRows * kDepth;
  static constexpr int kBytes = kX + kColumns * kDepth * int(sizeof(T));
};

// The operands of a block. `row_of(i)` is the row of the weight that stands in row i of its panel,
// `x_of(i)` is where the x of column i begins, negative where there is none.
template <class T, int kRows, int kColumns, int kDepth, class Row, class X>
class Operands {
 public:
  __device__ Operands(const GridLinear& product, bool aligned, Row row_of, X x_of)
      : product_(product),
        aligned_(aligned),
        row_of_(row_of),
        x_of_(x_of),
        weights_([this](int i) { return row(i) * product_.weight_stride; }),
        levels_([this](int i) { return row(i) * product_.levels_stride; }),
        x_(x_of) {}

  // Begins to copy the panel of the inputs from `first` on.
  __device__ void copy(unsigned char* panel, int first) const {
    using Layout = PanelLayout<T, kRows, kColumns, kDepth>;
    const T* weight = static_cast<const T*>(product_.weight);
    const T* x = static_cast<const T*>(product_.x);
    const int inputs = int(product_.inputs);
    if (aligned_) {
      weights_.copy(panel, weight, first, inputs);
      levels_.copy(panel + Layout::kLevels, product_.levels, first, inputs);
      x_.copy(panel + Layout::kX, x, first, inputs);
      return;
    }
    weights_.copy_numbers(panel, weight, first, inputs,
                          [this](int i) { return row(i) * product_.weight_stride; });
    levels_.copy_numbers(panel + Layout::kLevels, product_.levels, first, inputs,
                         [this](int i) { return row(i) * product_.levels_stride; });
    x_.copy_numbers(panel + Layout::kX, x, first, inputs, x_of_);
  }

 private:
  // Rows beyond the last are computed and not stored.
  __device__ int64_t row(int i) const {
    const int64_t found = row_of_(i);
    return found < product_.outputs ? found : product_.outputs - 1;
  }

  static constexpr int kRowBytes = kDepth * int(sizeof(T));

  GridLinear product_;
  bool aligned_;
  Row row_of_;
  X x_of_;
  Panels<T, kRows, kRowBytes> weights_;
  Panels<uint8_t, kRows, kDepth> levels_;
  Panels<T, kColumns, kRowBytes> x_;
};

template <class T, int kRows, int kColumns, int kDepth, class Row, class X>
__device__ Operands<T, kRows, kColumns, kDepth, Row, X> operands(const GridLinear& product,
                                                                 bool aligned, Row row_of, X x_of) {
  return {product, aligned, row_of, x_of};
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
