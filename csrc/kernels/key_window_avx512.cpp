// The filter with the window's flags in eight registers, looked up by permutations.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes its own headers' undefined operands for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include "kernels/key_window.h"

namespace confprune {

__attribute__((target("avx512f,avx512bw"))) int64_t filter_keys_avx512(const float* weights,
                                                                       int64_t count,
                                                                       const KeyWindow& window,
                                                                       uint32_t* found) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i base = _mm512_set1_epi32(int(window.base));
  const __m512i last = _mm512_set1_epi32(int(KeyWindow::kBins - 1));
  const __m512i bit10 = _mm512_set1_epi32(1 << 10), bit11 = _mm512_set1_epi32(1 << 11);
  const __m512i low5 = _mm512_set1_epi32(31), one = _mm512_set1_epi32(1);
  const __m128i shift = _mm_cvtsi32_si128(window.shift);
  __m512i flags[8];
  for (int i = 0; i < 8; ++i)
    flags[i] = _mm512_loadu_si512(window.flags + 16 * i);

  int64_t size = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 valid =
        count - i >= 16 ? __mmask16(0xffff) : __mmask16((1u << (count - i)) - 1);
    const __m512i key = _mm512_and_si512(_mm512_maskz_loadu_epi32(valid, weights + i), magnitude);
    const __m512i offset = _mm512_sub_epi32(_mm512_max_epu32(key, base), base);
    const __m512i bin = _mm512_min_epu32(_mm512_srl_epi32(offset, shift), last);
    const __m512i word = _mm512_srli_epi32(bin, 5);  // a permutation reads its low five bits
    const __mmask16 odd = _mm512_test_epi32_mask(bin, bit10);
    const __mmask16 upper = _mm512_test_epi32_mask(bin, bit11);
    const __m512i low =
        _mm512_mask_blend_epi32(odd, _mm512_permutex2var_epi32(flags[0], word, flags[1]),
                                _mm512_permutex2var_epi32(flags[2], word, flags[3]));
    const __m512i high =
        _mm512_mask_blend_epi32(odd, _mm512_permutex2var_epi32(flags[4], word, flags[5]),
                                _mm512_permutex2var_epi32(flags[6], word, flags[7]));
    const __m512i flag =
        _mm512_srlv_epi32(_mm512_mask_blend_epi32(upper, low, high), _mm512_and_si512(bin, low5));
    const __mmask16 hit = _mm512_mask_test_epi32_mask(valid, flag, one);
    _mm512_storeu_si512(found + size, _mm512_maskz_compress_epi32(hit, key));
    size += __builtin_popcount(hit);
  }
  return size;
}

}  // namespace confprune

#endif
