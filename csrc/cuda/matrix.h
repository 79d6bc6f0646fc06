// The matrix instruction of a warp, and the packed steps around it: two 16-bit numbers a register.
//
// Each of these is one instruction of the device, and a scalar form of it elsewhere.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "kernels/elements.h"

namespace confprune::cuda::grid {

// Adds the product of a [16, 16] and b [16, 8] to `sums` [16, 8]. With g = lane / 4 and
// t = lane % 4, a lane holds, lower half first:
//   a     (g, 2t..2t+1), (g+8, 2t..2t+1), (g, 2t+8..2t+9), (g+8, 2t+8..2t+9)
//   b     (2t..2t+1, g), (2t+8..2t+9, g)
//   sums  (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
template <class T>
__device__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// 0xffff in the halves of `a` that are greater than those of `b`, else 0. The halves are compared
// as the half floats whose bits they are, which order as integers do from 0 to 0x7c00.
inline __device__ uint32_t greater(uint32_t a, uint32_t b);

// Two numbers, rounded to T, `low` in the lower half.
template <class T>
__device__ uint32_t pack(float low, float high);

#ifdef __CUDACC__

template <class T>
__device__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline __device__ uint32_t greater(uint32_t a, uint32_t b) {
  uint32_t mask;
  asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
  return mask;
}

template <class T>
__device__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

#else

namespace emulated {

template <class T>
float half_of(uint32_t packed, int index) {
  return widen(T{uint16_t(packed >> (16 * index))});
}

// What a lane gives to the product.
struct Pieces {
  uint32_t a[4], b[2];
};

}  // namespace emulated

template <class T>
void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto lanes = lockstep::exchange(lockstep::Operation::multiply,
                                        emulated::Pieces{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int g = lockstep::lane() / 4, t = lockstep::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int below = i / 2, column = 2 * t + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int quarter = k % 8 / 2, late = k / 8;
      sum += double(emulated::half_of<T>(lanes[4 * g + quarter].a[2 * late + below], k % 2)) *
             emulated::half_of<T>(lanes[4 * column + quarter].b[late], k % 2);
    }
    sums[i] += float(sum);
  }
}

inline uint32_t greater(uint32_t a, uint32_t b) {
  uint32_t mask = 0;
  for (int i = 0; i < 2; ++i)
    if (emulated::half_of<Half>(a, i) > emulated::half_of<Half>(b, i))
      mask |= 0xffffu << (16 * i);
  return mask;
}

template <class T>
uint32_t pack(float low, float high) {
  T halves[2];
  narrow(low, &halves[0]);
  narrow(high, &halves[1]);
  return uint32_t(halves[1].bits) << 16 | halves[0].bits;
}

#endif

}  // namespace confprune::cuda::grid
