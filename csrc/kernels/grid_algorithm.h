// The algorithm of the grid product, over a vector width; included once for each instruction set.
//
// The including file defines CONFPRUNE_VECTOR_BYTES and CONFPRUNE_TILE_VECTORS, and may raise the
// compilation target first. Everything here has internal linkage: two instruction sets must never
// share a function.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/attention.h"
#include "kernels/elements.h"
#include "kernels/grid_tasks.h"

namespace confprune {
namespace {

template <class T>
struct Lanes {
  static constexpr int kWidth = CONFPRUNE_VECTOR_BYTES / int(sizeof(T));
  static constexpr int kTile = kWidth * CONFPRUNE_TILE_VECTORS;
  typedef T Vector __attribute__((vector_size(CONFPRUNE_VECTOR_BYTES)));
  typedef T Unaligned
      __attribute__((vector_size(CONFPRUNE_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

// Calls body with 0, 1, ... N - 1 as constants, so that arrays of vectors it indexes are registers.
template <class Body, int... I>
inline void unrolled(Body body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
inline void unrolled(Body body) {
  unrolled(body, std::make_integer_sequence<int, N>{});
}

// Where the inputs of a column of the weight are: looked up, or by a stride. A block of columns is
// `from` its first on, and lies at `origin`.
struct Lookup {
  const int32_t* offsets;
  Lookup from(int64_t first) const { return {offsets + first}; }
  int64_t origin(int64_t) const { return 0; }
  int64_t operator()(int64_t column) const { return offsets[column]; }
};
struct Strided {
  int64_t stride;
  Strided from(int64_t) const { return *this; }
  int64_t origin(int64_t first) const { return first * stride; }
  int64_t operator()(int64_t column) const { return column * stride; }
};

// sum[v] += Σ_p values[p] · x[place(columns[p]) + lanes of v]: the innermost loop of everything.
// Its limit are loads, so that four columns are read with one.
template <class T, int V, class Place>
inline void accumulate(typename Lanes<T>::Vector (&sum)[V], const T* values, const int16_t* columns,
                       int64_t count, Place place, const T* x) {
  using L = Lanes<T>;
  const auto add = [&](T value, int64_t column) {
    const T* at = x + place(column);
    for (int v = 0; v < V; ++v)
      sum[v] += value * *reinterpret_cast<const typename L::Unaligned*>(at + v * L::kWidth);
  };
  int64_t p = 0;
  for (; p + 4 <= count; p += 4) {
    uint16_t four[4];
    uint64_t word;
    std::memcpy(&word, columns + p, sizeof(word));
    std::memcpy(four, &word, sizeof(word));
    for (int i = 0; i < 4; ++i)
      add(values[p + i], four[i]);
  }
  for (; p < count; ++p)
    add(values[p], columns[p]);
}

// Rows of lanes in memory: scratch, or the output itself where its lanes are neighbours.
template <class T>
struct Tile {
  T* data;
  int64_t row_stride;
};

// What follows the sum of a row, at the k-th level.
template <class T>
struct Finish {
  Finish(const GridProduct& product, int64_t k)
      : scale(static_cast<const T*>(product.scale)),
        shift(static_cast<const T*>(product.shift)),
        floor(product.relu ? T(0) : -std::numeric_limits<T>::infinity()) {
    if (product.residual.data == nullptr)
      return;
    outputs = static_cast<const T*>(product.y.data) + k * product.y.level_stride;
    residual = static_cast<const T*>(product.residual.data) + k * product.residual.level_stride;
  }

  T factor(int64_t row) const { return scale == nullptr ? T(1) : scale[row]; }
  T start(int64_t row) const { return shift == nullptr ? T(0) : shift[row]; }

  // Where there is a residual, `place` is among the outputs.
  template <int V>
  void write(const typename Lanes<T>::Vector (&sum)[V], int64_t row, T* place) const {
    for (int v = 0; v < V; ++v)
      write(sum[v], factor(row), start(row), place + v * Lanes<T>::kWidth);
  }
  void write(typename Lanes<T>::Vector sum, T factor, T start, T* place) const {
    using L = Lanes<T>;
    const typename L::Vector least = floor - typename L::Vector{};
    typename L::Vector y = sum * factor + start;
    if (residual != nullptr)
      y += *reinterpret_cast<const typename L::Unaligned*>(residual + (place - outputs));
    // This way round NaN stays.
    *reinterpret_cast<typename L::Unaligned*>(place) = y < least ? least : y;
  }

  // Into the first-level cache (3), or the second (2).
  template <int locality>
  void prefetch(const T* place) const {
    __builtin_prefetch(place, 1, locality);
    if (residual != nullptr)
      __builtin_prefetch(residual + (place - outputs), 0, locality);
  }

  const T* scale;
  const T* shift;
  T floor;
  const T* outputs = nullptr;
  const T* residual = nullptr;
};

// out[row - row_begin, lanes] = the products of rows [row_begin, row_end) at one level; `partial`
// holds the sums over the blocks before the last. The additions stand in the order of shared_tile,
// so that a level does not depend on those asked for with it.
template <class T, int V, class Place>
void level_tile(const GridDetails& d, Place places, int64_t k, int64_t row_begin, int64_t row_end,
                const T* x, T* partial, Tile<T> out) {
  using L = Lanes<T>;
  const PrefixRows& rows = d.product.rows;
  const T* values = static_cast<const T*>(rows.values);
  const Finish<T> finish(d.product, k);
  const int64_t level = d.product.levels[k];
  const int64_t groups = d.product.convolution.groups, rows_per_group = rows.rows / groups;
  const int64_t group_size = d.product.convolution.channels / groups * d.packed.channel_size;
  for (int64_t block = 0; block < rows.blocks; ++block) {
    const Place place = places.from(block * rows.block);
    const T* const input = x + places.origin(block * rows.block);
    const int64_t* starts = rows.starts + block * rows.rows;
    const int16_t* counts = rows.counts + (level * rows.blocks + block) * rows.rows;
    const bool last = block + 1 == rows.blocks;
    for (int64_t row = row_begin; row < row_end; ++row) {
      // The weights alive are gaps apart, which the hardware does not foresee.
      __builtin_prefetch(values + starts[row + 1]);
      __builtin_prefetch(rows.columns + starts[row + 1]);
      T* const before = partial + (row - row_begin) * L::kTile;
      T* const to = out.data + (row - row_begin) * out.row_stride;
      if (last)  // while the row is summed
        for (int v = 0; v < V; ++v)
          finish.template prefetch<3>(to + v * L::kWidth);
      typename L::Vector sum[V] = {};
      accumulate<T, V>(sum, values + starts[row], rows.columns + starts[row], counts[row], place,
                       groups == 1 ? input : input + row / rows_per_group * group_size);
      if (block > 0)
        for (int v = 0; v < V; ++v)
          sum[v] += *reinterpret_cast<const typename L::Unaligned*>(before + v * L::kWidth);
      if (last)
        finish.write(sum, row, to);
      else
        for (int v = 0; v < V; ++v)
          *reinterpret_cast<typename L::Unaligned*>(before + v * L::kWidth) = sum[v];
    }
  }
}

// A range of the levels that share an input.
template <class T>
struct LevelRange {
  int64_t begin, end;
  T* sums;  // [row, lanes] of the levels from `end` on, and then of those from `begin` on; or null
};

// out[k - begin, row - row_begin, lanes] for levels [begin, end) of the product, by suffix sums:
// the levels are taken from the sparsest to the densest, each adding its own weights to the sum of
// the sparser ones.
template <class T, int V>
void shared_tile(const GridDetails& d, LevelRange<T> range, int64_t row_begin, int64_t row_end,
                 const T* x, Tile<T> out, int64_t level_stride) {
  using L = Lanes<T>;
  const GridProduct& product = d.product;
  const PrefixRows& rows = product.rows;
  const T* values = static_cast<const T*>(rows.values);
  const Finish<T> finish(product, 0);
  const int64_t rows_per_group = rows.rows / product.convolution.groups;
  const int64_t group_size =
      product.convolution.channels / product.convolution.groups * d.packed.channel_size;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* input = x + row / rows_per_group * group_size;
    typename L::Vector sum[V] = {};
    int64_t done = 0;
    if (range.end < product.num_levels) {
      done = rows.counts[product.levels[range.end] * rows.rows + row];
      for (int v = 0; v < V; ++v)
        sum[v] = *reinterpret_cast<const typename L::Unaligned*>(range.sums + row * L::kTile +
                                                                 v * L::kWidth);
    }
    for (int64_t k = range.end - 1; k >= range.begin; --k) {
      const int64_t count = rows.counts[product.levels[k] * rows.rows + row];
      const int64_t from = rows.starts[row] + done;
      T* const to =
          out.data + (k - range.begin) * level_stride + (row - row_begin) * out.row_stride;
      for (int v = 0; v < V && k >= range.begin + 2; ++v)  // while others are summed
        __builtin_prefetch(to - 2 * level_stride + v * L::kWidth, 1);
      accumulate<T, V>(sum, values + from, rows.columns + from, count - done,
                       Lookup{d.packed.offsets.data()}, input);
      done = count;
      finish.write(sum, row, to);
    }
    if (range.begin > 0)
      for (int v = 0; v < V; ++v)
        *reinterpret_cast<typename L::Unaligned*>(range.sums + row * L::kTile + v * L::kWidth) =
            sum[v];
  }
}

// Calls body with the number of vectors that `lanes` needs as a constant.
template <int V, class Body>
void with_vectors(int64_t vectors, Body body) {
  if constexpr (V == 1) {
    body(std::integral_constant<int, 1>{});
  } else {
    if (vectors >= V)
      return body(std::integral_constant<int, V>{});
    with_vectors<V - 1>(vectors, body);
  }
}

}  // namespace
}  // namespace confprune

#include "kernels/grid_packing.h"
// The packing comes first.
#include "kernels/grid_mlp.h"
#include "kernels/grid_tiles.h"
#include "kernels/grid_transforms.h"
#include "kernels/grid_winograd.h"
// Its products load as the transforms do.
#include "kernels/grid_attention.h"

namespace confprune {
namespace {

// Lines [line_begin, line_end) of the outputs of a packed chunk of examples.
template <class T, class InOut>
void multiply_lines(const GridDetails& d, int64_t k, int64_t line_begin, int64_t line_end,
                    int64_t row_begin, int64_t row_end, int64_t count, const T* packed, T* tile,
                    InOut* y) {
  using L = Lanes<T>;
  const GridProduct& product = d.product;
  const Convolution& c = product.convolution;
  const int64_t line_lanes = c.output[2] * d.packed.chunk;
  for (int64_t o0 = 0; o0 < c.output[0]; ++o0)
    for (int64_t o1 = line_begin; o1 < line_end; ++o1)
      for (int64_t lane = 0; lane < line_lanes; lane += L::kTile) {
        const int64_t lanes = std::min<int64_t>(L::kTile, line_lanes - lane);
        const int64_t vectors = (lanes + L::kWidth - 1) / L::kWidth;
        const T* input =
            packed +
            (o0 * d.packed.extent[1] + o1 - line_begin) * d.packed.extent[2] * d.packed.chunk +
            lane;
        InOut* out = y + o0 * product.y.position_strides[0] + o1 * product.y.position_strides[1];
        // Whether the lanes are neighbours in y too, and fill its vectors.
        const bool direct = std::is_same<T, InOut>::value && product.y.batch_stride == 1 &&
                            count == d.packed.chunk && lanes % L::kWidth == 0 &&
                            (c.output[2] == 1 || product.y.position_strides[2] == d.packed.chunk);
        T* const lines = reinterpret_cast<T*>(out) + lane;
        const int64_t stride = product.y.channel_stride;
        if (!product.shared) {
          const Tile<T> to =
              direct ? Tile<T>{lines + row_begin * stride, stride} : Tile<T>{tile, L::kTile};
          with_vectors<CONFPRUNE_TILE_VECTORS>(vectors, [&](auto V) {
            if (d.packed.stride > 0)
              level_tile<T, V()>(d, Strided{d.packed.stride}, k, row_begin, row_end, input, tile,
                                 to);
            else
              level_tile<T, V()>(d, Lookup{d.packed.offsets.data()}, k, row_begin, row_end, input,
                                 tile, to);
          });
          if (!direct)
            store(d, tile, row_end - row_begin, out + row_begin * stride, lane, lanes, count);
          continue;
        }
        for (int64_t row = row_begin; row < row_end; row += kSharedRows) {
          const int64_t stop = std::min(row_end, row + kSharedRows);
          const Tile<T> to =
              direct ? Tile<T>{lines + row * stride, stride} : Tile<T>{tile, L::kTile};
          with_vectors<CONFPRUNE_TILE_VECTORS>(vectors, [&](auto V) {
            shared_tile<T, V()>(d, {0, product.num_levels, nullptr}, row, stop, input, to,
                                direct ? product.y.level_stride : kSharedRows * L::kTile);
          });
          if (!direct)
            for (int64_t j = 0; j < product.num_levels; ++j)
              store(d, tile + j * kSharedRows * L::kTile, stop - row,
                    out + j * product.y.level_stride + row * stride, lane, lanes, count);
        }
      }
}

// One part of the outputs, rows [row_begin, row_end), at level k, or at all levels that share x.
template <class T, class InOut>
void run_part(const GridDetails& d, int64_t k, int64_t part, int64_t row_begin, int64_t row_end,
              const InOut* x, T* scratch, InOut* y) {
  using L = Lanes<T>;
  const GridProduct& product = d.product;
  const Convolution& c = product.convolution;
  const int64_t first = part / d.bands * d.packed.chunk;
  const int64_t count = std::min(d.packed.chunk, product.batch - first);
  const int64_t line = part % d.bands * d.packed.band;
  const int64_t line_end = std::min(c.output[1], line + d.packed.band);
  const int64_t size = d.in_place ? 0 : c.channels * d.packed.channel_size;
  const T* packed = scratch;
  T* const tile = scratch + (size + L::kTile + 15) / 16 * 16;
  Finite<T> finite;
  if (d.in_place) {
    packed = reinterpret_cast<const T*>(x + first);
    if (row_begin == 0)
      for (int64_t channel = 0; channel < c.channels; ++channel)
        finite.look(packed + channel * d.packed.channel_size, count);
  } else {
    pack(d, x, first, line, scratch, finite);
    // Tiles may read a vector past the last position; what they read never reaches y.
    std::fill(scratch + size, scratch + size + L::kTile, T(0));
  }
  if (!finite.all())
    product.finite->store(false, std::memory_order_relaxed);
  multiply_lines(d, k, line, line_end, row_begin, row_end, count, packed, tile,
                 y + first * product.y.batch_stride);
}

template <class T, class InOut>
void run_typed(const GridDetails& d, int64_t task, void* scratch) {
  const GridProduct& product = d.product;
  const int64_t row_group = task % d.row_groups;
  const int64_t part_group = task / d.row_groups % d.part_groups;
  const int64_t k = task / d.row_groups / d.part_groups;  // 0 when shared
  const int64_t row_begin = row_group * d.row_tile;
  const int64_t row_end = std::min(product.rows.rows, row_begin + d.row_tile);
  const int64_t begin = part_group * d.parts / d.part_groups;
  const int64_t end = (part_group + 1) * d.parts / d.part_groups;
  const InOut* x = static_cast<const InOut*>(product.x.data);
  InOut* y = static_cast<InOut*>(product.y.data);
  if (!product.shared) {
    x += k * product.x.level_stride;
    y += k * product.y.level_stride;
  }
  T* const space = static_cast<T*>(scratch);
  if constexpr (std::is_same<T, float>::value)
    if (!d.winograd.levels.empty() && d.winograd.levels[k])
      return d.winograd.stride == 1
                 ? run_winograd<1>(d, k, row_begin, row_end, begin, end, x, space, y)
                 : run_winograd<2>(d, k, row_begin, row_end, begin, end, x, space, y);
  for (int64_t part = begin; part < end; ++part)
    run_part(d, k, part, row_begin, row_end, x, space, y);
}

int64_t tile_lanes(bool wide) {
  return wide ? Lanes<double>::kTile : Lanes<float>::kTile;
}

void run_task(const GridDetails& d, int64_t task, void* scratch) {
  switch (d.product.x.element) {
    case Element::float32:
      return run_typed<float, float>(d, task, scratch);
    case Element::float64:
      return run_typed<double, double>(d, task, scratch);
    case Element::float16:
      return run_typed<float, Half>(d, task, scratch);
    case Element::bfloat16:
      return run_typed<float, BFloat16>(d, task, scratch);
  }
}

}  // namespace
}  // namespace confprune
