// The element types the kernels read and write, and their exact conversions.
//
// A 16-bit float is carried as its bits in a one-member struct, so that the kernels depend on no
// compiler's half-precision type. Widening is exact; narrowing rounds to nearest even, as torch
// does.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CONFPRUNE_HOST_DEVICE __host__ __device__
#else
#define CONFPRUNE_HOST_DEVICE
#endif

namespace confprune {

enum class Element : int { float32, float64, float16, bfloat16 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

namespace {  // internal linkage: each instruction set compiles its own copy

template <class To, class From>
CONFPRUNE_HOST_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

CONFPRUNE_HOST_DEVICE inline float widen(float value) {
  return value;
}
CONFPRUNE_HOST_DEVICE inline double widen(double value) {
  return value;
}

CONFPRUNE_HOST_DEVICE inline float widen(BFloat16 value) {
  return bit_cast<float>(uint32_t(value.bits) << 16);
}

CONFPRUNE_HOST_DEVICE inline float widen(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Shifted into a float's fields the exponent is 112 too small. A subnormal gets one more, whose
  // hidden bit is taken off again: no float is subnormal on the way, for these may count as 0.
  const float normal = bit_cast<float>((magnitude << 13) + 0x38000000u);
  const float subnormal = bit_cast<float>((magnitude << 13) + 0x38800000u) - 0x1p-14f;
  const float scaled = magnitude < 0x400u ? subnormal : normal;
  // Infinity and NaN keep their all-ones exponent.
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | sign);
}

CONFPRUNE_HOST_DEVICE inline void narrow(float value, float* out) {
  *out = value;
}
CONFPRUNE_HOST_DEVICE inline void narrow(double value, double* out) {
  *out = value;
}

CONFPRUNE_HOST_DEVICE inline void narrow(float value, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out->bits = nan ? uint16_t(0x7fc0) : uint16_t(rounded >> 16);
}

CONFPRUNE_HOST_DEVICE inline void narrow(float value, Half* out) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Below the smallest normal half: adding 0.5 makes the float unit round at 2^-24 for us.
    result = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(result | sign);
}

}  // namespace
}  // namespace confprune
