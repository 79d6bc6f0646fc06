// What the operators ask of their arguments, on every device.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "element_of.h"
#include "kernels/elements.h"

namespace confprune {

inline void check_key(at::ScalarType element, at::ScalarType key) {
  const bool ok = key == element || key == at::kDouble ||
                  (key == at::kFloat && (element == at::kHalf || element == at::kBFloat16));
  TORCH_CHECK_VALUE(ok, "key type ", key, " cannot hold the magnitudes of ", element, " scores");
}

inline const int64_t* int64_data(const at::Tensor& tensor, const char* argument) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong && tensor.is_contiguous(), argument,
                   " must be a contiguous int64 tensor");
  return tensor.const_data_ptr<int64_t>();
}

inline bool is_wide_levels(const at::Tensor& levels) {
  TORCH_CHECK_TYPE(levels.scalar_type() == at::kByte || levels.scalar_type() == at::kShort,
                   "levels must be uint8 or int16, got ", levels.scalar_type());
  return levels.scalar_type() == at::kShort;
}

inline void check_per_output(const std::optional<at::Tensor>& values, const char* argument,
                             int64_t outputs) {
  if (values.has_value())
    TORCH_CHECK_VALUE(values->dim() == 1 && values->size(0) == outputs, argument, " has shape ",
                      values->sizes(), " for ", outputs, " outputs");
}

}  // namespace confprune
