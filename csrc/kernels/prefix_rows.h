// Prefix rows: each row's weights ordered by prune level, the most durable first.
//
// A row of `columns` weights is cut into blocks of `block` columns. Within a block the weights
// alive at level j are then a prefix, whose length is counts[j, b, row], so one structure serves
// every level. Cells (b, row) are stored in that order, the one in which products walk them.
// Weights pruned at every level are left out.
#pragma once

#include <cstdint>

#include "kernels/elements.h"

namespace confprune {

constexpr int64_t kMaxBlock = 32767;  // columns within a block, and counts, are int16

// Borrowed arrays of prefix rows; values are float, or double for float64 weights.
struct PrefixRows {
  const void* values;      // [alive]
  const int16_t* columns;  // [alive], within the block
  const int64_t* starts;   // [blocks * rows + 1]
  const int16_t* counts;   // [levels, blocks * rows]
  int64_t rows;
  int64_t row_size;
  int64_t block;
  int64_t blocks;
  int64_t levels;
};

// A weight matrix and its prune levels, both [rows, row_size], strides in elements.
struct LevelledMatrix {
  const void* weight;
  Element element;
  int64_t weight_strides[2];
  const void* levels;
  bool wide_levels;  // int16 rather than uint8
  int64_t level_strides[2];
  int64_t rows;
  int64_t row_size;
};

// Writes counts[j, cell] for every cell (block, row) of rows [row_begin, row_end), and the number
// of weights kept in cell + 1 of `starts`. Returns a prune level outside [0, num_levels], if it
// meets one, else 0.
int64_t count_prefixes(const LevelledMatrix& matrix, int64_t row_begin, int64_t row_end,
                       int64_t block, int64_t num_levels, int16_t* counts, int64_t* starts);

// Fills values and columns, given the running sum of `starts`.
void fill_prefixes(const LevelledMatrix& matrix, int64_t row_begin, int64_t row_end, int64_t block,
                   int64_t num_levels, const int64_t* starts, void* values, int16_t* columns);

}  // namespace confprune
