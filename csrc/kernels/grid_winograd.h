// 3 x 3 convolutions of stride 1 or 2 by Winograd's minimal filtering, over a vector width; part of
// grid_algorithm.h.
//
// 4 x 4 neighbouring outputs take 36 multiplications a channel instead of 144 (Lavin & Gray, arXiv
// 1509.09308, section 4.2); with stride 2 they take 81, for the odd inputs are not transformed. But
// the transformed weights are dense: it pays at levels where many weights are alive.
//
// The inputs of two tiles of outputs are transformed, the points that meet the same weights are the
// columns of a matrix product over the channels, and the products are transformed back, a few rows
// at a time: what is held then stays in the second-level cache. Outputs that are no multiple of 4
// make some tiles smaller, and these need fewer points. Products leave memory idle, so that
// meanwhile what the transforms read and write next is fetched into the second-level cache.

namespace confprune {
namespace {

// Rows and vectors of the dense product whose sums stay in registers.
constexpr int kDenseRows = CONFPRUNE_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kDenseVectors = 3;
static_assert(kFilteredRows % kDenseRows == 0);

typedef float DenseColumn __attribute__((vector_size(kDenseRows * sizeof(float))));
typedef float UnalignedDenseColumn
    __attribute__((vector_size(kDenseRows * sizeof(float)), aligned(alignof(float)), may_alias));

// The weights of rows [row_begin, row_end) at a level, transformed: [point, row / kDenseRows,
// channel, kDenseRows], with rows of zeros at the end. `dense` has room for kDenseRows rows.
template <int S>
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
      DenseColumn lines[3][kWeightSide], points[kWeightSide];
      for (int c = 0; c < 3; ++c) {
        DenseColumn column[3];
        for (int r = 0; r < 3; ++r)
          column[r] = *reinterpret_cast<const UnalignedDenseColumn*>(g + (r * 3 + c) * kDenseRows);
        transform_weights<S>(column[0], column[1], column[2], lines[c]);
      }
      for (int r = 0; r < kWeightSide; ++r) {
        transform_weights<S>(lines[0][r], lines[1][r], lines[2][r], points);
        for (int c = 0; c < kWeightSide; ++c)
          *reinterpret_cast<UnalignedDenseColumn*>(out + (r * kWeightSide + c) * point_size +
                                                   channel * kDenseRows) = points[c];
      }
    }
  }
}

// One vector of examples of a tile of a channel, to [point].
template <int S, bool whole>
inline void transform_tile(const TilePlace& tile, const float* from, const Image& image,
                           int64_t ahead, float* to, Finite<float>& finite) {
  using L = Lanes<float>;
  constexpr int kSide = Filter<S>::kSide, kLead = Filter<S>::kLead;
  typename L::Vector columns[kSide][kSide] = {};
  unrolled<kSide>([&](auto c) {
    if (!whole && (c < tile.first[1] || c >= tile.last[1]))
      return;
    typename L::Vector x[kSide];
    unrolled<kSide>([&](auto r) {
      const float* at =
          from + c * image.strides[1] + (whole ? r * image.strides[0] : tile.lines[r]);
      __builtin_prefetch(at + ahead);
      x[r] = whole ? load(at) : masked(load(at), tile.inside[r]);
    });
    transform_inputs<S>(x, columns[c]);
  });
  // Each input is part of one of these points.
  const auto looked_at = [](int point) { return point <= kLead || point + 1 == kSide; };
  unrolled<kSide>([&](auto r) {
    typename L::Vector x[kSide], points[kSide], sum = {};
    unrolled<kSide>([&](auto c) { x[c] = columns[c][r]; });
    transform_inputs<S>(x, points);
    unrolled<kSide>([&](auto c) {
      *reinterpret_cast<typename L::Unaligned*>(to + (r * kSide + c) * L::kWidth) = points[c];
      if (looked_at(r) && looked_at(c))
        sum += points[c];
    });
    if (looked_at(r))
      finite.look(sum);
  });
}

// `count` tiles of an image, to [channel, tile, vector of examples, point].
template <int S>
void winograd_input(const GridDetails& d, const Image& image, const TilePlace* tiles, int64_t count,
                    float* out, Finite<float>& finite) {
  using L = Lanes<float>;
  const int64_t channels = d.product.convolution.channels;
  const int64_t ahead = image.channel_stride;
  for (int64_t channel = 0; channel < channels; ++channel)
    for (int64_t t = 0; t < count; ++t) {
      const float* from = tiles[t].corner + channel * image.channel_stride;
      for (int64_t b = 0; b < kConvolutionChunk;
           b += L::kWidth, out += L::kWidth * Filter<S>::kRoom)
        if (tiles[t].whole)
          transform_tile<S, true>(tiles[t], from + b, image, ahead, out, finite);
        else
          transform_tile<S, false>(tiles[t], from + b, image, ahead, out, finite);
    }
}

// Sums [kDenseRows, V vectors] of weights [depth, kDenseRows] at one point, and the inputs [depth]
// that meet them; each vector has its place from x and from `out`, and there are `stride` elements
// from one depth or row to the next.
template <int V>
void dense_tile(const float* weights, const float* x, const int64_t* places, int64_t depth,
                int64_t stride, float* out) {
  using L = Lanes<float>;
  typename L::Vector sum[kDenseRows][V], input[V];
  int64_t place[V];
  unrolled<V>([&](auto v) { place[v] = places[v]; });
  unrolled<V>([&](auto v) { input[v] = load(x + place[v]); });
  unrolled<kDenseRows>(
      [&](auto r) { unrolled<V>([&](auto v) { sum[r][v] = weights[r] * input[v]; }); });
  for (int64_t i = 1; i < depth; ++i) {
    x += stride;
    weights += kDenseRows;
    unrolled<V>([&](auto v) { input[v] = load(x + place[v]); });
    unrolled<kDenseRows>(
        [&](auto r) { unrolled<V>([&](auto v) { sum[r][v] += weights[r] * input[v]; }); });
  }
  unrolled<kDenseRows>([&](auto r) {
    unrolled<V>([&](auto v) {
      *reinterpret_cast<typename L::Unaligned*>(out + r * stride + place[v]) = sum[r][v];
    });
  });
}

// The outputs of a tile of one vector of examples, from their products [point].
template <int S>
inline void transform_outputs(const float* products,
                              typename Lanes<float>::Vector (&sums)[kOutputSide][kOutputSide]) {
  using L = Lanes<float>;
  constexpr int kSide = Filter<S>::kSide;
  typename L::Vector half[kSide][kOutputSide];
  unrolled<kSide>([&](auto column) {
    typename L::Vector m[kSide];
    unrolled<kSide>([&](auto r) { m[r] = load(products + (r * kSide + column) * L::kWidth); });
    transform_products<S>(m, half[column]);
  });
  unrolled<kOutputSide>([&](auto r) {
    typename L::Vector m[kSide];
    unrolled<kSide>([&](auto column) { m[column] = half[column][r]; });
    transform_products<S>(m, sums[r]);
  });
}

// `tiles` of one output row, from their products [tile, vector of examples, point].
template <int S, class Output>
void winograd_output(const GridDetails& d, const Finish<float>& finish, int64_t row,
                     const float* products, const TilePlace* tiles, int64_t number, Output* y,
                     int64_t count) {
  using L = Lanes<float>;
  const Activation& layout = d.product.y;
  const bool direct = std::is_same<Output, float>::value && layout.batch_stride == 1;
  const float factor = finish.factor(row), start = finish.start(row);
  for (int64_t t = 0; t < number; ++t)
    for (int64_t b = 0; b < kConvolutionChunk;
         b += L::kWidth, products += L::kWidth * Filter<S>::kRoom) {
      const int64_t valid = std::min<int64_t>(L::kWidth, count - b);
      typename L::Vector sums[kOutputSide][kOutputSide];
      transform_outputs<S>(products, sums);
      unrolled<kOutputSide>([&](auto r) {
        unrolled<kOutputSide>([&](auto p) {
          if (r >= tiles[t].outputs[0] || p >= tiles[t].outputs[1])
            return;
          Output* to = y + tiles[t].output + r * layout.position_strides[1] +
                       p * layout.position_strides[2] + b * layout.batch_stride;
          if (direct && valid == L::kWidth) {
            finish.write(sums[r][p], factor, start, reinterpret_cast<float*>(to));
          } else {
            float values[L::kWidth];
            finish.write(sums[r][p], factor, start, values);
            for (int64_t i = 0; i < valid; ++i)
              narrow(values[i], to + i * layout.batch_stride);
          }
        });
      });
    }
}

// Fetches a share of the channels of tiles, beyond what their neighbours above and to the left have
// read. The examples of a position share a cache line. Inlined by force: a function that does
// nothing else counts as one without effect, and its calls as superfluous.
template <int S>
__attribute__((always_inline)) inline void prefetch_inputs(const Image& image,
                                                           const TilePlace* tiles, int64_t count,
                                                           int64_t channel_begin,
                                                           int64_t channel_end) {
  constexpr int kOverlap = Filter<S>::kSide - S * kOutputSide;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t channel = channel_begin; channel < channel_end; ++channel)
      for (int64_t r = std::max(kOverlap, tiles[t].first[0]); r < tiles[t].last[0]; ++r) {
        const float* line = tiles[t].corner + channel * image.channel_stride + r * image.strides[0];
        for (int64_t c = std::max(kOverlap, tiles[t].first[1]); c < tiles[t].last[1]; ++c)
          __builtin_prefetch(line + c * image.strides[1], 0, 2);
      }
}

// Fetches what rows [row_begin, row_end) of tiles will write, and their residuals.
template <class Output>
__attribute__((always_inline)) inline void prefetch_outputs(const GridDetails& d,
                                                            const Finish<float>& finish,
                                                            const TilePlace* tiles, int64_t count,
                                                            int64_t row_begin, int64_t row_end,
                                                            const Output* y) {
  const Activation& layout = d.product.y;
  if (!std::is_same<Output, float>::value || layout.batch_stride != 1)
    return;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t row = row_begin; row < row_end; ++row)
      for (int64_t r = 0; r < tiles[t].outputs[0]; ++r)
        for (int64_t p = 0; p < tiles[t].outputs[1]; ++p)
          finish.prefetch<2>(reinterpret_cast<const float*>(
              y + row * layout.channel_stride + tiles[t].output + r * layout.position_strides[1] +
              p * layout.position_strides[2]));
}

// Parts [part_begin, part_end) of the outputs at the k-th level by minimal filtering, rows
// [row_begin, row_end). A part has its share of the tiles, which need not be where its lines are.
template <int S, class InOut>
void run_winograd(const GridDetails& d, int64_t k, int64_t row_begin, int64_t row_end,
                  int64_t part_begin, int64_t part_end, const InOut* x, float* scratch, InOut* y) {
  constexpr int64_t kRoom = Filter<S>::kRoom;
  const GridProduct& product = d.product;
  const Convolution& c = product.convolution;
  const Finish<float> finish(product, k);
  Finite<float> finite;
  const int64_t chunk = kConvolutionChunk, channels = c.channels, step = kFilteredTiles;
  const int64_t groups = (row_end - row_begin + kDenseRows - 1) / kDenseRows;
  const int64_t rows = groups * kDenseRows;
  const int64_t weight_size = rows * channels + kPointGap;
  float* weights = scratch + channels * c.input[1] * c.input[2] * chunk;
  float* inputs = weights + kWeightPoints * weight_size;
  float* products = inputs + kRoom * channels * step * chunk;
  // The products are not there yet when a few rows of weights are laid out.
  winograd_weights<S>(d, product.levels[k], row_begin, row_end, products, weight_size, weights);
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
    TilePlace now[kFilteredTiles], next[kFilteredTiles];
    const auto place = [&](int64_t begin, TilePlace* places) {
      const int64_t end = std::min(tile_end, begin + step);
      for (int64_t tile = begin; tile < end; ++tile)
        places[tile - begin] = place_tile<S>(d, image, tile);
      return std::max<int64_t>(0, end - begin);
    };
    for (int64_t begin = tile_begin; begin < tile_end; begin += step) {
      const int64_t number = place(begin, now), following = place(begin + step, next);
      const int64_t stride = number * chunk * kRoom;  // from channel to channel
      const PointVectors points = point_vectors<S>(now, number);
      winograd_input<S>(d, image, now, number, inputs, finite);
      for (int64_t first = row_begin; first < row_end; first += kFilteredRows) {
        const int64_t last = std::min(row_end, first + kFilteredRows);
        for (int64_t weight = 0; weight < kWeightPoints; ++weight) {
          const auto share = [&](int64_t all) { return all * weight / kWeightPoints; };
          const auto share_end = [&](int64_t all) { return all * (weight + 1) / kWeightPoints; };
          prefetch_outputs(d, finish, now, number, first + share(last - first),
                           first + share_end(last - first), outputs);
          if (last == row_end)
            prefetch_inputs<S>(image, next, following, share(channels), share_end(channels));
          const int64_t* const places = points.places + points.starts[weight];
          const int64_t vectors = points.starts[weight + 1] - points.starts[weight];
          const int64_t passes = (vectors + kDenseVectors - 1) / kDenseVectors;
          for (int64_t pass = 0; pass < passes; ++pass) {  // of nearly as many vectors each
            const int64_t v = vectors * pass / passes, end = vectors * (pass + 1) / passes;
            for (int64_t row = first; row < last; row += kDenseRows)
              with_vectors<kDenseVectors>(end - v, [&](auto V) {
                dense_tile<V()>(weights + weight * weight_size + (row - row_begin) * channels,
                                inputs, places + v, channels, stride,
                                products + (row - first) * stride);
              });
          }
        }
        for (int64_t row = first; row < last; ++row)
          winograd_output<S>(d, finish, row, products + (row - first) * stride, now, number,
                             outputs + row * product.y.channel_stride, count);
      }
    }
  }
  if (!finite.all())
    product.finite->store(false, std::memory_order_relaxed);
}

}  // namespace
}  // namespace confprune
