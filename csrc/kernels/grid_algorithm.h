// The algorithm of the grid product, over a vector width; included once for each instruction set.
//
// The including file defines CONFPRUNE_VECTOR_BYTES, CONFPRUNE_TILE_VECTORS and CONFPRUNE_SET, and
// may raise the compilation target first. Everything here has internal linkage: two instruction
// sets must never share a function.
#include <algorithm>
#include <cstdint>

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

// sum[v] += Σ_p values[p] · x[offsets[columns[p]] + lanes of v]: the innermost loop of everything.
template <class T, int V>
inline void accumulate(typename Lanes<T>::Vector (&sum)[V], const T* values, const int16_t* columns,
                       int64_t count, const int32_t* offsets, const T* x) {
  using L = Lanes<T>;
  for (int64_t p = 0; p < count; ++p) {
    const T value = values[p];
    const T* at = x + offsets[columns[p]];
    for (int v = 0; v < V; ++v)
      sum[v] += value * *reinterpret_cast<const typename L::Unaligned*>(at + v * L::kWidth);
  }
}

template <class T>
struct Rows {
  const T* values;
  const int16_t* columns;
  const int64_t* starts;
  const int16_t* counts;
};

// tile[row - row_begin, lanes] = the products of rows [row_begin, row_end) at one level. The
// additions stand in the order of shared_tile, so that a level does not depend on those asked for
// with it.
template <class T, int V>
void level_tile(const GridDetails& d, int64_t level, int64_t row_begin, int64_t row_end, const T* x,
                T* tile) {
  using L = Lanes<T>;
  const PrefixRows& rows = d.product.rows;
  const T* values = static_cast<const T*>(rows.values);
  const T* bias = static_cast<const T*>(d.product.bias);
  const int64_t rows_per_group = rows.rows / d.product.convolution.groups;
  const int64_t group_size =
      d.product.convolution.channels / d.product.convolution.groups * d.packed.channel_size;
  for (int64_t block = 0; block < rows.blocks; ++block) {
    const int32_t* offsets = d.packed.offsets.data() + block * rows.block;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const int64_t cell = row * rows.blocks + block;
      const T* input = x + row / rows_per_group * group_size;
      const T start = bias == nullptr ? T(0) : bias[row];
      T* out = tile + (row - row_begin) * L::kTile;
      typename L::Vector sum[V] = {};
      accumulate<T, V>(sum, values + rows.starts[cell], rows.columns + rows.starts[cell],
                       rows.counts[cell * rows.levels + level], offsets, input);
      for (int v = 0; v < V; ++v) {
        auto* place = reinterpret_cast<typename L::Unaligned*>(out + v * L::kWidth);
        *place = block == 0 ? sum[v] + start : *place + sum[v];
      }
    }
  }
}

// tile[k, row - row_begin, lanes] for every level of the product, by suffix sums: the levels are
// taken from the sparsest to the densest, each adding its own weights to the sum of the sparser
// ones.
template <class T, int V>
void shared_tile(const GridDetails& d, int64_t row_begin, int64_t row_end, const T* x, T* tile) {
  using L = Lanes<T>;
  const GridProduct& product = d.product;
  const PrefixRows& rows = product.rows;
  const T* values = static_cast<const T*>(rows.values);
  const T* bias = static_cast<const T*>(product.bias);
  const int64_t rows_per_group = rows.rows / product.convolution.groups;
  const int64_t group_size =
      product.convolution.channels / product.convolution.groups * d.packed.channel_size;
  for (int64_t block = 0; block < rows.blocks; ++block) {
    const int32_t* offsets = d.packed.offsets.data() + block * rows.block;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const int64_t cell = row * rows.blocks + block;
      const T* input = x + row / rows_per_group * group_size;
      const T start = bias == nullptr ? T(0) : bias[row];
      typename L::Vector sum[V] = {};
      int64_t done = 0;
      for (int64_t k = product.num_levels - 1; k >= 0; --k) {
        const int64_t count = rows.counts[cell * rows.levels + product.levels[k]];
        const int64_t from = rows.starts[cell] + done;
        accumulate<T, V>(sum, values + from, rows.columns + from, count - done, offsets, input);
        done = count;
        T* out = tile + (k * kSharedRows + row - row_begin) * L::kTile;
        for (int v = 0; v < V; ++v) {
          auto* place = reinterpret_cast<typename L::Unaligned*>(out + v * L::kWidth);
          *place = block == 0 ? sum[v] + start : *place + sum[v];
        }
      }
    }
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

// x[slot, first example ..] into [channel, phase, extent, chunk]; what is padding, or past the
// batch, is 0.
template <class T, class Input>
void pack(const GridDetails& d, const Input* x, int64_t first, T* packed) {
  const Convolution& c = d.product.convolution;
  const Activation& layout = d.product.x;
  const PackedInput& p = d.packed;
  const int64_t count = std::min(p.chunk, d.product.batch - first);
  const Input* base = x + first * layout.batch_stride;
  T* out = packed;
  int strange = 0;  // whether some input is infinite or NaN
  for (int64_t channel = 0; channel < c.channels; ++channel) {
    const Input* plane = base + channel * layout.channel_stride;
    for (int64_t p0 : p.phases[0])
      for (int64_t p1 : p.phases[1])
        for (int64_t p2 : p.phases[2])
          for (int64_t i0 = 0; i0 < p.extent[0]; ++i0)
            for (int64_t i1 = 0; i1 < p.extent[1]; ++i1) {
              const int64_t a0 = i0 * c.stride[0] + p0 - c.padding[0];
              const int64_t a1 = i1 * c.stride[1] + p1 - c.padding[1];
              const bool inside = a0 >= 0 && a0 < c.input[0] && a1 >= 0 && a1 < c.input[1];
              const Input* line =
                  plane + a0 * layout.position_strides[0] + a1 * layout.position_strides[1];
              for (int64_t i2 = 0; i2 < p.extent[2]; ++i2, out += p.chunk) {
                const int64_t a2 = i2 * c.stride[2] + p2 - c.padding[2];
                if (!inside || a2 < 0 || a2 >= c.input[2]) {
                  std::fill(out, out + p.chunk, T(0));
                  continue;
                }
                const Input* at = line + a2 * layout.position_strides[2];
                if (layout.batch_stride == 1)
                  for (int64_t b = 0; b < count; ++b)
                    out[b] = T(widen(at[b]));
                else
                  for (int64_t b = 0; b < count; ++b)
                    out[b] = T(widen(at[b * layout.batch_stride]));
                for (int64_t b = 0; b < count; ++b)
                  strange |= out[b] - out[b] != T(0);
                std::fill(out + count, out + p.chunk, T(0));
              }
            }
  }
  if (strange)
    d.product.finite->store(false, std::memory_order_relaxed);
}

// One tile of lanes to y: lane = position along the last dimension * chunk + example.
template <class T, class Output>
void store(const GridDetails& d, const T* tile, int64_t rows, Output* y, int64_t first_lane,
           int64_t lanes, int64_t count) {
  const Activation& layout = d.product.y;
  const int64_t chunk = d.packed.chunk;
  constexpr int64_t kRowBlock = 16;  // rows whose lines stay in L1 while examples are walked
  for (int64_t begin = 0; begin < rows; begin += kRowBlock) {
    const int64_t end = std::min(rows, begin + kRowBlock);
    if (layout.channel_stride == 1) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t example = (first_lane + lane) % chunk;
        if (example >= count)
          continue;
        Output* out = y + (first_lane + lane) / chunk * layout.position_strides[2] +
                      example * layout.batch_stride;
        for (int64_t row = begin; row < end; ++row)
          narrow(tile[row * Lanes<T>::kTile + lane], out + row);
      }
      continue;
    }
    for (int64_t row = begin; row < end; ++row) {
      const T* from = tile + row * Lanes<T>::kTile;
      Output* to = y + row * layout.channel_stride;
      int64_t position = first_lane / chunk, example = first_lane % chunk;
      for (int64_t lane = 0; lane < lanes; ++position, example = 0) {
        const int64_t run = std::min(chunk - example, lanes - lane);
        Output* out = to + position * layout.position_strides[2] + example * layout.batch_stride;
        const int64_t valid = std::min(run, count - example);
        if (layout.batch_stride == 1)
          for (int64_t i = 0; i < valid; ++i)
            narrow(from[lane + i], out + i);
        else
          for (int64_t i = 0; i < valid; ++i)
            narrow(from[lane + i], out + i * layout.batch_stride);
        lane += run;
      }
    }
  }
}

template <class T, class InOut>
void run_typed(const GridDetails& d, int64_t task, void* scratch) {
  using L = Lanes<T>;
  const GridProduct& product = d.product;
  const Convolution& c = product.convolution;
  const int64_t group = task % d.row_groups;
  const int64_t chunk_index = task / d.row_groups % d.chunks;
  const int64_t k = task / d.row_groups / d.chunks;  // 0 when shared
  const int64_t row_begin = group * d.row_tile;
  const int64_t row_end = std::min(product.rows.rows, row_begin + d.row_tile);
  const int64_t first = chunk_index * d.packed.chunk;
  const int64_t count = std::min(d.packed.chunk, product.batch - first);

  T* packed = static_cast<T*>(scratch);
  // Tiles may read a vector past the last position; what they read never reaches y.
  const int64_t slack = c.channels * d.packed.channel_size;
  std::fill(packed + slack, packed + slack + L::kTile, T(0));
  T* tile = packed + (slack + L::kTile + 15) / 16 * 16;

  const InOut* x = static_cast<const InOut*>(product.x.data);
  pack(d, product.shared ? x : x + k * product.x.level_stride, first, packed);

  InOut* y = static_cast<InOut*>(product.y.data) + first * product.y.batch_stride;
  const int64_t line_lanes = c.output[2] * d.packed.chunk;
  for (int64_t o0 = 0; o0 < c.output[0]; ++o0)
    for (int64_t o1 = 0; o1 < c.output[1]; ++o1)
      for (int64_t lane = 0; lane < line_lanes; lane += L::kTile) {
        const int64_t lanes = std::min<int64_t>(L::kTile, line_lanes - lane);
        const int64_t vectors = (lanes + L::kWidth - 1) / L::kWidth;
        const T* input =
            packed + (o0 * d.packed.extent[1] + o1) * d.packed.extent[2] * d.packed.chunk + lane;
        InOut* out = y + o0 * product.y.position_strides[0] + o1 * product.y.position_strides[1];
        if (!product.shared) {
          with_vectors<CONFPRUNE_TILE_VECTORS>(vectors, [&](auto V) {
            level_tile<T, V()>(d, product.levels[k], row_begin, row_end, input, tile);
          });
          store(d, tile, row_end - row_begin,
                out + k * product.y.level_stride + row_begin * product.y.channel_stride, lane,
                lanes, count);
          continue;
        }
        for (int64_t row = row_begin; row < row_end; row += kSharedRows) {
          const int64_t stop = std::min(row_end, row + kSharedRows);
          with_vectors<CONFPRUNE_TILE_VECTORS>(
              vectors, [&](auto V) { shared_tile<T, V()>(d, row, stop, input, tile); });
          for (int64_t j = 0; j < product.num_levels; ++j)
            store(d, tile + j * kSharedRows * L::kTile, stop - row,
                  out + j * product.y.level_stride + row * product.y.channel_stride, lane, lanes,
                  count);
        }
      }
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
