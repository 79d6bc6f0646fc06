// 3 x 3 convolutions by Winograd's minimal filtering, over a vector width; part of
// grid_algorithm.h.
//
// Four neighbouring outputs take 16 multiplications a channel instead of 36 (Lavin & Gray, arXiv
// 1509.09308, section 4.1), but the transformed weights are dense: it pays at levels where many
// weights are alive. The input is transformed a row of 2 x 2 tiles at a time, each of its 16 points
// is a matrix product over the channels, and the products are transformed back.

namespace confprune {
namespace {

// Rows and vectors of the dense product whose sums stay in registers.
constexpr int kDenseRows = CONFPRUNE_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kDenseVectors = 3;

template <class T>
inline typename Lanes<T>::Vector load(const T* at) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(at);
}

// (a, b, c, d) -> B^T (a, b, c, d), the transform of four inputs.
template <class V>
inline void input_transform(V a, V b, V c, V d, V (&out)[4]) {
  out[0] = a - c;
  out[1] = b + c;
  out[2] = c - b;
  out[3] = b - d;
}

// The weights of rows [row_begin, row_end) at a level, transformed: [point, row / kDenseRows,
// channel, kDenseRows], with rows of zeros at the end. `dense` has room for a row.
void winograd_weights(const GridDetails& d, int64_t level, int64_t row_begin, int64_t row_end,
                      float* dense, float* out) {
  const PrefixRows& rows = d.product.rows;
  const float* values = static_cast<const float*>(rows.values);
  const int64_t channels = d.product.convolution.channels;
  const int64_t groups = (row_end - row_begin + kDenseRows - 1) / kDenseRows;
  const int64_t point_size = groups * channels * kDenseRows;
  for (int64_t at = 0; at < groups * kDenseRows; ++at) {
    const int64_t row = row_begin + at;
    std::fill(dense, dense + rows.row_size, 0.0f);
    for (int64_t block = 0; row < row_end && block < rows.blocks; ++block) {
      const int64_t cell = block * rows.rows + row, start = rows.starts[cell];
      const int64_t count = rows.counts[level * rows.blocks * rows.rows + cell];
      for (int64_t p = start; p < start + count; ++p)
        dense[block * rows.block + rows.columns[p]] = values[p];
    }
    float* to = out + at / kDenseRows * channels * kDenseRows + at % kDenseRows;
    for (int64_t channel = 0; channel < channels; ++channel) {
      const float* g = dense + channel * 9;
      float half[4][3];
      for (int c = 0; c < 3; ++c) {
        const float sum = g[c] + g[6 + c];
        half[0][c] = g[c];
        half[1][c] = (sum + g[3 + c]) * 0.5f;
        half[2][c] = (sum - g[3 + c]) * 0.5f;
        half[3][c] = g[6 + c];
      }
      for (int r = 0; r < 4; ++r) {
        const float sum = half[r][0] + half[r][2];
        const float points[4] = {half[r][0], (sum + half[r][1]) * 0.5f, (sum - half[r][1]) * 0.5f,
                                 half[r][2]};
        for (int c = 0; c < 4; ++c)
          to[(r * 4 + c) * point_size + channel * kDenseRows] = points[c];
      }
    }
  }
}

// Tiles [begin, end) of a row.
struct Tiles {
  int64_t row, begin, end;
};

// Tiles of the packed input, to [point, channel, tile, example], `point_size` from point to point.
void winograd_input(const GridDetails& d, const float* packed, Tiles tiles, int64_t point_size,
                    float* out) {
  using L = Lanes<float>;
  const int64_t channels = d.product.convolution.channels, chunk = d.packed.chunk;
  const int64_t line = d.packed.extent[2] * chunk, lanes = (tiles.end - tiles.begin) * chunk;
  for (int64_t channel = 0; channel < channels; ++channel)
    for (int64_t b = 0; b < chunk; b += L::kWidth) {
      const float* from = packed + channel * d.packed.channel_size + 2 * tiles.row * line +
                          2 * tiles.begin * chunk + b;
      typename L::Vector columns[4][4];  // [column, point along the rows]
      for (int c = 0; c < 2; ++c)
        input_transform(load(from + c * chunk), load(from + line + c * chunk),
                        load(from + 2 * line + c * chunk), load(from + 3 * line + c * chunk),
                        columns[c]);
      float* to = out + channel * lanes + b;
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, from += 2 * chunk, to += chunk) {
        for (int c = 2; c < 4; ++c)
          input_transform(load(from + c * chunk), load(from + line + c * chunk),
                          load(from + 2 * line + c * chunk), load(from + 3 * line + c * chunk),
                          columns[c]);
        for (int r = 0; r < 4; ++r) {
          typename L::Vector points[4];
          input_transform(columns[0][r], columns[1][r], columns[2][r], columns[3][r], points);
          for (int c = 0; c < 4; ++c)
            *reinterpret_cast<typename L::Unaligned*>(to + (r * 4 + c) * point_size) = points[c];
        }
        for (int r = 0; r < 4; ++r) {
          columns[0][r] = columns[2][r];
          columns[1][r] = columns[3][r];
        }
      }
    }
}

// sums[kDenseRows, V vectors] of weights [depth, kDenseRows] and x [depth, stride].
template <int V>
void dense_tile(const float* weights, const float* x, int64_t depth, int64_t stride, float* out,
                int64_t out_stride) {
  using L = Lanes<float>;
  typename L::Vector sum[kDenseRows][V];
  for (int v = 0; v < V; ++v)
    for (int r = 0; r < kDenseRows; ++r)
      sum[r][v] = weights[r] * load(x + v * L::kWidth);
  for (int64_t i = 1; i < depth; ++i) {
    x += stride;
    weights += kDenseRows;
    typename L::Vector input[V];
    for (int v = 0; v < V; ++v)
      input[v] = load(x + v * L::kWidth);
    for (int r = 0; r < kDenseRows; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] += weights[r] * input[v];
  }
  for (int r = 0; r < kDenseRows; ++r)
    for (int v = 0; v < V; ++v)
      *reinterpret_cast<typename L::Unaligned*>(out + r * out_stride + v * L::kWidth) = sum[r][v];
}

// The products of one output row over some tiles, [point, ., tile, example] with `point_size` from
// point to point, to two lines of outputs [2 * tiles, example].
void winograd_output(const Finish<float>& finish, int64_t row, const float* products,
                     int64_t point_size, int64_t tiles, int64_t chunk, float* lines,
                     int64_t line_stride) {
  using L = Lanes<float>;
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t b = 0; b < chunk; b += L::kWidth) {
      const float* from = products + tile * chunk + b;
      typename L::Vector half[2][4];
      for (int c = 0; c < 4; ++c) {
        typename L::Vector m[4];
        for (int r = 0; r < 4; ++r)
          m[r] = load(from + (r * 4 + c) * point_size);
        half[0][c] = m[0] + m[1] + m[2];
        half[1][c] = m[1] - m[2] - m[3];
      }
      for (int r = 0; r < 2; ++r) {
        const typename L::Vector left[1] = {half[r][0] + half[r][1] + half[r][2]};
        const typename L::Vector right[1] = {half[r][1] - half[r][2] - half[r][3]};
        float* to = lines + r * line_stride + 2 * tile * chunk + b;
        finish.write(left, row, to);
        finish.write(right, row, to + chunk);
      }
    }
}

// A whole task by minimal filtering: rows [row_begin, row_end) of the packed examples at one level.
template <class Output>
void run_winograd(const GridDetails& d, int64_t level, int64_t row_begin, int64_t row_end,
                  const float* packed, float* scratch, Output* y, int64_t count) {
  using L = Lanes<float>;
  const Convolution& c = d.product.convolution;
  const Activation& layout = d.product.y;
  const Finish<float> finish(d.product);
  const int64_t chunk = d.packed.chunk, channels = c.channels;
  const int64_t groups = (row_end - row_begin + kDenseRows - 1) / kDenseRows;
  const int64_t rows = groups * kDenseRows, most_lanes = d.winograd.step * chunk;
  float* weights = scratch;
  float* inputs = weights + kPoints * rows * channels;
  float* products = inputs + kPoints * (channels * most_lanes + kPointGap);
  float* lines = products + kPoints * (rows * most_lanes + kPointGap);  // also a row of weights
  // Whether two lines of tiles can be written where they belong.
  const bool whole = layout.batch_stride == 1 && layout.position_strides[2] == chunk &&
                     count == chunk && c.output[2] % 2 == 0;
  winograd_weights(d, level, row_begin, row_end, lines, weights);
  for (Tiles tiles{0, 0, 0}; tiles.row < d.winograd.tiles[0]; ++tiles.row)
    for (tiles.begin = 0; tiles.begin < d.winograd.tiles[1]; tiles.begin = tiles.end) {
      tiles.end = std::min(d.winograd.tiles[1], tiles.begin + d.winograd.step);
      const int64_t lanes = (tiles.end - tiles.begin) * chunk;
      const int64_t input_size = channels * lanes + kPointGap;
      const int64_t product_size = rows * lanes + kPointGap;
      winograd_input(d, packed, tiles, input_size, inputs);
      for (int64_t point = 0; point < kPoints; ++point)
        for (int64_t lane = 0; lane < lanes; lane += kDenseVectors * L::kWidth)
          for (int64_t group = 0; group < groups; ++group)
            with_vectors<kDenseVectors>((lanes - lane) / L::kWidth, [&](auto V) {
              dense_tile<V()>(weights + (point * groups + group) * channels * kDenseRows,
                              inputs + point * input_size + lane, channels, lanes,
                              products + point * product_size + group * kDenseRows * lanes + lane,
                              lanes);
            });
      const int64_t outputs = std::min<int64_t>(2, c.output[1] - 2 * tiles.row);
      const int64_t positions =
          std::min(c.output[2], 2 * tiles.end) - 2 * tiles.begin;  // the last tile may stand out
      for (int64_t row = row_begin; row < row_end; ++row) {
        const float* from = products + (row - row_begin) * lanes;
        Output* to = y + row * layout.channel_stride + 2 * tiles.row * layout.position_strides[1] +
                     2 * tiles.begin * layout.position_strides[2];
        if constexpr (std::is_same<Output, float>::value)
          if (whole && outputs == 2) {
            winograd_output(finish, row, from, product_size, tiles.end - tiles.begin, chunk, to,
                            layout.position_strides[1]);
            continue;
          }
        winograd_output(finish, row, from, product_size, tiles.end - tiles.begin, chunk, lines,
                        2 * lanes);
        for (int64_t r = 0; r < outputs; ++r)
          for (int64_t position = 0; position < positions; ++position)
            for (int64_t b = 0; b < count; ++b)
              narrow(lines[r * 2 * lanes + position * chunk + b],
                     to + r * layout.position_strides[1] + position * layout.position_strides[2] +
                         b * layout.batch_stride);
      }
    }
}

}  // namespace
}  // namespace confprune
