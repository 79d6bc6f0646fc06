// 3 x 3 convolutions by Winograd's minimal filtering, over a vector width; part of
// grid_algorithm.h.
//
// 4 x 4 neighbouring outputs take 36 multiplications a channel instead of 144 (Lavin & Gray, arXiv
// 1509.09308, section 4.2), but the transformed weights are dense: it pays at levels where many
// weights are alive. Tiles of 6 x 6 inputs are transformed a few at a time, each of their 36 points
// is a matrix product over the channels, and the products are transformed back, a few rows at a
// time. Products leave memory idle, so that meanwhile what the transforms read and write next is
// fetched into the second-level cache.

namespace confprune {
namespace {

// Rows and vectors of the dense product whose sums stay in registers.
constexpr int kDenseRows = CONFPRUNE_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kDenseVectors = 3;
static_assert(kFilteredRows % kDenseRows == 0);

typedef float DenseColumn __attribute__((vector_size(kDenseRows * sizeof(float))));
typedef float UnalignedDenseColumn
    __attribute__((vector_size(kDenseRows * sizeof(float)), aligned(alignof(float)), may_alias));

template <class T>
inline typename Lanes<T>::Vector load(const T* at) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(at);
}

// The polynomials of the transforms are evaluated at 0, kNear, -kNear, kFar, -kFar and infinity.
// With these points (kNear² = 1/2, kFar² = 2) the rounding errors are a quarter of those with 1
// and 2.
constexpr float kNear = 0.70710678f, kFar = 1.41421356f;

// The transform of three weights.
template <class V>
inline void weight_transform(V a, V b, V c, V (&out)[kSide]) {
  const V near = (a + 0.5f * c) * (-1 / 1.5f), near_odd = b * (-kNear / 1.5f);
  const V far = (a + 2.0f * c) * (1.0f / 6), far_odd = b * (kFar / 6);
  out[0] = a;
  out[1] = near + near_odd;
  out[2] = near - near_odd;
  out[3] = far + far_odd;
  out[4] = far - far_odd;
  out[5] = c;
}

// The transform of six inputs.
template <class V>
inline void input_transform(const V (&x)[kSide], V (&out)[kSide]) {
  const V near = x[4] - 2.0f * x[2], near_odd = x[3] - 2.0f * x[1];
  const V far = x[4] - 0.5f * x[2], far_odd = x[3] - 0.5f * x[1];
  out[0] = x[0] + (x[4] - 2.5f * x[2]);
  out[1] = near + kNear * near_odd;
  out[2] = near - kNear * near_odd;
  out[3] = far + kFar * far_odd;
  out[4] = far - kFar * far_odd;
  out[5] = x[1] + (x[5] - 2.5f * x[3]);
}

// The four outputs of six products.
template <class V>
inline void output_transform(const V (&m)[kSide], V (&out)[kOutputSide]) {
  const V near = m[1] + m[2], near_odd = kNear * (m[1] - m[2]);
  const V far = m[3] + m[4], far_odd = kFar * (m[3] - m[4]);
  out[0] = m[0] + (near + far);
  out[1] = near_odd + far_odd;
  out[2] = 0.5f * near + 2.0f * far;
  out[3] = 0.5f * near_odd + (2.0f * far_odd + m[5]);
}

// The weights of rows [row_begin, row_end) at a level, transformed: [point, row / kDenseRows,
// channel, kDenseRows], with rows of zeros at the end. `dense` has room for kDenseRows rows.
void winograd_weights(const GridDetails& d, int64_t level, int64_t row_begin, int64_t row_end,
                      float* dense, int64_t point_size, float* out) {
  const PrefixRows& rows = d.product.rows;
  const float* values = static_cast<const float*>(rows.values);
  const int64_t channels = d.product.convolution.channels;
  const int64_t groups = (row_end - row_begin + kDenseRows - 1) / kDenseRows;
  for (int64_t group = 0; group < groups; ++group, out += channels * kDenseRows) {
    const int64_t first = row_begin + group * kDenseRows;
    std::fill(dense, dense + rows.row_size * kDenseRows, 0.0f);
    for (int64_t row = first; row < std::min(row_end, first + kDenseRows); ++row)
      for (int64_t block = 0; block < rows.blocks; ++block) {
        const int64_t cell = block * rows.rows + row, start = rows.starts[cell];
        const int64_t count = rows.counts[level * rows.blocks * rows.rows + cell];
        float* to = dense + block * rows.block * kDenseRows + (row - first);
        for (int64_t p = start; p < start + count; ++p)
          to[rows.columns[p] * kDenseRows] = values[p];
      }
    for (int64_t channel = 0; channel < channels; ++channel) {
      const float* g = dense + channel * 9 * kDenseRows;
      DenseColumn lines[3][kSide], points[kSide];
      for (int c = 0; c < 3; ++c) {
        DenseColumn column[3];
        for (int r = 0; r < 3; ++r)
          column[r] = *reinterpret_cast<const UnalignedDenseColumn*>(g + (r * 3 + c) * kDenseRows);
        weight_transform(column[0], column[1], column[2], lines[c]);
      }
      for (int r = 0; r < kSide; ++r) {
        weight_transform(lines[0][r], lines[1][r], lines[2][r], points);
        for (int c = 0; c < kSide; ++c)
          *reinterpret_cast<UnalignedDenseColumn*>(out + (r * kSide + c) * point_size +
                                                   channel * kDenseRows) = points[c];
      }
    }
  }
}

// Examples of an input in the lanes; what is outside of [begin, end) is padding.
struct Image {
  const float* data;  // of the example and channel 0, at `begin`
  int64_t channel_stride;
  int64_t strides[2];
  int64_t begin[2], end[2];
};

// The inputs of a tile, from its first on; those outside of [first, last) are padding.
struct TileInputs {
  const float* corner;
  int first[2], last[2];
  bool whole;
};

TileInputs tile_inputs(const GridDetails& d, const Image& image, int64_t tile) {
  const int64_t at[2] = {tile / d.winograd.tiles[1] * kOutputSide,
                         tile % d.winograd.tiles[1] * kOutputSide};
  TileInputs inputs;
  inputs.corner = image.data + (at[0] - image.begin[0]) * image.strides[0] +
                  (at[1] - image.begin[1]) * image.strides[1];
  inputs.whole = true;
  for (int i = 0; i < 2; ++i) {
    inputs.first[i] = int(std::max<int64_t>(0, image.begin[i] - at[i]));
    inputs.last[i] = int(std::min<int64_t>(kSide, image.end[i] - at[i]));
    inputs.whole = inputs.whole && inputs.first[i] == 0 && inputs.last[i] == kSide;
  }
  return inputs;
}

// One vector of examples of a tile of a channel, to [point].
template <bool whole>
inline void transform_inputs(const TileInputs& tile, const float* from, const Image& image,
                             int64_t ahead, float* to, Finite<float>& finite) {
  using L = Lanes<float>;
  typename L::Vector columns[kSide][kSide];
  unrolled<kSide>([&](auto c) {
    typename L::Vector x[kSide];
    const bool column_inside = c >= tile.first[1] && c < tile.last[1];
    unrolled<kSide>([&](auto r) {
      const float* at = from + r * image.strides[0] + c * image.strides[1];
      __builtin_prefetch(at + ahead);
      x[r] = whole || (column_inside && r >= tile.first[0] && r < tile.last[0])
                 ? load(at)
                 : typename L::Vector{};
    });
    input_transform(x, columns[c]);
  });
  unrolled<kSide>([&](auto r) {
    typename L::Vector x[kSide], points[kSide];
    unrolled<kSide>([&](auto c) { x[c] = columns[c][r]; });
    input_transform(x, points);
    unrolled<kSide>([&](auto c) {
      *reinterpret_cast<typename L::Unaligned*>(to + (r * kSide + c) * L::kWidth) = points[c];
    });
    if (r == 0 || r == 1 || r == 5)  // each input is part of one of these points
      finite.look(points[0] + points[1] + points[5]);
  });
}

// Tiles [begin, end) of an image, to [channel, tile, vector of examples, point].
void winograd_input(const GridDetails& d, const Image& image, int64_t begin, int64_t end,
                    float* out, Finite<float>& finite) {
  using L = Lanes<float>;
  const int64_t channels = d.product.convolution.channels, chunk = d.packed.chunk;
  TileInputs tiles[8];
  for (int64_t tile = begin; tile < end; ++tile)
    tiles[tile - begin] = tile_inputs(d, image, tile);
  for (int64_t channel = 0; channel < channels; ++channel)
    for (int64_t t = 0; t < end - begin; ++t) {
      const TileInputs& tile = tiles[t];
      const float* from = tile.corner + channel * image.channel_stride;
      for (int64_t b = 0; b < chunk; b += L::kWidth, out += L::kWidth * kPointRoom)
        if (tile.whole)
          transform_inputs<true>(tile, from + b, image, image.channel_stride, out, finite);
        else
          transform_inputs<false>(tile, from + b, image, image.channel_stride, out, finite);
    }
}

// One point's sums [kDenseRows, V vectors] of weights [depth, kDenseRows] and x [depth, .., point];
// `stride` from one depth or row to the next.
template <int V>
void dense_tile(const float* weights, const float* x, int64_t depth, int64_t stride, float* out) {
  using L = Lanes<float>;
  constexpr int64_t kNext = L::kWidth * kPointRoom;
  typename L::Vector sum[kDenseRows][V], input[V];
  unrolled<V>([&](auto v) { input[v] = load(x + v * kNext); });
  unrolled<kDenseRows>(
      [&](auto r) { unrolled<V>([&](auto v) { sum[r][v] = weights[r] * input[v]; }); });
  for (int64_t i = 1; i < depth; ++i) {
    x += stride;
    weights += kDenseRows;
    unrolled<V>([&](auto v) { input[v] = load(x + v * kNext); });
    unrolled<kDenseRows>(
        [&](auto r) { unrolled<V>([&](auto v) { sum[r][v] += weights[r] * input[v]; }); });
  }
  unrolled<kDenseRows>([&](auto r) {
    unrolled<V>([&](auto v) {
      *reinterpret_cast<typename L::Unaligned*>(out + r * stride + v * kNext) = sum[r][v];
    });
  });
}

// The outputs of a tile of one vector of examples, from their products [point].
inline void transform_outputs(const float* products,
                              typename Lanes<float>::Vector (&sums)[kOutputSide][kOutputSide]) {
  using L = Lanes<float>;
  typename L::Vector half[kSide][kOutputSide];
  unrolled<kSide>([&](auto column) {
    typename L::Vector m[kSide];
    unrolled<kSide>([&](auto r) { m[r] = load(products + (r * kSide + column) * L::kWidth); });
    output_transform(m, half[column]);
  });
  unrolled<kOutputSide>([&](auto r) {
    typename L::Vector m[kSide];
    unrolled<kSide>([&](auto column) { m[column] = half[column][r]; });
    output_transform(m, sums[r]);
  });
}

// Where the outputs of a tile are; the last tiles may stand out.
struct TileOutputs {
  int64_t corner;
  int lines, positions;
};

TileOutputs tile_outputs(const GridDetails& d, int64_t tile) {
  const Convolution& c = d.product.convolution;
  const Activation& layout = d.product.y;
  const int64_t line = tile / d.winograd.tiles[1] * kOutputSide;
  const int64_t position = tile % d.winograd.tiles[1] * kOutputSide;
  return {line * layout.position_strides[1] + position * layout.position_strides[2],
          int(std::min<int64_t>(kOutputSide, c.output[1] - line)),
          int(std::min<int64_t>(kOutputSide, c.output[2] - position))};
}

// Tiles [begin, end) of one output row, from their products [tile, vector of examples, point].
template <class Output>
void winograd_output(const GridDetails& d, const Finish<float>& finish, int64_t row,
                     const float* products, int64_t begin, int64_t end, Output* y, int64_t count) {
  using L = Lanes<float>;
  const Activation& layout = d.product.y;
  const bool direct = std::is_same<Output, float>::value && layout.batch_stride == 1;
  for (int64_t at = begin; at < end; ++at) {
    const TileOutputs tile = tile_outputs(d, at);
    for (int64_t b = 0; b < d.packed.chunk; b += L::kWidth, products += L::kWidth * kPointRoom) {
      const int64_t valid = std::min<int64_t>(L::kWidth, count - b);
      typename L::Vector sums[kOutputSide][kOutputSide];
      transform_outputs(products, sums);
      unrolled<kOutputSide>([&](auto r) {
        unrolled<kOutputSide>([&](auto p) {
          if (r >= tile.lines || p >= tile.positions)
            return;
          const typename L::Vector sum[1] = {sums[r][p]};
          Output* to = y + tile.corner + r * layout.position_strides[1] +
                       p * layout.position_strides[2] + b * layout.batch_stride;
          if (direct && valid == L::kWidth) {
            finish.write(sum, row, reinterpret_cast<float*>(to));
          } else {
            float values[L::kWidth];
            finish.write(sum, row, values);
            for (int64_t i = 0; i < valid; ++i)
              narrow(values[i], to + i * layout.batch_stride);
          }
        });
      });
    }
  }
}

// Fetches a share of the channels of tiles [begin, end), beyond what their neighbours above and to
// the left have read. The examples of a position share a cache line. Inlined by force: a function
// that does nothing else counts as one without effect, and its calls as superfluous.
__attribute__((always_inline)) inline void prefetch_inputs(const GridDetails& d, const Image& image,
                                                           int64_t begin, int64_t end,
                                                           int64_t channel_begin,
                                                           int64_t channel_end) {
  constexpr int kOverlap = kSide - kOutputSide;
  for (int64_t tile = begin; tile < end && channel_begin < channel_end; ++tile) {
    const TileInputs inputs = tile_inputs(d, image, tile);
    for (int64_t channel = channel_begin; channel < channel_end; ++channel)
      for (int64_t r = std::max(kOverlap, inputs.first[0]); r < inputs.last[0]; ++r) {
        const float* line = inputs.corner + channel * image.channel_stride + r * image.strides[0];
        for (int64_t c = std::max(kOverlap, inputs.first[1]); c < inputs.last[1]; ++c)
          __builtin_prefetch(line + c * image.strides[1], 0, 2);
      }
  }
}

// Fetches what rows [row_begin, row_end) of tiles [begin, end) will write, and their residuals.
template <class Output>
__attribute__((always_inline)) inline void prefetch_outputs(const GridDetails& d,
                                                            const Finish<float>& finish,
                                                            int64_t begin, int64_t end,
                                                            int64_t row_begin, int64_t row_end,
                                                            const Output* y) {
  const Activation& layout = d.product.y;
  if (!std::is_same<Output, float>::value || layout.batch_stride != 1)
    return;
  for (int64_t at = begin; at < end; ++at) {
    const TileOutputs tile = tile_outputs(d, at);
    for (int64_t row = row_begin; row < row_end; ++row)
      for (int64_t r = 0; r < tile.lines; ++r)
        for (int64_t p = 0; p < tile.positions; ++p)
          finish.prefetch<2>(reinterpret_cast<const float*>(
              y + row * layout.channel_stride + tile.corner + r * layout.position_strides[1] +
              p * layout.position_strides[2]));
  }
}

// The images of `count` examples at x: where they are, or in scratch [channel, position, chunk].
template <class Input>
Image image_of(const GridDetails& d, const Input* x, int64_t count, float* scratch) {
  const Convolution& c = d.product.convolution;
  const Activation& layout = d.product.x;
  const int64_t chunk = d.packed.chunk;
  Image image{reinterpret_cast<const float*>(x),
              layout.channel_stride,
              {layout.position_strides[1], layout.position_strides[2]},
              {c.padding[1], c.padding[2]},
              {c.padding[1] + c.input[1], c.padding[2] + c.input[2]}};
  if (std::is_same<Input, float>::value && layout.batch_stride == 1 && count == chunk)
    return image;
  image.data = scratch;
  image.channel_stride = c.input[1] * c.input[2] * chunk;
  image.strides[0] = c.input[2] * chunk;
  image.strides[1] = chunk;
  for (int64_t channel = 0; channel < c.channels; ++channel)
    for (int64_t line = 0; line < c.input[1]; ++line, scratch += c.input[2] * chunk)
      pack_line(x + channel * layout.channel_stride + line * layout.position_strides[1],
                layout.position_strides[2], layout.batch_stride, count, 0, c.input[2], 1, chunk, 0,
                scratch);
  return image;
}

// Parts [part_begin, part_end) of the outputs at the k-th level by minimal filtering, rows
// [row_begin, row_end). A part has its share of the tiles, which need not be where its lines are.
template <class InOut>
void run_winograd(const GridDetails& d, int64_t k, int64_t row_begin, int64_t row_end,
                  int64_t part_begin, int64_t part_end, const InOut* x, float* scratch, InOut* y) {
  using L = Lanes<float>;
  const GridProduct& product = d.product;
  const Convolution& c = product.convolution;
  const Finish<float> finish(product, k);
  Finite<float> finite;
  const int64_t chunk = d.packed.chunk, channels = c.channels;
  const int64_t groups = (row_end - row_begin + kDenseRows - 1) / kDenseRows;
  const int64_t rows = groups * kDenseRows, most_lanes = d.winograd.step * chunk;
  const int64_t weight_size = rows * channels + kPointGap;
  float* weights = scratch + channels * c.input[1] * c.input[2] * chunk;
  float* inputs = weights + kPoints * weight_size;
  float* products = inputs + kPointRoom * channels * most_lanes;
  // The products are not there yet when a few rows of weights are laid out.
  winograd_weights(d, product.levels[k], row_begin, row_end, products, weight_size, weights);
  const int64_t tiles = d.winograd.tiles[0] * d.winograd.tiles[1];
  for (int64_t part = part_begin; part < part_end;) {
    // The parts of one chunk of examples together.
    const int64_t at = part / d.bands, stop = std::min(part_end, (at + 1) * d.bands);
    const int64_t tile_begin = (part - at * d.bands) * tiles / d.bands;
    const int64_t tile_end = (stop - at * d.bands) * tiles / d.bands;
    part = stop;
    const int64_t example = at * chunk, count = std::min(chunk, product.batch - example);
    const Image image = image_of(d, x + example * product.x.batch_stride, count, scratch);
    InOut* const outputs = y + example * product.y.batch_stride;
    for (int64_t begin = tile_begin; begin < tile_end; begin += d.winograd.step) {
      const int64_t end = std::min(tile_end, begin + d.winograd.step);
      const int64_t vectors = (end - begin) * chunk / L::kWidth;
      const int64_t stride = vectors * L::kWidth * kPointRoom;  // from channel to channel
      const int64_t next = std::min(tile_end, end + d.winograd.step);
      winograd_input(d, image, begin, end, inputs, finite);
      for (int64_t first = row_begin; first < row_end; first += kFilteredRows) {
        const int64_t last = std::min(row_end, first + kFilteredRows);
        for (int64_t point = 0; point < kPoints; ++point) {
          const auto share = [&](int64_t all) { return all * point / kPoints; };
          const auto share_end = [&](int64_t all) { return all * (point + 1) / kPoints; };
          prefetch_outputs(d, finish, begin, end, first + share(last - first),
                           first + share_end(last - first), outputs);
          if (last == row_end)
            prefetch_inputs(d, image, end, next, share(channels), share_end(channels));
          for (int64_t v = 0; v < vectors; v += kDenseVectors)
            for (int64_t row = first; row < last; row += kDenseRows)
              with_vectors<kDenseVectors>(vectors - v, [&](auto V) {
                const int64_t at = (v * kPointRoom + point) * L::kWidth;
                dense_tile<V()>(weights + point * weight_size + (row - row_begin) * channels,
                                inputs + at, channels, stride,
                                products + (row - first) * stride + at);
              });
        }
        for (int64_t row = first; row < last; ++row)
          winograd_output(d, finish, row, products + (row - first) * stride, begin, end,
                          outputs + row * product.y.channel_stride, count);
      }
    }
  }
  if (!finite.all())
    product.finite->store(false, std::memory_order_relaxed);
}

}  // namespace
}  // namespace confprune
