#include "kernels/prefix_rows.h"

#include <algorithm>
#include <vector>

namespace confprune {
namespace {

// The prune levels of one row, as they lie in memory.
template <class Level>
struct RowOfLevels {
  const Level* levels;
  int64_t stride;
  RowOfLevels(const LevelledMatrix& m, int64_t row)
      : levels(static_cast<const Level*>(m.levels) + row * m.level_strides[0]),
        stride(m.level_strides[1]) {}
  int64_t operator[](int64_t column) const { return levels[column * stride]; }
};

constexpr int64_t kTileRows = 32;  // whose counts at a level fill a cache line

template <class Level>
int64_t count(const LevelledMatrix& m, int64_t row_begin, int64_t row_end, int64_t block,
              int64_t num_levels, int16_t* counts, int64_t* starts) {
  const int64_t blocks = (m.row_size + block - 1) / block;
  const int64_t cells = blocks * m.rows;
  std::vector<int32_t> pruned_at(num_levels + 1);
  // The levels of a cell are far apart: one line each is written for a few rows together.
  std::vector<int16_t> tile(num_levels * kTileRows);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t from = b * block, to = std::min(m.row_size, from + block);
    for (int64_t first = row_begin; first < row_end; first += kTileRows) {
      const int64_t size = std::min(kTileRows, row_end - first);
      int16_t* const out = counts + b * m.rows + first;
      for (int64_t r = 0; r < size; ++r) {
        const RowOfLevels<Level> levels(m, first + r);
        std::fill(pruned_at.begin(), pruned_at.end(), 0);
        for (int64_t c = from; c < to; ++c) {
          const int64_t level = levels[c];
          if (level < 0 || level > num_levels)
            return level;
          ++pruned_at[level];
        }
        int32_t alive = 0;
        for (int64_t level = num_levels - 1; level >= 0; --level) {
          alive += pruned_at[level + 1];
          tile[level * kTileRows + r] = int16_t(alive);
        }
        starts[b * m.rows + first + r + 1] = alive;
      }
      for (int64_t level = 0; level < num_levels; ++level)
        std::copy_n(tile.data() + level * kTileRows, size, out + level * cells);
    }
  }
  return 0;
}

template <class T, class Level, class Value>
void fill(const LevelledMatrix& m, int64_t row_begin, int64_t row_end, int64_t block,
          int64_t num_levels, const int64_t* starts, Value* values, int16_t* columns) {
  const int64_t blocks = (m.row_size + block - 1) / block, weight_stride = m.weight_strides[1];
  std::vector<int32_t> at(num_levels + 1);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t from = b * block, to = std::min(m.row_size, from + block);
    for (int64_t row = row_begin; row < row_end; ++row) {
      const RowOfLevels<Level> levels(m, row);
      const T* weight = static_cast<const T*>(m.weight) + row * m.weight_strides[0];
      // A stable counting sort, descending in the level.
      std::fill(at.begin(), at.end(), 0);
      for (int64_t c = from; c < to; ++c)
        ++at[levels[c]];
      int32_t next = 0;
      for (int64_t level = num_levels; level > 0; --level) {
        const int32_t pruned = at[level];
        at[level] = next;
        next += pruned;
      }
      const int64_t start = starts[b * m.rows + row];
      for (int64_t c = from; c < to; ++c) {
        const int64_t level = levels[c];
        if (level == 0)
          continue;
        const int64_t place = start + at[level]++;
        values[place] = widen(weight[c * weight_stride]);
        columns[place] = int16_t(c - from);
      }
    }
  }
}

template <class T, class Value>
void fill_levels(const LevelledMatrix& m, int64_t row_begin, int64_t row_end, int64_t block,
                 int64_t num_levels, const int64_t* starts, Value* values, int16_t* columns) {
  const auto filled = m.wide_levels ? fill<T, int16_t, Value> : fill<T, uint8_t, Value>;
  filled(m, row_begin, row_end, block, num_levels, starts, values, columns);
}

}  // namespace

int64_t count_prefixes(const LevelledMatrix& m, int64_t row_begin, int64_t row_end, int64_t block,
                       int64_t num_levels, int16_t* counts, int64_t* starts) {
  const auto counted = m.wide_levels ? count<int16_t> : count<uint8_t>;
  return counted(m, row_begin, row_end, block, num_levels, counts, starts);
}

void fill_prefixes(const LevelledMatrix& m, int64_t row_begin, int64_t row_end, int64_t block,
                   int64_t num_levels, const int64_t* starts, void* values, int16_t* columns) {
  float* const narrow = static_cast<float*>(values);
  double* const wide = static_cast<double*>(values);
  const auto with = [&](auto filled, auto* to) {
    filled(m, row_begin, row_end, block, num_levels, starts, to, columns);
  };
  switch (m.element) {
    case Element::float32:
      return with(fill_levels<float, float>, narrow);
    case Element::float64:
      return with(fill_levels<double, double>, wide);
    case Element::float16:
      return with(fill_levels<Half, float>, narrow);
    case Element::bfloat16:
      return with(fill_levels<BFloat16, float>, narrow);
  }
}

}  // namespace confprune
