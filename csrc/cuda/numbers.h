// Numbers of a type that only the host knows, and divisions that round up.
#pragma once

#include "cuda/device.h"
#include "kernels/elements.h"

namespace confprune::cuda {

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class Real>
__device__ Real number_at(const void* numbers, Element element, int64_t index) {
  switch (element) {
    case Element::float64:
      return Real(static_cast<const double*>(numbers)[index]);
    case Element::float16:
      return Real(widen(static_cast<const Half*>(numbers)[index]));
    case Element::bfloat16:
      return Real(widen(static_cast<const BFloat16*>(numbers)[index]));
    default:
      return Real(static_cast<const float*>(numbers)[index]);
  }
}

template <class Real>
__device__ void store_number(Real number, void* numbers, Element element, int64_t index) {
  switch (element) {
    case Element::float64:
      static_cast<double*>(numbers)[index] = double(number);
      return;
    case Element::float16:
      return narrow(float(number), static_cast<Half*>(numbers) + index);
    case Element::bfloat16:
      return narrow(float(number), static_cast<BFloat16*>(numbers) + index);
    default:
      static_cast<float*>(numbers)[index] = float(number);
  }
}

}  // namespace confprune::cuda
