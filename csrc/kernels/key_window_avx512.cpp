// The filter with the window's flags in eight registers, looked up by permutations.
#if defined(__x86_64__)

#include "kernels/x86_target.h"

#include "kernels/elements.h"
#include "kernels/key_window.h"

namespace confprune {

// 32 weights at a time: their bins have 16 bits, and so have the words that a permutation looks up.
__attribute__((target("avx512f,avx512bw"))) int64_t filter_keys_avx512(const float* weights,
                                                                       int64_t count,
                                                                       const KeyWindow& window,
                                                                       uint32_t* found) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i base = _mm512_set1_epi32(int(window.base));
  const __m512i last = _mm512_set1_epi16(short(KeyWindow::kBins - 1));
  const __m512i bit10 = _mm512_set1_epi16(1 << 10), bit11 = _mm512_set1_epi16(1 << 11);
  const __m512i low4 = _mm512_set1_epi16(15);
  const __m512i one = _mm512_set1_epi32(1);
  const __m128i shift = _mm_cvtsi32_si128(window.shift);
  __m512i flags[8];
  for (int i = 0; i < 8; ++i)
    flags[i] = _mm512_loadu_si512(window.flags + 32 * i);

  int64_t size = 0, i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512i first = _mm512_and_si512(_mm512_loadu_si512(weights + i), magnitude);
    const __m512i second = _mm512_and_si512(_mm512_loadu_si512(weights + i + 16), magnitude);
    // Saturates at both ends, and takes four of each in turn.
    const __m512i wide =
        _mm512_packus_epi32(_mm512_sra_epi32(_mm512_sub_epi32(first, base), shift),
                            _mm512_sra_epi32(_mm512_sub_epi32(second, base), shift));
    const __m512i bin = _mm512_min_epu16(wide, last);
    const __m512i word = _mm512_srli_epi16(bin, 4);  // a permutation reads its low six bits
    const __mmask32 odd = _mm512_test_epi16_mask(bin, bit10);
    const __mmask32 upper = _mm512_test_epi16_mask(bin, bit11);
    const __m512i low =
        _mm512_mask_blend_epi16(odd, _mm512_permutex2var_epi16(flags[0], word, flags[1]),
                                _mm512_permutex2var_epi16(flags[2], word, flags[3]));
    const __m512i high =
        _mm512_mask_blend_epi16(odd, _mm512_permutex2var_epi16(flags[4], word, flags[5]),
                                _mm512_permutex2var_epi16(flags[6], word, flags[7]));
    const __m512i flag =  // in bit 0
        _mm512_srlv_epi16(_mm512_mask_blend_epi16(upper, low, high), _mm512_and_si512(bin, low4));
    // Each flag twice, and so that of a weight in the lane of that weight again.
    const __mmask16 first_hit = _mm512_test_epi32_mask(_mm512_unpacklo_epi16(flag, flag), one);
    const __mmask16 second_hit = _mm512_test_epi32_mask(_mm512_unpackhi_epi16(flag, flag), one);
    _mm512_storeu_si512(found + size, _mm512_maskz_compress_epi32(first_hit, first));
    size += __builtin_popcount(first_hit);
    _mm512_storeu_si512(found + size, _mm512_maskz_compress_epi32(second_hit, second));
    size += __builtin_popcount(second_hit);
  }
  for (; i < count; ++i) {
    const uint32_t key = bit_cast<uint32_t>(weights[i]) & 0x7fffffffu;
    const uint32_t offset = (std::max(key, window.base) - window.base) >> window.shift;
    const uint32_t bin = std::min(offset, KeyWindow::kBins - 1);
    found[size] = key;
    size += window.flags[bin / 16] >> (bin % 16) & 1;
  }
  return size;
}

}  // namespace confprune

#endif
