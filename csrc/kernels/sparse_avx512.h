// What the two AVX-512 translation units of the sparse product share.
#include <immintrin.h>

#include "kernels/elements.h"
#include "kernels/sparse_generic.h"

namespace confprune {
namespace {

// One load for four floats, and a permutation within registers for each: a load of its own for
// every value would take turns with the loads of x.
template <>
struct Four<float, 64> {
  __m512 values;
  explicit Four(const float* from) : values(_mm512_broadcast_f32x4(_mm_loadu_ps(from))) {}
  template <class Index>
  __m512 get(Index) const {
    return _mm512_permute_ps(values, Index::value * 0x55);
  }
};

template <>
struct Four<float, 32> {
  __m256 values;
  explicit Four(const float* from)
      : values(_mm256_set_m128(_mm_loadu_ps(from), _mm_loadu_ps(from))) {}
  template <class Index>
  __m256 get(Index) const {
    return _mm256_permute_ps(values, Index::value * 0x55);
  }
};

inline __m512 load_sixteen(const float* from, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}

inline __m512 load_sixteen(const BFloat16* from, __mmask16 mask) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline __m512 load_sixteen(const Half* from, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}

}  // namespace
}  // namespace confprune
