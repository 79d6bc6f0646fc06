// The algorithm of the sparse product, over a vector width; included once for each instruction set.
//
// The including file may raise the compilation target first. It defines CONFPRUNE_VECTOR_BYTES and
// includes sparse_generic.h, whose templates it may specialise. Everything here has internal
// linkage: two instruction sets must never share a function.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/elements.h"
#include "kernels/sparse_sets.h"

namespace confprune {
namespace {

template <int... I, class Body>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, I...>, Body body) {
  (body(std::integral_constant<int, I>{}), ...);
}

// The values of a slice in the type that is computed with.
template <class T, class Stored>
const T* widened(const Stored* values, int64_t count, T* out) {
  if constexpr (std::is_same_v<T, Stored>) {
    return values;
  } else {
    for (int64_t i = 0; i < count; ++i)
      out[i] = T(widen(values[i]));
    return out;
  }
}

// Batches: y[place, lanes] += Σ survivors · x[column, lanes], kBytes of lanes; x is without gaps.

template <class T, int kBytes>
struct Tile {
  static constexpr int kVector = std::min(kBytes, CONFPRUNE_VECTOR_BYTES);
  static constexpr int kVectors = kBytes / kVector;
  static constexpr int kWidth = kVector / int(sizeof(T));
  static constexpr int kLanes = kBytes / int(sizeof(T));
  // Rows whose sums are in registers together: few, for those that a step lacks go one by one.
  static constexpr int kRows = std::clamp(8 / kVectors, 1, 4);
  typedef T Vector __attribute__((vector_size(kVector)));
  typedef T Unaligned __attribute__((vector_size(kVector), aligned(alignof(T)), may_alias));

  static const Unaligned& at(const T* lanes, int v) {
    return *reinterpret_cast<const Unaligned*>(lanes + v * kWidth);
  }
  static Unaligned& at(T* lanes, int v) {
    return *reinterpret_cast<Unaligned*>(lanes + v * kWidth);
  }
};

// sums[row, lanes] += one survivor of each row · x[its column, lanes].
template <class T, int kBytes>
inline __attribute__((always_inline)) void add_step(
    typename Tile<T, kBytes>::Vector (&sums)[Tile<T, kBytes>::kRows][Tile<T, kBytes>::kVectors],
    const T* values, const uint8_t* columns, const T* x) {
  using L = Tile<T, kBytes>;
  const Four<T, L::kVector> four(values);
  uint32_t four_columns = 0;  // in one load
  std::memcpy(&four_columns, columns, L::kRows);
  unrolled(std::make_integer_sequence<int, L::kRows>{}, [&](auto i) {
    const T* lanes = x + ((four_columns >> (8 * i)) & 0xff) * L::kLanes;
    for (int v = 0; v < L::kVectors; ++v)
      sums[i][v] += four.get(i) * L::at(lanes, v);
  });
}

// y[row, lanes] += the first `steps` survivors of kRows rows of a slice, for each of them.
template <class T, int kBytes>
inline void multiply_rows(const uint8_t* places, const uint16_t* starts, int64_t steps,
                          const T* values, const uint8_t* columns, const T* x, T* y,
                          int64_t pitch) {
  using L = Tile<T, kBytes>;
  typename L::Vector sums[L::kRows][L::kVectors];
  for (int r = 0; r < L::kRows; ++r)
    for (int v = 0; v < L::kVectors; ++v)
      sums[r][v] = L::at(y + places[r] * pitch, v);
  for (int64_t step = 0; step < steps; ++step)
    add_step<T, kBytes>(sums, values + starts[step], columns + starts[step], x);
  for (int r = 0; r < L::kRows; ++r)
    for (int v = 0; v < L::kVectors; ++v)
      L::at(y + places[r] * pitch, v) = sums[r][v];
}

template <class T, int kBytes, class Stored>
void multiply_cell(const SparseMatrix& weight, int64_t cell, const T* x, T* y, int64_t pitch) {
  using L = Tile<T, kBytes>;
  const int64_t* bounds = weight.cells + 2 * cell;
  const Stored* stored = static_cast<const Stored*>(weight.values) + bounds[0];
  const uint8_t* columns = weight.columns + bounds[0];
  const uint8_t* next = weight.slices + bounds[1];
  const uint8_t* end = weight.slices + bounds[3];
  uint16_t starts[kSparseBlock + 1];  // of the steps; those that all rows share come first
  for (int64_t step = 0; step <= kSparseBlock; ++step)
    starts[step] = uint16_t(step * kSliceRows);
  T wide_values[std::is_same_v<T, Stored> ? 1 : kSparseBlock * kSliceRows];
  while (next < end) {
    const Slice slice = read_slice(next);
    next = slice.next_slice;
    int64_t steps = slice.full + slice.partial;
    for (int64_t step = slice.full; step < steps; ++step)
      starts[step + 1] = uint16_t(starts[step] + slice.step_rows[step - slice.full]);
    const int64_t survivors = starts[steps];
    const T* values = widened<T>(stored, survivors, wide_values);
    for (int64_t first = 0; first + L::kRows <= slice.rows; first += L::kRows) {
      // A step is taken by rows that are there together.
      while (steps > slice.full && slice.step_rows[steps - 1 - slice.full] < first + L::kRows)
        --steps;
      multiply_rows<T, kBytes>(slice.places + first, starts, steps, values + first, columns + first,
                               x, y, pitch);
    }
    // Those that are left over of a step go one by one.
    for (int64_t step = slice.full; step < slice.full + slice.partial; ++step) {
      const int64_t rows = slice.step_rows[step - slice.full];
      for (int64_t r = rows / L::kRows * L::kRows; r < rows; ++r) {
        const int64_t at = starts[step] + r;
        for (int v = 0; v < L::kVectors; ++v)
          L::at(y + slice.places[r] * pitch, v) +=
              values[at] * L::at(x + columns[at] * L::kLanes, v);
      }
    }
    for (int64_t step = slice.full + 1; step <= slice.full + slice.partial; ++step)
      starts[step] = uint16_t(step * kSliceRows);
    stored += survivors;
    columns += survivors;
  }
}

// A single x: sums[place] = Σ survivors · x[column], sixteen rows in the lanes.

// sums[places[r]] = of_slice[r].
template <class T>
inline void place_sums(const typename Lookup<T>::Sums& of_slice, const uint8_t* places,
                       int64_t rows, T* sums) {
  if (rows == kSliceRows) {
    uint64_t all[kSliceRows / 8];  // two loads for sixteen
    std::memcpy(all, places, sizeof(all));
    unrolled(std::make_integer_sequence<int, kSliceRows>{},
             [&](auto r) { sums[uint8_t(all[r / 8] >> r % 8 * 8)] = of_slice[int(r)]; });
  } else {
    for (int r = 0; r < rows; ++r)
      sums[places[r]] = of_slice[r];
  }
}

template <class T, class Stored>
void multiply_cell_single(const SparseMatrix& weight, int64_t cell, const T* x, T* sums) {
  const int64_t* bounds = weight.cells + 2 * cell;
  const Stored* values = static_cast<const Stored*>(weight.values) + bounds[0];
  const uint8_t* columns = weight.columns + bounds[0];
  const uint8_t* next = weight.slices + bounds[1];
  const uint8_t* end = weight.slices + bounds[3];
  const Lookup<T> lookup(x);
  // A slice's sums are put in place while the next one's are on their way.
  typename Lookup<T>::Sums of_slice{};
  const uint8_t* places = nullptr;
  int64_t rows = 0;
  while (next < end) {
    const Slice slice = read_slice(next);
    next = slice.next_slice;
    typename Lookup<T>::Sums of_next;
    const int64_t survivors = lookup.sums(slice, values, columns, &of_next);
    values += survivors;
    columns += survivors;
    place_sums(of_slice, places, rows, sums);
    of_slice = of_next;
    places = slice.places;
    rows = slice.rows;
  }
  place_sums(of_slice, places, rows, sums);
}

// Packing: [lane][element] to [element][lane] and back.

constexpr int64_t kSegment = 64;  // elements that are turned together
constexpr int64_t kMostLanes = kTileBytes / int64_t(sizeof(float));

// turned[i] = the i-th elements of four quads.
template <class Quad>
inline void turn_quads(const Quad (&r)[4], Quad (&turned)[4]) {
#if defined(__clang__)
#define CONFPRUNE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef decltype(r[0] < r[0]) Index;
#define CONFPRUNE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
  const Quad low01 = CONFPRUNE_SHUFFLE(r[0], r[1], 0, 4, 1, 5);
  const Quad high01 = CONFPRUNE_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
  const Quad low23 = CONFPRUNE_SHUFFLE(r[2], r[3], 0, 4, 1, 5);
  const Quad high23 = CONFPRUNE_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  turned[0] = CONFPRUNE_SHUFFLE(low01, low23, 0, 1, 4, 5);
  turned[1] = CONFPRUNE_SHUFFLE(low01, low23, 2, 3, 6, 7);
  turned[2] = CONFPRUNE_SHUFFLE(high01, high23, 0, 1, 4, 5);
  turned[3] = CONFPRUNE_SHUFFLE(high01, high23, 2, 3, 6, 7);
#undef CONFPRUNE_SHUFFLE
}

// to[j, i] = from[i, j] for i < rows, j < columns.
template <class T>
void turn(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, T* to,
          int64_t to_pitch) {
  typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      Quad quads[4], turned[4];
      for (int k = 0; k < 4; ++k)
        quads[k] = *reinterpret_cast<const Unaligned*>(from + (i + k) * from_pitch + j);
      turn_quads(quads, turned);
      for (int k = 0; k < 4; ++k)
        *reinterpret_cast<Unaligned*>(to + (j + k) * to_pitch + i) = turned[k];
    }
    for (; j < columns; ++j)
      for (int64_t k = i; k < i + 4; ++k)
        to[j * to_pitch + k] = from[k * from_pitch + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      to[j * to_pitch + i] = from[i * from_pitch + j];
}

// Lines are short, a call of memcpy for each would show.
template <class T>
inline void copy_line(const T* from, int64_t count, T* to) {
  constexpr int64_t kPiece = 64 / int64_t(sizeof(T));
  for (; count >= kPiece; count -= kPiece, from += kPiece, to += kPiece)
    std::memcpy(to, from, 64);
  for (int64_t piece = kPiece / 2; piece > 0; piece /= 2)
    if (count & piece) {
      switch (piece * sizeof(T)) {
        case 32:
          std::memcpy(to, from, 32);
          break;
        case 16:
          std::memcpy(to, from, 16);
          break;
        case 8:
          std::memcpy(to, from, 8);
          break;
        default:
          std::memcpy(to, from, sizeof(T));
      }
      from += piece;
      to += piece;
    }
}

template <class T, class Input>
inline void widen_line(const Input* from, int64_t step, int64_t count, T* to) {
  if constexpr (std::is_same_v<T, Input>)
    if (step == 1)
      return copy_line(from, count, to);
  const auto each = [=](auto by) {
    for (int64_t i = 0; i < count; ++i)
      to[i] = T(widen(from[i * by]));
  };
  if (step == 1)
    each(std::integral_constant<int64_t, 1>{});
  else if (step == 2)
    each(std::integral_constant<int64_t, 2>{});
  else
    each(step);
}

template <class T, class Output>
inline void narrow_line(const T* from, int64_t count, Output* to, int64_t step) {
  if constexpr (std::is_same_v<T, Output>)
    if (step == 1)
      return copy_line(from, count, to);
  if (step == 1)
    for (int64_t i = 0; i < count; ++i)
      narrow(from[i], to + i);
  else
    for (int64_t i = 0; i < count; ++i)
      narrow(from[i], to + i * step);
}

// to[i, lane] = from[lane · lane_step + i · step]; lanes past `valid` are 0. A segment at a time,
// so that lines are whole in the cache when they are left.
template <class T, class Input>
void gather_lanes(const Input* from, int64_t lane_step, int64_t step, int64_t valid, int64_t count,
                  T* to, int64_t lanes) {
  if (valid < lanes)
    for (int64_t i = 0; i < count; ++i)
      std::fill(to + i * lanes + valid, to + (i + 1) * lanes, T(0));
  T segment[kMostLanes * kSegment];
  for (int64_t first = 0; first < count; first += kSegment) {
    const int64_t size = std::min(kSegment, count - first);
    if constexpr (std::is_same_v<T, Input>)
      if (step == 1) {
        turn(from + first, lane_step, valid, size, to + first * lanes, lanes);
        continue;
      }
    for (int64_t lane = 0; lane < valid; ++lane)
      widen_line(from + lane * lane_step + first * step, step, size, segment + lane * kSegment);
    turn(segment, kSegment, valid, size, to + first * lanes, lanes);
  }
}

// to[lane · lane_step + i · step] = from[i, lane] for the valid lanes, four of them at a time: more
// lines of the output, often a power of two apart, would drive each other out of the cache.
template <class T, class Output>
void scatter_lanes(const T* from, int64_t pitch, int64_t valid, int64_t count, Output* to,
                   int64_t lane_step, int64_t step) {
  T segment[kMostLanes * kSegment];
  for (int64_t first = 0; first < count; first += kSegment) {
    const int64_t size = std::min(kSegment, count - first);
    if constexpr (std::is_same_v<T, Output>)
      if (step == 1) {
        for (int64_t lane = 0; lane < valid; lane += 4)
          turn(from + first * pitch + lane, pitch, size, std::min<int64_t>(4, valid - lane),
               to + lane * lane_step + first, lane_step);
        continue;
      }
    turn(from + first * pitch, pitch, size, valid, segment, kSegment);
    for (int64_t lane = 0; lane < valid; ++lane)
      narrow_line(segment + lane * kSegment, size, to + lane * lane_step + first * step, step);
  }
}

// One task.

template <class T>
struct Task {
  const SparsePlan& plan;
  const SparseProduct& product;
  const Window& window;
  const PackedLayout& packed;
  Chunks chunks;
  int64_t first_chunk, last_chunk;
  int64_t example, examples;  // those of this task
  int64_t begin[kWindowDims];
  int64_t end[kWindowDims];
  T* aligned;  // a block of columns
  T* input;
  T* output;

  Task(const SparsePlan& plan_, int64_t task, void* scratch)
      : plan(plan_),
        product(plan.product),
        window(product.window),
        packed(plan.packed),
        chunks(product.weight.rows, product.weight.row_size, product.weight.groups) {
    const int64_t row_group = task % plan.row_groups;
    const int64_t band = task / plan.row_groups % plan.bands;
    first_chunk = row_group * plan.chunks_per_group;
    last_chunk = std::min(chunks.count, first_chunk + plan.chunks_per_group);
    example = task / plan.row_groups / plan.bands * plan.together;
    examples = std::min(plan.together, product.batch - example);
    for (int d = 0; d < kWindowDims; ++d) {
      begin[d] = d == plan.band_dim ? band * plan.band : 0;
      end[d] =
          d == plan.band_dim ? std::min(window.output[d], begin[d] + plan.band) : window.output[d];
    }
    constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));
    aligned = static_cast<T*>(scratch);
    input = aligned + kSparseBlock * kTile;
    const int64_t size = window.channels * packed.channel_size + kSparseBlock + 2 * kTile;
    output = input + (size + kTile - 1) / kTile * kTile;
  }
};

// One line of a phase: inputs `step` apart, zeros before `low` and from `high` on.
template <class T, class Input>
inline void pack_line(const Input* from, int64_t step, int64_t low, int64_t high, int64_t size,
                      T* line) {
  for (int64_t i = 0; i < low; ++i)
    line[i] = T(0);
  for (int64_t i = high; i < size; ++i)
    line[i] = T(0);
  widen_line(from, step, high - low, line + low);
}

template <class T, class Input>
void pack_window(const Task<T>& task) {
  const Window& w = task.window;
  const PackedLayout& p = task.packed;
  const Batch& x = task.product.x;
  const Input* base = static_cast<const Input*>(x.data) + task.example * x.batch_stride;
  int64_t extent[kWindowDims];  // of this band, which may be shorter than the others
  for (int d = 0; d < kWindowDims; ++d)
    extent[d] = task.end[d] - task.begin[d] + p.reach[d];
  for (int64_t channel = 0; channel < w.channels; ++channel) {
    const Input* source = base + channel * x.channel_stride;
    T* plane = task.input + channel * p.channel_size;
    for (int64_t p0 : p.phases[0])
      for (int64_t p1 : p.phases[1])
        for (int64_t p2 : p.phases[2]) {
          const int64_t step = w.stride[2];
          const int64_t shift = task.begin[2] * step + p2 - w.padding[2];
          const int64_t low = std::clamp<int64_t>((-shift + step - 1) / step, 0, extent[2]);
          const int64_t high =
              std::clamp<int64_t>((w.input[2] - shift + step - 1) / step, low, extent[2]);
          for (int64_t i0 = 0; i0 < extent[0]; ++i0)
            for (int64_t i1 = 0; i1 < extent[1]; ++i1) {
              const int64_t a0 = (task.begin[0] + i0) * w.stride[0] + p0 - w.padding[0];
              const int64_t a1 = (task.begin[1] + i1) * w.stride[1] + p1 - w.padding[1];
              const bool inside = a0 >= 0 && a0 < w.input[0] && a1 >= 0 && a1 < w.input[1];
              const int64_t at = a0 * x.position_strides[0] + a1 * x.position_strides[1] +
                                 (low * step + shift) * x.position_strides[2];
              pack_line(inside ? source + at : source, step * x.position_strides[2], low,
                        inside ? high : low, extent[2],
                        plane + (i0 * p.extent[1] + i1) * p.extent[2]);
            }
          plane += p.plane;
        }
  }
  // Tiles may read past the last position; what they make of it is not stored.
  T* slack = task.input + w.channels * p.channel_size;
  std::fill(slack, slack + kTileBytes / int64_t(sizeof(T)), T(0));
}

// Calls body with the bytes of the smallest tile that holds so many lanes as a constant.
template <class T, class Body>
void with_tile(int64_t lanes, Body body) {
  constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));
  if (lanes > kTile / 2)
    body(std::integral_constant<int, kTileBytes>{});
  else if (lanes > kTile / 4)
    body(std::integral_constant<int, kTileBytes / 2>{});
  else
    body(std::integral_constant<int, kTileBytes / 4>{});
}

template <class T>
void start_rows(const Task<T>& task, int64_t row, int64_t rows, int64_t pitch) {
  const T* bias = static_cast<const T*>(task.product.bias);
  for (int64_t r = 0; r < rows; ++r)
    std::fill_n(task.output + r * pitch, pitch, bias == nullptr ? T(0) : bias[row + r]);
}

template <class T, class Stored, class InOut>
void run_linear(const Task<T>& task) {
  const Batch &x = task.product.x, &y = task.product.y;
  const int64_t lanes = task.plan.together;
  gather_lanes(static_cast<const InOut*>(x.data) + task.example * x.batch_stride, x.batch_stride,
               x.channel_stride, task.examples, task.window.channels, task.input, lanes);
  for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
    const int64_t row = task.chunks.begin(chunk), rows = task.chunks.rows(chunk);
    start_rows(task, row, rows, lanes);
    with_tile<T>(lanes, [&](auto bytes) {
      for (int64_t block = 0; block < task.chunks.blocks; ++block)
        multiply_cell<T, bytes(), Stored>(task.product.weight, chunk * task.chunks.blocks + block,
                                          task.input + block * kSparseBlock * lanes, task.output,
                                          lanes);
    });
    scatter_lanes(
        task.output, lanes, task.examples, rows,
        static_cast<InOut*>(y.data) + task.example * y.batch_stride + row * y.channel_stride,
        y.batch_stride, y.channel_stride);
  }
}

// Some lanes of a convolution. A block of columns is copied to where its lanes are aligned: every
// column is read about once for ten rows, and a load across two cache lines counts twice.
template <class T, int kBytes, class Stored>
void convolve_tile(const Task<T>& task, const T* input, T* y, int64_t pitch) {
  constexpr int64_t kLanes = kBytes / int64_t(sizeof(T));
  const Chunks& chunks = task.chunks;
  const int64_t row_size = task.product.weight.row_size;
  const int64_t group_size =
      task.window.channels / task.product.weight.groups * task.packed.channel_size;
  int64_t last = 0;
  for (int64_t first = task.first_chunk; first < task.last_chunk; first = last) {
    const int64_t group = chunks.group(first);
    last = std::min(task.last_chunk, (group + 1) * chunks.per_group);
    for (int64_t block = 0; block < chunks.blocks; ++block) {
      const int32_t* offsets = task.packed.offsets.data() + block * kSparseBlock;
      const int64_t columns = std::min(kSparseBlock, row_size - block * kSparseBlock);
      for (int64_t c = 0; c < columns; ++c)
        std::memcpy(task.aligned + c * kLanes, input + group * group_size + offsets[c], kBytes);
      for (int64_t chunk = first; chunk < last; ++chunk)
        multiply_cell<T, kBytes, Stored>(
            task.product.weight, chunk * chunks.blocks + block, task.aligned,
            y + (chunks.begin(chunk) - chunks.begin(task.first_chunk)) * pitch, pitch);
    }
  }
}

template <class T, class Stored, class InOut>
void run_window(const Task<T>& task) {
  constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));
  const Batch& y = task.product.y;
  const int64_t row = task.chunks.begin(task.first_chunk);
  const int64_t rows =
      task.chunks.begin(task.last_chunk - 1) + task.chunks.rows(task.last_chunk - 1) - row;
  const int64_t n1 = task.end[1] - task.begin[1], n2 = task.end[2] - task.begin[2];
  // A line is what stands side by side in the packed input: the positions of the last two
  // dimensions, and the padding between them.
  const int64_t width = task.packed.extent[2], lanes = (n1 - 1) * width + n2;
  const int64_t pitch = ((lanes + kTile - 1) / kTile | 1) * kTile;
  pack_window<T, InOut>(task);
  for (int64_t i0 = 0; i0 < task.end[0] - task.begin[0]; ++i0) {
    start_rows(task, row, rows, pitch);
    const T* input = task.input + i0 * task.packed.extent[1] * width;
    for (int64_t lane = 0; lane < lanes; lane += kTile)
      with_tile<T>(lanes - lane, [&](auto bytes) {
        convolve_tile<T, bytes(), Stored>(task, input + lane, task.output + lane, pitch);
      });
    InOut* out = static_cast<InOut*>(y.data) + task.example * y.batch_stride +
                 row * y.channel_stride + (task.begin[0] + i0) * y.position_strides[0] +
                 task.begin[1] * y.position_strides[1] + task.begin[2] * y.position_strides[2];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i1 = 0; i1 < n1; ++i1)
        narrow_line(task.output + r * pitch + i1 * width, n2,
                    out + r * y.channel_stride + i1 * y.position_strides[1], y.position_strides[2]);
  }
}

template <class T>
inline void clear(T (&rows)[kMostChunkRows]) {
  using L = Tile<T, CONFPRUNE_VECTOR_BYTES>;
  for (int64_t r = 0; r < kMostChunkRows; r += L::kLanes)
    L::at(rows + r, 0) = typename L::Vector{};
}

// output[row] += Σ of a chunk's rows. They come in another order in each block: their sums are put
// in order, and then added up.
template <class T, class Stored>
void add_chunk_single(const Task<T>& task, int64_t chunk, T (&output)[kMostChunkRows]) {
  using L = Tile<T, CONFPRUNE_VECTOR_BYTES>;
  constexpr int64_t kTogether = 8;
  alignas(64) T sums[kTogether][kMostChunkRows];
  for (int64_t first = 0; first < task.chunks.blocks; first += kTogether) {
    const int64_t blocks = std::min(kTogether, task.chunks.blocks - first);
    for (int64_t b = 0; b < blocks; ++b) {
      clear(sums[b]);
      multiply_cell_single<T, Stored>(task.product.weight, chunk * task.chunks.blocks + first + b,
                                      task.input + (first + b) * kSparseBlock, sums[b]);
    }
    // In vectors by hand: with -fwrapv, which Python asks of its extensions, GCC takes row by row.
    for (int64_t r = 0; r < task.chunks.rows(chunk); r += L::kLanes)
      for (int64_t b = 0; b < blocks; ++b)
        L::at(output + r, 0) += L::at(sums[b] + r, 0);
  }
}

template <class T, class Stored, class InOut>
void run_single(const Task<T>& task) {
  const Batch &x = task.product.x, &y = task.product.y;
  const int64_t size = task.window.channels;
  widen_line(static_cast<const InOut*>(x.data) + task.example * x.batch_stride, x.channel_stride,
             size, task.input);
  std::fill(task.input + size, task.input + task.chunks.blocks * kSparseBlock, T(0));
  for (int64_t block = 0; block < task.chunks.blocks; ++block)
    Lookup<T>::arrange(task.input + block * kSparseBlock);
  const T* bias = static_cast<const T*>(task.product.bias);
  for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
    const int64_t rows = task.chunks.rows(chunk), row = task.chunks.begin(chunk);
    alignas(64) T output[kMostChunkRows];
    clear(output);
    if (bias != nullptr)
      std::copy_n(bias + row, rows, output);
    add_chunk_single<T, Stored>(task, chunk, output);
    narrow_line(
        output, rows,
        static_cast<InOut*>(y.data) + task.example * y.batch_stride + row * y.channel_stride,
        y.channel_stride);
  }
}

template <class Body>
void with_narrow_element(Element element, Body body) {
  switch (element) {
    case Element::float16:
      return body(Half{});
    case Element::bfloat16:
      return body(BFloat16{});
    default:
      return body(float{});
  }
}

template <class T, class Stored, class InOut>
void run_typed(const SparsePlan& plan, int64_t index, void* scratch) {
  const Task<T> task(plan, index, scratch);
  if (plan.single)
    run_single<T, Stored, InOut>(task);
  else if (plan.linear)
    run_linear<T, Stored, InOut>(task);
  else
    run_window<T, Stored, InOut>(task);
}

void run_task(const SparsePlan& plan, int64_t index, void* scratch) {
  if (plan.product.weight.element == Element::float64)
    return run_typed<double, double, double>(plan, index, scratch);
  with_narrow_element(plan.product.weight.element, [&](auto stored) {
    with_narrow_element(plan.product.x.element, [&](auto in_out) {
      run_typed<float, decltype(stored), decltype(in_out)>(plan, index, scratch);
    });
  });
}

}  // namespace
}  // namespace confprune
