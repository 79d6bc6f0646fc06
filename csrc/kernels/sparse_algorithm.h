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

// These come after the headers that they use.
#include "kernels/sparse_cells.h"
#include "kernels/sparse_lines.h"

namespace confprune {
namespace {

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
