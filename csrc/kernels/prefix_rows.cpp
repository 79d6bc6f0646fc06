#include "kernels/prefix_rows.h"

#include <algorithm>
#include <vector>

namespace confprune {
namespace {

inline int64_t level_at(const LevelledMatrix& m, int64_t row, int64_t column) {
  const int64_t at = row * m.level_strides[0] + column * m.level_strides[1];
  return m.wide_levels ? static_cast<const int16_t*>(m.levels)[at]
                       : static_cast<const uint8_t*>(m.levels)[at];
}

template <class T, class Value>
void fill(const LevelledMatrix& m, int64_t row_begin, int64_t row_end, int64_t block,
          int64_t num_levels, const int64_t* starts, Value* values, int16_t* columns) {
  const T* weight = static_cast<const T*>(m.weight);
  const int64_t blocks = (m.row_size + block - 1) / block;
  std::vector<int64_t> at(num_levels + 1);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t from = b * block, to = std::min(m.row_size, from + block);
    for (int64_t row = row_begin; row < row_end; ++row) {
      // A stable counting sort, descending in the level.
      std::fill(at.begin(), at.end(), 0);
      for (int64_t c = from; c < to; ++c)
        ++at[level_at(m, row, c)];
      int64_t next = starts[b * m.rows + row];
      for (int64_t level = num_levels; level >= 0; --level) {
        const int64_t count = at[level];
        at[level] = next;
        next += count;
      }
      for (int64_t c = from; c < to; ++c) {
        const int64_t level = level_at(m, row, c);
        if (level == 0)
          continue;
        const int64_t place = at[level]++;
        values[place] = widen(weight[row * m.weight_strides[0] + c * m.weight_strides[1]]);
        columns[place] = int16_t(c - from);
      }
    }
  }
}

}  // namespace

int64_t count_prefixes(const LevelledMatrix& m, int64_t row_begin, int64_t row_end, int64_t block,
                       int64_t num_levels, int16_t* counts, int64_t* starts) {
  const int64_t blocks = (m.row_size + block - 1) / block;
  std::vector<int32_t> pruned_at(num_levels + 1);
  const int64_t cells = blocks * m.rows;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t from = b * block, to = std::min(m.row_size, from + block);
    for (int64_t row = row_begin; row < row_end; ++row) {
      std::fill(pruned_at.begin(), pruned_at.end(), 0);
      for (int64_t c = from; c < to; ++c) {
        const int64_t level = level_at(m, row, c);
        if (level < 0 || level > num_levels)
          return level;
        ++pruned_at[level];
      }
      const int64_t cell = b * m.rows + row;
      int32_t alive = 0;
      for (int64_t level = num_levels - 1; level >= 0; --level) {
        alive += pruned_at[level + 1];
        counts[level * cells + cell] = int16_t(alive);
      }
      starts[cell + 1] = alive;
    }
  }
  return 0;
}

void fill_prefixes(const LevelledMatrix& m, int64_t row_begin, int64_t row_end, int64_t block,
                   int64_t num_levels, const int64_t* starts, void* values, int16_t* columns) {
  switch (m.element) {
    case Element::float32:
      return fill<float>(m, row_begin, row_end, block, num_levels, starts,
                         static_cast<float*>(values), columns);
    case Element::float64:
      return fill<double>(m, row_begin, row_end, block, num_levels, starts,
                          static_cast<double*>(values), columns);
    case Element::float16:
      return fill<Half>(m, row_begin, row_end, block, num_levels, starts,
                        static_cast<float*>(values), columns);
    case Element::bfloat16:
      return fill<BFloat16>(m, row_begin, row_end, block, num_levels, starts,
                            static_cast<float*>(values), columns);
  }
}

}  // namespace confprune
