// Attention over short sequences, a head at a time, over a vector width; part of grid_algorithm.h.
//
// Keys stand in the lanes while scores are made, and the width while values are added up. Both are
// filled up to whole vectors with zeros.

namespace confprune {
namespace {

// e^x for x <= 0, to the last bit or two; 0 below the smallest normal number. NaN stays.
inline Lanes<float>::Vector exponential(Lanes<float>::Vector x) {
  using V = Lanes<float>::Vector;
  typedef int32_t Bits __attribute__((vector_size(sizeof(V))));
  constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits
  const V shifted = x * 1.44269502f + kRound;
  const V n = shifted - kRound;
  const V r = (x - n * 0.693359375f) + n * 2.12194442e-4f;  // ln 2 in two parts, the first exact
  // (e^r - 1 - r) / r² with the least greatest error of e^r, 4e-9, for |r| <= ln 2 / 2.
  V p = r * 1.38145988e-3f + 8.36871658e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * r * r + r + 1.0f;
  const V power =
      reinterpret_cast<V>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
  const V nothing = x < -87.0f ? V{} : x;
  return x >= -87.0f ? power : nothing;
}

// The lanes of a vector made one, by halves.
template <class Combine>
inline float reduced(Lanes<float>::Vector values, Combine combine) {
  constexpr int kWidth = Lanes<float>::kWidth;
  float part[kWidth];
  std::memcpy(part, &values, sizeof(part));
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      part[i] = combine(part[i], part[i + half]);
  return part[0];
}

// out[r] = Σ_i a[r, i] · b[i] for R rows, V vectors.
template <int R, int V>
inline void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                          int64_t depth, float* out, int64_t out_stride) {
  using L = Lanes<float>;
  typename L::Vector sum[R][V] = {};
  for (int64_t i = 0; i < depth; ++i, ++a, b += b_stride) {
    typename L::Vector x[V];
    unrolled<V>([&](auto v) { x[v] = load(b + v * L::kWidth); });
    unrolled<R>([&](auto r) { unrolled<V>([&](auto v) { sum[r][v] += a[r * a_stride] * x[v]; }); });
  }
  unrolled<R>([&](auto r) {
    unrolled<V>([&](auto v) {
      *reinterpret_cast<typename L::Unaligned*>(out + r * out_stride + v * L::kWidth) = sum[r][v];
    });
  });
}

// out [rows, lanes] = a [rows, depth] · b [depth, lanes], lanes in whole vectors.
void multiply_small(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t depth,
                    int64_t lanes, float* out, int64_t out_stride) {
  constexpr int kRows = 4, kVectors = 2;
  constexpr int64_t kWidth = Lanes<float>::kWidth;
  for (int64_t lane = 0; lane < lanes; lane += kVectors * kWidth)
    with_vectors<kVectors>((lanes - lane) / kWidth, [&](auto V) {
      for (int64_t row = 0; row < rows; row += kRows)
        with_vectors<kRows>(rows - row, [&](auto R) {
          multiply_rows<R(), V()>(a + row * a_stride, a_stride, b + lane, lanes, depth,
                                  out + row * out_stride + lane, out_stride);
        });
    });
}

// [tokens, width] to rows of `room`.
inline void copy_tokens(const Heads& from, int64_t example, int64_t head, int64_t tokens,
                        int64_t width, int64_t room, float* to) {
  const float* token = from.data + example * from.strides[0] + head * from.strides[1];
  for (int64_t t = 0; t < tokens; ++t, token += from.strides[2], to += room)
    std::copy(token, token + width, to);
}

// Fetches what copy_tokens reads: pieces of rows, so far apart that the hardware does not foresee
// them. Inlined by force, as prefetch_inputs is.
__attribute__((always_inline)) inline void prefetch_tokens(const Heads& from, int64_t example,
                                                           int64_t head, int64_t tokens,
                                                           int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(float);
  const float* token = from.data + example * from.strides[0] + head * from.strides[1];
  for (int64_t t = 0; t < tokens; ++t, token += from.strides[2])
    for (int64_t i = 0; i < width; i += kLine)
      __builtin_prefetch(token + i, 0, 2);
}

// What is added to the scores of a head, [queries, room]: the mask, and -inf for keys that are not
// there.
inline void fill_mask(const Attention& a, const float* mask, int64_t room, float* to) {
  for (int64_t t = 0; t < a.queries; ++t, to += room) {
    const int64_t seen = a.causal ? std::min(a.keys, t + 1) : a.keys;
    if (mask == nullptr)
      std::fill(to, to + seen, 0.0f);
    else
      std::copy_n(mask + t * a.mask.strides[2], seen, to);
    std::fill(to + seen, to + room, -std::numeric_limits<float>::infinity());
  }
}

// The weights of the keys of one query, in place of its products with them.
inline void soften(float* scores, int64_t room, float scale, const float* mask) {
  using L = Lanes<float>;
  const auto at = [&](int64_t i) { return reinterpret_cast<L::Unaligned*>(scores + i); };
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  L::Vector most = kNone - L::Vector{};
  for (int64_t i = 0; i < room; i += L::kWidth) {
    const L::Vector score = *at(i) * scale + load(mask + i);
    most = score > most ? score : most;
    *at(i) = score;
  }
  float greatest = reduced(most, [](float a, float b) { return a > b ? a : b; });
  if (greatest == kNone)
    greatest = 0.0f;
  L::Vector sum = {};
  for (int64_t i = 0; i < room; i += L::kWidth) {
    const L::Vector weight = exponential(*at(i) - greatest);
    sum += weight;
    *at(i) = weight;
  }
  const float total = reduced(sum, [](float a, float b) { return a + b; });
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t i = 0; i < room; i += L::kWidth)
    *at(i) *= factor;
}

void run_attention(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t kWidth = Lanes<float>::kWidth;
  const auto whole = [](int64_t size) { return (size + kWidth - 1) / kWidth * kWidth; };
  const int64_t keys = whole(a.keys), width = whole(a.width);
  float* const key = static_cast<float*>(scratch);  // [keys, width]
  float* const value = key + keys * width;          // the same
  float* const transposed = value + keys * width;   // [width, keys]
  float* const scores = transposed + keys * width;  // [queries, keys]
  float* const sums = scores + a.queries * keys;    // [queries, width]
  float* const mask = sums + a.queries * width;     // [queries, keys]
  std::fill(key, transposed, 0.0f);
  fill_mask(a, nullptr, keys, mask);
  for (int64_t example = begin; example < end; ++example)
    for (int64_t head = 0; head < a.heads; ++head) {
      if (example + 1 < end) {
        prefetch_tokens(a.query, example + 1, head, a.queries, a.width);
        prefetch_tokens(a.key, example + 1, head, a.keys, a.width);
        prefetch_tokens(a.value, example + 1, head, a.keys, a.width);
      }
      copy_tokens(a.key, example, head, a.keys, a.width, width, key);
      copy_tokens(a.value, example, head, a.keys, a.width, width, value);
      transpose(key, width, keys, width, transposed, keys);
      const float* const query =
          a.query.data + example * a.query.strides[0] + head * a.query.strides[1];
      multiply_small(query, a.query.strides[2], a.queries, transposed, a.width, keys, scores, keys);
      if (a.mask.data != nullptr && (head == 0 || a.mask.strides[1] != 0))
        fill_mask(a, a.mask.data + example * a.mask.strides[0] + head * a.mask.strides[1], keys,
                  mask);
      for (int64_t t = 0; t < a.queries; ++t)
        soften(scores + t * keys, keys, a.scale, mask + t * keys);
      // Straight to the outputs, where these are whole vectors.
      const int64_t out_stride = a.heads * a.width;
      float* out = a.out + (example * a.queries * a.heads + head) * a.width;
      const bool direct = width == a.width;
      multiply_small(scores, keys, a.queries, value, a.keys, width, direct ? out : sums,
                     direct ? out_stride : width);
      for (int64_t t = 0; t < a.queries && !direct; ++t, out += out_stride)
        std::copy(sums + t * width, sums + t * width + a.width, out);
    }
}

}  // namespace
}  // namespace confprune
