// The surviving weights of a pruned matrix, in the order in which the products read them.
//
// A matrix [rows, row_size] (of a convolution: a kernel's taps in a row) is cut into cells of
// chunk_rows × kSparseBlock weights. A cell holds its rows that have survivors, those with the most
// first, sixteen rows to a slice. A slice is a sequence of steps; step t holds the t-th survivor of
// every row that has so many, which is a prefix of the slice's rows: nothing is padded, and rows of
// about one length run in lockstep, whatever the pattern.
//
//   values   [survivors], step by step
//   columns  [survivors] bytes: the column within the block
//   slices   bytes, slice by slice: `full`, the number of steps that all sixteen rows take part in;
//            `partial`, the number of the others; for each partial step its number of rows, which
//            never grows; for each row its place in the chunk
//   cells    [cells + 3, 2]: where a cell's values and slices begin, a chunk's blocks in a row, and
//            after the last one where they end; then what it is a matrix of: (rows, row_size),
//            (groups, columns of a block)
//
// Bytes a survivor: value + 1 + 1.3 / (survivors of a row in a block). At 90 % sparsity float32
// takes 5.1 bytes, 16-bit floats 3.1.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/elements.h"

namespace confprune {

constexpr int64_t kSparseBlock = 128;  // a row has at most 128 steps, and 8 registers hold the x
constexpr int64_t kSliceRows = 16;
constexpr int64_t kMostChunkRows = 256;  // a row's place in its chunk is a byte

// Borrowed arrays. Rows of group g meet the inputs of group g alone; no chunk holds two groups.
struct SparseMatrix {
  const void* values;
  Element element;
  const uint8_t* columns;
  const uint8_t* slices;
  const int64_t* cells;
  int64_t rows;
  int64_t row_size;
  int64_t groups;
};

// A matrix with its zeros, strides in elements.
struct DenseMatrix {
  void* data;
  Element element;
  int64_t strides[2];
  int64_t rows;
  int64_t row_size;
  int64_t groups;
};

namespace {  // internal linkage: each instruction set compiles its own copy

struct Slice {
  int64_t full;
  int64_t partial;
  int64_t rows;               // that take part in the first step
  const uint8_t* step_rows;   // [partial]
  const uint8_t* places;      // [rows]
  const uint8_t* next_slice;  // where this one ends
};

CONFPRUNE_HOST_DEVICE inline Slice read_slice(const uint8_t* at) {
  Slice slice{at[0], at[1], kSliceRows, at + 2, nullptr, nullptr};
  if (slice.full == 0)
    slice.rows = slice.step_rows[0];
  slice.places = slice.step_rows + slice.partial;
  slice.next_slice = slice.places + slice.rows;
  return slice;
}

CONFPRUNE_HOST_DEVICE inline int64_t survivors_of(const Slice& slice) {
  int64_t survivors = slice.full * kSliceRows;
  for (int64_t step = 0; step < slice.partial; ++step)
    survivors += slice.step_rows[step];
  return survivors;
}

// How rows are cut into chunks: about four to a group, for threads to share, within [128, 256].
struct Chunks {
  int64_t rows_per_group;
  int64_t size;
  int64_t per_group;
  int64_t count;
  int64_t blocks;

  Chunks(int64_t rows, int64_t row_size, int64_t groups)
      : rows_per_group(rows / groups),
        size(std::clamp<int64_t>((rows_per_group + 63) / 64 * 16, 128, kMostChunkRows)),
        per_group((rows_per_group + size - 1) / size),
        count(per_group * groups),
        blocks((row_size + kSparseBlock - 1) / kSparseBlock) {}

  CONFPRUNE_HOST_DEVICE int64_t group(int64_t chunk) const { return chunk / per_group; }
  CONFPRUNE_HOST_DEVICE int64_t begin(int64_t chunk) const {
    return group(chunk) * rows_per_group + chunk % per_group * size;
  }
  CONFPRUNE_HOST_DEVICE int64_t rows(int64_t chunk) const {
    const int64_t left = rows_per_group - chunk % per_group * size;
    return left < size ? left : size;
  }
  CONFPRUNE_HOST_DEVICE int64_t cells() const { return count * blocks; }
};

// Whether the end of `cells` says that it is a matrix of this shape; `name_shape` writes it there.
CONFPRUNE_HOST_DEVICE inline bool has_shape(const SparseMatrix& sparse, const Chunks& chunks) {
  const int64_t* shape = sparse.cells + 2 * (chunks.cells() + 1);
  return shape[0] == sparse.rows && shape[1] == sparse.row_size && shape[2] == sparse.groups &&
         shape[3] == kSparseBlock;
}

}  // namespace

void name_shape(const DenseMatrix& dense, int64_t* cells);

// Writes to cells[cell + 1] the survivors and the bytes of slices of every cell of a chunk.
void measure_chunk(const DenseMatrix& dense, int64_t chunk, int64_t* cells);

// Fills values, columns and slices of a chunk, given the running sums of `cells`.
void fill_chunk(const DenseMatrix& dense, int64_t chunk, const int64_t* cells, void* values,
                uint8_t* columns, uint8_t* slices);

// Writes the survivors of a chunk to their places in `dense`, which is zero.
void scatter_chunk(const SparseMatrix& sparse, int64_t chunk, const DenseMatrix& dense);

// What makes the arrays unreadable as a matrix of this shape, or null: after this check no product
// reads or writes outside of its arrays. `survivors` and `bytes` are the sizes of the arrays.
const char* fault_of(const SparseMatrix& sparse, int64_t survivors, int64_t bytes);

}  // namespace confprune
