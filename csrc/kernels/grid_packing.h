// How inputs get into the lanes and outputs out of them, over a vector width; part of
// grid_algorithm.h.

namespace confprune {
namespace {

// Notes infinity and NaN, whose product with 0 is not 0; lanes of 64 bytes, and what is left.
template <class T>
class Finite {
 public:
  void look(typename Lanes<T>::Vector values) { zeros_[0] += T(0) * values; }
  void look(const T* values, int64_t count) {
    int64_t i = 0;
    for (; i + kSums * L::kWidth <= count; i += kSums * L::kWidth)
      for (int s = 0; s < kSums; ++s)
        zeros_[s] +=
            T(0) * *reinterpret_cast<const typename L::Unaligned*>(values + i + s * L::kWidth);
    for (; i + L::kWidth <= count; i += L::kWidth)
      look(*reinterpret_cast<const typename L::Unaligned*>(values + i));
    for (; i < count; ++i)
      zero_ += T(0) * values[i];
  }
  bool all() const {
    T sum = zero_;
    for (int s = 0; s < kSums; ++s)
      for (int i = 0; i < L::kWidth; ++i)
        sum += zeros_[s][i];
    return sum == T(0);
  }

 private:
  using L = Lanes<T>;
  static constexpr int kSums = 4;
  typename L::Vector zeros_[kSums] = {};
  T zero_ = 0;
};

// {a[0], b[0], a[1], b[1], ...}, of the lower halves or of the upper.
template <class V, std::size_t... I>
inline V interleave(V a, V b, bool upper, std::index_sequence<I...>) {
  constexpr int kWidth = int(sizeof...(I));
#if defined(__clang__)
  return upper ? __builtin_shufflevector(a, b, (int(I) / 2 + kWidth / 2 + int(I) % 2 * kWidth)...)
               : __builtin_shufflevector(a, b, (int(I) / 2 + int(I) % 2 * kWidth)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Index Mask __attribute__((vector_size(sizeof(V))));
  return upper ? __builtin_shuffle(a, b, Mask{Index(I / 2 + kWidth / 2 + I % 2 * kWidth)...})
               : __builtin_shuffle(a, b, Mask{Index(I / 2 + I % 2 * kWidth)...});
#endif
}

// out[column, row] = in[row, column], in squares of whole vectors.
template <class T>
void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
               int64_t out_stride) {
  using L = Lanes<T>;
  constexpr int64_t kWidth = L::kWidth;
  const auto lanes = std::make_index_sequence<kWidth>{};
  const int64_t whole_rows = rows - rows % kWidth, whole_columns = columns - columns % kWidth;
  for (int64_t r = 0; r < whole_rows; r += kWidth)
    for (int64_t c = 0; c < whole_columns; c += kWidth) {
      typename L::Vector a[kWidth], b[kWidth];
      for (int64_t i = 0; i < kWidth; ++i)
        a[i] = *reinterpret_cast<const typename L::Unaligned*>(in + (r + i) * in_stride + c);
      for (int64_t half = 1; half < kWidth; half *= 2) {  // a perfect shuffle each time
        for (int64_t i = 0; i < kWidth / 2; ++i) {
          b[2 * i] = interleave(a[i], a[i + kWidth / 2], false, lanes);
          b[2 * i + 1] = interleave(a[i], a[i + kWidth / 2], true, lanes);
        }
        std::copy(b, b + kWidth, a);
      }
      for (int64_t i = 0; i < kWidth; ++i)
        *reinterpret_cast<typename L::Unaligned*>(out + (c + i) * out_stride + r) = a[i];
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      out[c * out_stride + r] = in[r * in_stride + c];
}

// x [count, channels], strided, into [channel, chunk]; examples past `count` are 0. A few channels
// at a time, so that lines are read and written whole.
template <class T, class Input>
void pack_transposed(const Input* x, int64_t batch_stride, int64_t channel_stride, int64_t count,
                     int64_t channels, int64_t chunk, T* out) {
  if constexpr (std::is_same<T, Input>::value)
    if (channel_stride == 1) {
      transpose(x, batch_stride, count, channels, out, chunk);
      for (int64_t c = 0; c < channels && count < chunk; ++c)
        std::fill(out + c * chunk + count, out + (c + 1) * chunk, T(0));
      return;
    }
  constexpr int64_t kSquare = 16;
  for (int64_t c0 = 0; c0 < channels; c0 += kSquare) {
    const int64_t c1 = std::min(channels, c0 + kSquare);
    for (int64_t b = 0; b < count; ++b) {
      const Input* from = x + b * batch_stride;
      for (int64_t c = c0; c < c1; ++c)
        out[c * chunk + b] = T(widen(from[c * channel_stride]));
    }
    for (int64_t c = c0; c < c1; ++c)
      std::fill(out + c * chunk + count, out + (c + 1) * chunk, T(0));
  }
}

// One line of a plane, positions [begin, end) of its last dimension, into [position, chunk]; the
// line that is packed soon lies `ahead`.
template <class T, class Input>
void pack_line(const Input* line, int64_t position_stride, int64_t batch_stride, int64_t count,
               int64_t begin, int64_t end, int64_t step, int64_t chunk, int64_t ahead, T* out) {
  if constexpr (std::is_same<T, Input>::value)
    if (batch_stride == 1 && count == chunk && chunk % Lanes<T>::kWidth == 0) {
      for (int64_t at = begin; at < end; at += step)
        for (int64_t b = 0; b < chunk; b += Lanes<T>::kWidth, out += Lanes<T>::kWidth) {
          const T* from = line + at * position_stride + b;
          __builtin_prefetch(from + ahead);
          *reinterpret_cast<typename Lanes<T>::Unaligned*>(out) =
              *reinterpret_cast<const typename Lanes<T>::Unaligned*>(from);
        }
      return;
    }
  for (int64_t at = begin; at < end; at += step, out += chunk) {
    const Input* from = line + at * position_stride;
    if (batch_stride == 1)
      for (int64_t b = 0; b < count; ++b)
        out[b] = T(widen(from[b]));
    else
      for (int64_t b = 0; b < count; ++b)
        out[b] = T(widen(from[b * batch_stride]));
    std::fill(out + count, out + chunk, T(0));
  }
}

// One phase of a channel, whose first example is at `channel`, into [extent, chunk], for a band of
// output lines from `line` on; padding is 0.
template <class T, class Input>
void pack_phase(const GridDetails& d, const Input* channel, int64_t count, int64_t line, int64_t p0,
                int64_t p1, int64_t p2, T* out, Finite<T>& finite) {
  const Convolution& c = d.product.convolution;
  const Activation& layout = d.product.x;
  const PackedInput& p = d.packed;
  // Of a line's positions, those in [begin, end) are not padding.
  const int64_t step = c.stride[2], shift = p2 - c.padding[2];
  const int64_t begin = std::min(p.extent[2], std::max<int64_t>(0, (step - 1 - shift) / step));
  const int64_t end = std::min(p.extent[2], (c.input[2] - shift + step - 1) / step);
  for (int64_t i0 = 0; i0 < p.extent[0]; ++i0)
    for (int64_t i1 = 0; i1 < p.extent[1]; ++i1, out += p.extent[2] * p.chunk) {
      const int64_t a0 = i0 * c.stride[0] + p0 - c.padding[0];
      const int64_t a1 = (line + i1) * c.stride[1] + p1 - c.padding[1];
      T* const stop = out + p.extent[2] * p.chunk;
      if (a0 < 0 || a0 >= c.input[0] || a1 < 0 || a1 >= c.input[1] || end <= begin) {
        std::fill(out, stop, T(0));
        continue;
      }
      std::fill(out, out + begin * p.chunk, T(0));
      pack_line(channel + a0 * layout.position_strides[0] + a1 * layout.position_strides[1],
                layout.position_strides[2], layout.batch_stride, count, begin * step + shift,
                (end - 1) * step + shift + 1, step, p.chunk, layout.channel_stride,
                out + begin * p.chunk);
      std::fill(out + end * p.chunk, stop, T(0));
      finite.look(out, p.extent[2] * p.chunk);
    }
}

// x[first example ..] into [channel, phase, extent, chunk], for a band of output lines from `line`
// on; what is padding, or past the batch, is 0.
template <class T, class Input>
void pack(const GridDetails& d, const Input* x, int64_t first, int64_t line, T* packed,
          Finite<T>& finite) {
  const Convolution& c = d.product.convolution;
  const Activation& layout = d.product.x;
  const PackedInput& p = d.packed;
  const int64_t count = std::min(p.chunk, d.product.batch - first);
  const Input* base = x + first * layout.batch_stride;
  if (p.channel_size == p.chunk && c.input[0] * c.input[1] * c.input[2] == 1 &&
      layout.batch_stride != 1) {
    pack_transposed(base, layout.batch_stride, layout.channel_stride, count, c.channels, p.chunk,
                    packed);
    return finite.look(packed, c.channels * p.chunk);
  }
  for (int64_t channel = 0; channel < c.channels; ++channel)
    for (int64_t p0 : p.phases[0])
      for (int64_t p1 : p.phases[1])
        for (int64_t p2 : p.phases[2]) {
          pack_phase(d, base + channel * layout.channel_stride, count, line, p0, p1, p2, packed,
                     finite);
          packed += p.plane;
        }
}

// One tile of lanes to y: lane = position along the last dimension * chunk + example.
template <class T, class Output>
void store(const GridDetails& d, const T* tile, int64_t rows, Output* y, int64_t first_lane,
           int64_t lanes, int64_t count) {
  const Activation& layout = d.product.y;
  const int64_t chunk = d.packed.chunk;
  if constexpr (std::is_same<T, Output>::value)
    if (layout.channel_stride == 1 && d.product.convolution.output[2] == 1) {
      const int64_t valid = std::min(lanes, count - first_lane);
      return transpose(tile, Lanes<T>::kTile, rows, valid, y + first_lane * layout.batch_stride,
                       layout.batch_stride);
    }
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

}  // namespace
}  // namespace confprune
