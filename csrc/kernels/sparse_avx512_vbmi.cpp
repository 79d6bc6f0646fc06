// 64-byte vectors, for machines with AVX-512 that permute bytes (VBMI) and have BMI2.
#if defined(__x86_64__)

#include "kernels/sparse_sets.h"
#include "kernels/x86_target.h"

CONFPRUNE_BEGIN_TARGET(CONFPRUNE_AVX512_VBMI)

#define CONFPRUNE_VECTOR_BYTES 64
#include "kernels/sparse_avx512.h"

namespace confprune {
namespace {

// A block of x in eight registers, cut into four planes of bytes: a permutation finds one byte of
// 64 elements among 128, and interleaving puts the four bytes together again.
template <>
struct Lookup<float> {
  __m512i planes[4][2];

  explicit Lookup(const float* from) {
    for (int b = 0; b < 4; ++b)
      for (int half = 0; half < 2; ++half)
        planes[b][half] = _mm512_loadu_si512(from + 32 * b + 16 * half);
  }

  using Sums = __m512;

  // Cuts the 128 elements at x into planes, in place.
  static void arrange(float* x) {
    alignas(64) uint8_t by_byte[64];
    for (int i = 0; i < 64; ++i)
      by_byte[i] = uint8_t(i % 16 * 4 + i / 16);
    const __m512i order = _mm512_load_si512(by_byte);
    __m512i cut[2][4];
    for (int i = 0; i < 8; ++i)
      cut[i / 4][i % 4] = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(x + 16 * i));
    for (int half = 0; half < 2; ++half) {
      const __m512i* c = cut[half];
      const __m512i low01 = _mm512_shuffle_i32x4(c[0], c[1], 0x44);
      const __m512i high01 = _mm512_shuffle_i32x4(c[0], c[1], 0xee);
      const __m512i low23 = _mm512_shuffle_i32x4(c[2], c[3], 0x44);
      const __m512i high23 = _mm512_shuffle_i32x4(c[2], c[3], 0xee);
      _mm512_storeu_si512(x + 16 * half, _mm512_shuffle_i32x4(low01, low23, 0x88));
      _mm512_storeu_si512(x + 32 + 16 * half, _mm512_shuffle_i32x4(low01, low23, 0xdd));
      _mm512_storeu_si512(x + 64 + 16 * half, _mm512_shuffle_i32x4(high01, high23, 0x88));
      _mm512_storeu_si512(x + 96 + 16 * half, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
  }

  // found[s] = the elements of step s, for four steps of 16 columns.
  void find(__m512i columns, __m512 (&found)[4]) const {
    // Interleaving works within 128 bits: there each step is to have four of its columns.
    const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i index = _mm512_permutexvar_epi32(turned, columns);
    __m512i bytes[4];
    for (int b = 0; b < 4; ++b)
      bytes[b] = _mm512_permutex2var_epi8(planes[b][0], index, planes[b][1]);
    const __m512i low01 = _mm512_unpacklo_epi8(bytes[0], bytes[1]);
    const __m512i high01 = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(bytes[2], bytes[3]);
    const __m512i high23 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    found[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
    found[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
    found[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
    found[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
  }

  // The rows of the first `count` of some steps, at most eight, a byte each; `end` is their
  // slice's.
  static uint64_t rows_of(const uint8_t* steps, int64_t count, const uint8_t* end) {
    uint64_t rows = 0;
    if (end - steps >= int64_t(sizeof(rows))) {
      std::memcpy(&rows, steps, sizeof(rows));
      return _bzhi_u64(rows, 8 * count);
    }
    for (int64_t i = 0; i < count; ++i)
      rows |= uint64_t(steps[i]) << 8 * i;
    return rows;
  }

  template <class Stored>
  int64_t sums(const Slice& slice, const Stored* values, const uint8_t* columns, Sums* sums) const {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    __m512 found[4];
    int64_t at = 0, step = 0;
    for (; step + 4 <= slice.full; step += 4, at += 4 * kSliceRows) {
      find(_mm512_loadu_si512(columns + at), found);
      even = _mm512_fmadd_ps(load_sixteen(values + at, 0xffff), found[0], even);
      odd = _mm512_fmadd_ps(load_sixteen(values + at + 16, 0xffff), found[1], odd);
      even = _mm512_fmadd_ps(load_sixteen(values + at + 32, 0xffff), found[2], even);
      odd = _mm512_fmadd_ps(load_sixteen(values + at + 48, 0xffff), found[3], odd);
    }
    // The other steps are four at a time as well. `rows` has a byte for each of them: the whole
    // ones, at most three, and up to five others.
    int64_t whole = slice.full - step, left = slice.partial;
    const uint8_t* next = slice.step_rows;
    do {
      const int64_t some = std::min<int64_t>(5, left);
      uint64_t rows =
          rows_of(next, some, slice.next_slice) << 8 * whole | _bzhi_u64(0x101010, 8 * whole);
      for (; rows != 0; rows >>= 32) {
        const Stored* from[4];
        __mmask16 masks[4];
        __m128i index[4];
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          const uint32_t here = rows >> 8 * s & 0xff;
          masks[s] = __mmask16(_bzhi_u32(0xffff, here));
          index[s] = _mm_maskz_loadu_epi8(masks[s], columns + at);
          from[s] = values + at;
          at += here;
        }
        const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(index[0]), index[1], 1);
        find(_mm512_inserti32x4(_mm512_inserti32x4(low, index[2], 2), index[3], 3), found);
        even = _mm512_mask3_fmadd_ps(load_sixteen(from[0], masks[0]), found[0], even, masks[0]);
        odd = _mm512_mask3_fmadd_ps(load_sixteen(from[1], masks[1]), found[1], odd, masks[1]);
        even = _mm512_mask3_fmadd_ps(load_sixteen(from[2], masks[2]), found[2], even, masks[2]);
        odd = _mm512_mask3_fmadd_ps(load_sixteen(from[3], masks[3]), found[3], odd, masks[3]);
      }
      next += some;
      left -= some;
      whole = 0;
    } while (left > 0);
    *sums = _mm512_add_ps(even, odd);
    return at;
  }
};

}  // namespace
}  // namespace confprune

#include "kernels/sparse_algorithm.h"

namespace confprune {

SparseSet sparse_avx512_vbmi() {
  return {run_task};
}

}  // namespace confprune

CONFPRUNE_END_TARGET

#endif
