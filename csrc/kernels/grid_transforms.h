// The transforms of minimal filtering, over a vector width; part of grid_algorithm.h.

namespace confprune {
namespace {

template <class T>
inline typename Lanes<T>::Vector load(const T* at) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(at);
}

// The values where the bits are all 1, or 0 where they are all 0.
inline Lanes<float>::Vector masked(Lanes<float>::Vector values, int32_t bits) {
  typedef int32_t Bits __attribute__((vector_size(sizeof(values))));
  return (Lanes<float>::Vector)((Bits)values & bits);
}

// The polynomials of the transforms are evaluated at 0, kNear, -kNear, kFar, -kFar and infinity.
// With these points (kNear² = 1/2, kFar² = 2) the rounding errors are a quarter of those with 1
// and 2.
constexpr float kNear = 0.70710678f, kFar = 1.41421356f;

// The transform of three weights.
template <class V>
inline void weight_transform(V a, V b, V c, V (&out)[kWeightSide]) {
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
inline void input_transform(const V (&x)[kWeightSide], V (&out)[kWeightSide]) {
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
inline void output_transform(const V (&m)[kWeightSide], V (&out)[kOutputSide]) {
  const V near = m[1] + m[2], near_odd = kNear * (m[1] - m[2]);
  const V far = m[3] + m[4], far_odd = kFar * (m[3] - m[4]);
  out[0] = m[0] + (near + far);
  out[1] = near_odd + far_odd;
  out[2] = 0.5f * near + 2.0f * far;
  out[3] = 0.5f * near_odd + (2.0f * far_odd + m[5]);
}

// The same for a convolution of stride S. With stride 2 the outer weights meet the even inputs, the
// one in the middle the odd ones. Filtering by two weights is filtering by three of which the first
// is 0: there is no product at the point 0, whose place the middle weight takes. It is multiplied
// with the odd inputs as they are.
template <int S, class V>
inline void transform_weights(V a, V b, V c, V (&out)[kWeightSide]) {
  if constexpr (S == 1) {
    weight_transform(a, b, c, out);
  } else {
    weight_transform(V{}, a, c, out);
    out[0] = b;
  }
}
template <int S, class V>
inline void transform_inputs(const V (&x)[Filter<S>::kSide], V (&out)[Filter<S>::kSide]) {
  if constexpr (S == 1) {
    input_transform(x, out);
  } else {
    const V even[kWeightSide] = {V{}, x[0], x[2], x[4], x[6], x[8]};
    V points[kWeightSide];
    input_transform(even, points);
    unrolled<kOutputSide>([&](auto i) { out[i] = x[2 * i + 1]; });
    unrolled<kWeightSide - 1>([&](auto i) { out[kOutputSide + i] = points[1 + i]; });
  }
}
template <int S, class V>
inline void transform_products(const V (&m)[Filter<S>::kSide], V (&out)[kOutputSide]) {
  if constexpr (S == 1) {
    output_transform(m, out);
  } else {
    const V even[kWeightSide] = {m[0], m[4], m[5], m[6], m[7], m[8]};
    output_transform(even, out);
    unrolled<kOutputSide - 1>([&](auto i) { out[1 + i] += m[1 + i]; });
  }
}

}  // namespace
}  // namespace confprune
