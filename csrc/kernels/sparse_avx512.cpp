// 64-byte vectors, for machines with AVX-512.
#if defined(__x86_64__)

#include "kernels/sparse_sets.h"
#include "kernels/x86_target.h"

CONFPRUNE_BEGIN_TARGET(CONFPRUNE_AVX512)

#define CONFPRUNE_VECTOR_BYTES 64
#include "kernels/sparse_avx512.h"

namespace confprune {
namespace {

// A block of x in eight registers. Four permutations find an element in each pair of them by the
// low five bits of its index, and the other two bits choose the pair.
template <>
struct Lookup<float> {
  __m512 x[8];

  explicit Lookup(const float* from) {
    for (int i = 0; i < 8; ++i)
      x[i] = _mm512_loadu_ps(from + 16 * i);
  }

  using Sums = __m512;

  static void arrange(float*) {}

  __m512 find(__m128i index) const {
    const __m512i wide = _mm512_cvtepu8_epi32(index);
    const __mmask16 odd = _mm_movepi8_mask(_mm_slli_epi16(index, 2));
    const __mmask16 high = _mm_movepi8_mask(_mm_slli_epi16(index, 1));
    const __m512 low_half = _mm512_mask_blend_ps(odd, _mm512_permutex2var_ps(x[0], wide, x[1]),
                                                 _mm512_permutex2var_ps(x[2], wide, x[3]));
    const __m512 high_half = _mm512_mask_blend_ps(odd, _mm512_permutex2var_ps(x[4], wide, x[5]),
                                                  _mm512_permutex2var_ps(x[6], wide, x[7]));
    return _mm512_mask_blend_ps(high, low_half, high_half);
  }

  template <class Stored>
  int64_t sums(const Slice& slice, const Stored* values, const uint8_t* columns, Sums* sums) const {
    __m512 sum = _mm512_setzero_ps();
    int64_t at = 0;
    for (int64_t step = 0; step < slice.full; ++step, at += kSliceRows) {
      const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + at));
      sum = _mm512_fmadd_ps(load_sixteen(values + at, 0xffff), find(index), sum);
    }
    for (int64_t step = 0; step < slice.partial; ++step) {
      const int64_t rows = slice.step_rows[step];
      const __mmask16 mask = __mmask16((1u << rows) - 1);
      const __m512 found = find(_mm_maskz_loadu_epi8(mask, columns + at));
      sum = _mm512_mask3_fmadd_ps(load_sixteen(values + at, mask), found, sum, mask);
      at += rows;
    }
    *sums = sum;
    return at;
  }
};

}  // namespace
}  // namespace confprune

#include "kernels/sparse_algorithm.h"

namespace confprune {

SparseSet sparse_avx512() {
  return {run_task};
}

}  // namespace confprune

CONFPRUNE_END_TARGET

#endif
