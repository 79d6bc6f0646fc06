// The kernels' name for the type of a tensor's elements.
#pragma once

#include <ATen/ATen.h>

#include "kernels/elements.h"

namespace confprune {

inline Element element_of(at::ScalarType type, const char* argument) {
  switch (type) {
    case at::kFloat:
      return Element::float32;
    case at::kDouble:
      return Element::float64;
    case at::kHalf:
      return Element::float16;
    case at::kBFloat16:
      return Element::bfloat16;
    default:
      TORCH_CHECK_TYPE(false, argument, " must be float32, float64, float16 or bfloat16, got ",
                       type);
  }
}

}  // namespace confprune
