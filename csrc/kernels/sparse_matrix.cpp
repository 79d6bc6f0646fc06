#include "kernels/sparse_matrix.h"

#include <bitset>

namespace confprune {
namespace {

// The rows of a cell that have survivors, those with the most first, equal ones in their order.
struct RowOrder {
  int64_t rows = 0;
  uint8_t places[kMostChunkRows];
  uint8_t counts[kMostChunkRows];
};

struct Cell {
  int64_t row, rows;
  int64_t column, columns;
};

Cell cell_at(const Chunks& chunks, int64_t row_size, int64_t chunk, int64_t block) {
  const int64_t column = block * kSparseBlock;
  return {chunks.begin(chunk), chunks.rows(chunk), column,
          std::min(kSparseBlock, row_size - column)};
}

template <class T>
const T* row_of(const DenseMatrix& dense, int64_t row, int64_t column) {
  return static_cast<const T*>(dense.data) + row * dense.strides[0] + column * dense.strides[1];
}

template <class T>
RowOrder order_rows(const DenseMatrix& dense, const Cell& cell) {
  uint8_t counts[kMostChunkRows];
  int64_t rows_with[kSparseBlock + 1] = {};
  for (int64_t place = 0; place < cell.rows; ++place) {
    const T* weights = row_of<T>(dense, cell.row + place, cell.column);
    int count = 0;
    for (int64_t c = 0; c < cell.columns; ++c)
      count += widen(weights[c * dense.strides[1]]) != 0;
    counts[place] = uint8_t(count);
    ++rows_with[count];
  }
  RowOrder order;
  int64_t first[kSparseBlock + 1];
  for (int64_t count = kSparseBlock; count > 0; --count) {
    first[count] = order.rows;
    order.rows += rows_with[count];
  }
  for (int64_t place = 0; place < cell.rows; ++place) {
    if (counts[place] == 0)
      continue;
    const int64_t at = first[counts[place]]++;
    order.places[at] = uint8_t(place);
    order.counts[at] = counts[place];
  }
  return order;
}

int64_t full_steps(const RowOrder& order, int64_t first) {
  return first + kSliceRows <= order.rows ? order.counts[first + kSliceRows - 1] : 0;
}

template <class T>
void measure(const DenseMatrix& dense, int64_t chunk, int64_t* cells) {
  const Chunks chunks(dense.rows, dense.row_size, dense.groups);
  for (int64_t block = 0; block < chunks.blocks; ++block) {
    const RowOrder order = order_rows<T>(dense, cell_at(chunks, dense.row_size, chunk, block));
    int64_t survivors = 0, bytes = order.rows;
    for (int64_t at = 0; at < order.rows; ++at)
      survivors += order.counts[at];
    for (int64_t at = 0; at < order.rows; at += kSliceRows)
      bytes += 2 + order.counts[at] - full_steps(order, at);
    int64_t* out = cells + 2 * (chunk * chunks.blocks + block + 1);
    out[0] = survivors;
    out[1] = bytes;
  }
}

template <class T>
void fill(const DenseMatrix& dense, int64_t chunk, const int64_t* cells, T* values,
          uint8_t* columns, uint8_t* slices) {
  const Chunks chunks(dense.rows, dense.row_size, dense.groups);
  for (int64_t block = 0; block < chunks.blocks; ++block) {
    const Cell cell = cell_at(chunks, dense.row_size, chunk, block);
    const RowOrder order = order_rows<T>(dense, cell);
    const int64_t* start = cells + 2 * (chunk * chunks.blocks + block);
    T* value = values + start[0];
    uint8_t* column = columns + start[0];
    uint8_t* out = slices + start[1];
    for (int64_t first = 0; first < order.rows; first += kSliceRows) {
      const int64_t rows = std::min(kSliceRows, order.rows - first);
      const int64_t full = full_steps(order, first), steps = order.counts[first];
      uint8_t survivors[kSliceRows][kSparseBlock];
      for (int64_t r = 0; r < rows; ++r) {
        const T* weights = row_of<T>(dense, cell.row + order.places[first + r], cell.column);
        uint8_t* next = survivors[r];
        for (int64_t c = 0; c < cell.columns; ++c)
          if (widen(weights[c * dense.strides[1]]) != 0)
            *next++ = uint8_t(c);
      }
      *out++ = uint8_t(full);
      *out++ = uint8_t(steps - full);
      for (int64_t step = 0; step < steps; ++step) {
        int64_t r = 0;
        for (; r < rows && order.counts[first + r] > step; ++r) {
          const uint8_t c = survivors[r][step];
          *column++ = c;
          *value++ = row_of<T>(dense, cell.row + order.places[first + r],
                               cell.column)[c * dense.strides[1]];
        }
        if (step >= full)
          *out++ = uint8_t(r);
      }
      out = std::copy_n(order.places + first, rows, out);
    }
  }
}

// Calls body(value index, row in the chunk, column in the block) on every survivor of a cell.
template <class Body>
void each_survivor(const SparseMatrix& sparse, int64_t cell, Body body) {
  int64_t at = sparse.cells[2 * cell];
  const uint8_t* next = sparse.slices + sparse.cells[2 * cell + 1];
  const uint8_t* end = sparse.slices + sparse.cells[2 * cell + 3];
  while (next < end) {
    const Slice slice = read_slice(next);
    next = slice.next_slice;
    for (int64_t step = 0; step < slice.full + slice.partial; ++step) {
      const int64_t rows = step < slice.full ? kSliceRows : slice.step_rows[step - slice.full];
      for (int64_t r = 0; r < rows; ++r, ++at)
        body(at, slice.places[r], sparse.columns[at]);
    }
  }
}

template <class T>
void scatter(const SparseMatrix& sparse, int64_t chunk, const DenseMatrix& dense) {
  const Chunks chunks(sparse.rows, sparse.row_size, sparse.groups);
  const T* values = static_cast<const T*>(sparse.values);
  T* out = static_cast<T*>(dense.data);
  for (int64_t block = 0; block < chunks.blocks; ++block) {
    const Cell cell = cell_at(chunks, sparse.row_size, chunk, block);
    each_survivor(sparse, chunk * chunks.blocks + block, [&](int64_t at, int64_t row, int64_t c) {
      out[(cell.row + row) * dense.strides[0] + (cell.column + c) * dense.strides[1]] = values[at];
    });
  }
}

const char* fault_of_cell(const SparseMatrix& sparse, int64_t index, const Cell& cell) {
  const int64_t* bounds = sparse.cells + 2 * index;
  int64_t at = bounds[0];
  const uint8_t* next = sparse.slices + bounds[1];
  const uint8_t* end = sparse.slices + bounds[3];
  std::bitset<kMostChunkRows> seen;
  while (next < end) {
    if (end - next < 3)
      return "a slice is cut off";
    const int64_t full = next[0], partial = next[1];
    if (full + partial > cell.columns)
      return "a slice has more steps than its block has columns";
    if (full + partial == 0 || end - next < 2 + partial)
      return "a slice is cut off";
    for (int64_t step = 0; step < partial; ++step) {
      const int64_t most = step == 0 ? kSliceRows - (full > 0) : next[1 + step];
      if (next[2 + step] < 1 || next[2 + step] > most)
        return "the rows of a slice's steps do not decrease";
    }
    const Slice slice = read_slice(next);
    if (slice.rows > end - slice.places)
      return "a slice is cut off";
    int last[kSliceRows];
    std::fill_n(last, kSliceRows, -1);
    for (int64_t r = 0; r < slice.rows; ++r) {
      if (slice.places[r] >= cell.rows || seen[slice.places[r]])
        return "a row is outside of its chunk, or there twice";
      seen.set(slice.places[r]);
    }
    for (int64_t step = 0; step < full + partial; ++step) {
      const int64_t rows = step < full ? kSliceRows : slice.step_rows[step - full];
      if (rows > bounds[2] - at)
        return "there are more survivors than values";
      for (int64_t r = 0; r < rows; ++r, ++at) {
        const int column = sparse.columns[at];
        if (column <= last[r] || column >= cell.columns)
          return "a row's columns do not increase within its block";
        last[r] = column;
      }
    }
    next = slice.next_slice;
  }
  return at == bounds[2] ? nullptr : "there are more values than survivors";
}

template <class Body>
void with_element(Element element, Body body) {
  switch (element) {
    case Element::float32:
      return body(float{});
    case Element::float64:
      return body(double{});
    case Element::float16:
      return body(Half{});
    case Element::bfloat16:
      return body(BFloat16{});
  }
}

}  // namespace

void name_shape(const DenseMatrix& dense, int64_t* cells) {
  int64_t* shape = cells + 2 * (Chunks(dense.rows, dense.row_size, dense.groups).cells() + 1);
  shape[0] = dense.rows;
  shape[1] = dense.row_size;
  shape[2] = dense.groups;
  shape[3] = kSparseBlock;
}

void measure_chunk(const DenseMatrix& dense, int64_t chunk, int64_t* cells) {
  with_element(dense.element, [&](auto zero) { measure<decltype(zero)>(dense, chunk, cells); });
}

void fill_chunk(const DenseMatrix& dense, int64_t chunk, const int64_t* cells, void* values,
                uint8_t* columns, uint8_t* slices) {
  with_element(dense.element, [&](auto zero) {
    fill(dense, chunk, cells, static_cast<decltype(zero)*>(values), columns, slices);
  });
}

void scatter_chunk(const SparseMatrix& sparse, int64_t chunk, const DenseMatrix& dense) {
  with_element(sparse.element, [&](auto zero) { scatter<decltype(zero)>(sparse, chunk, dense); });
}

const char* fault_of(const SparseMatrix& sparse, int64_t survivors, int64_t bytes) {
  const Chunks chunks(sparse.rows, sparse.row_size, sparse.groups);
  const int64_t last = 2 * chunks.cells();
  if (sparse.cells[0] != 0 || sparse.cells[1] != 0 || sparse.cells[last] != survivors ||
      sparse.cells[last + 1] != bytes)
    return "the cells do not cover the values and slices";
  for (int64_t at = 0; at < last; ++at)
    if (sparse.cells[at + 2] < sparse.cells[at])
      return "the cells are out of order";
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
    for (int64_t block = 0; block < chunks.blocks; ++block) {
      const Cell cell = cell_at(chunks, sparse.row_size, chunk, block);
      const char* fault = fault_of_cell(sparse, chunk * chunks.blocks + block, cell);
      if (fault != nullptr)
        return fault;
    }
  return nullptr;
}

}  // namespace confprune
