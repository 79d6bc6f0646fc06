// What the operators ask of their arguments, on every device.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "element_of.h"
#include "kernels/elements.h"
#include "kernels/selection.h"

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

// The type of keys for the digit that is asked for.
inline Element check_digit(const at::Tensor& scores, at::ScalarType key, const at::Tensor& prefixes,
                           int64_t shift, int64_t digit_bits, const at::Tensor& counts) {
  check_key(scores.scalar_type(), key);
  const Element key_element = element_of(key, "key");
  const int64_t bits = key_bits(key_element), prefix_bits = bits - shift - digit_bits;
  TORCH_CHECK_VALUE(shift >= 0 && shift < bits && digit_bits >= 1 && prefix_bits >= 0, "shift ",
                    shift, " and digit_bits ", digit_bits, " leave the ", bits, " bits of a key");
  TORCH_CHECK_VALUE(prefixes.numel() > 0 || prefix_bits == 0,
                    "only the first digit of a key has no prefixes");
  int64_data(prefixes, "prefixes");
  int64_data(counts, "counts");
  const int64_t cells = std::max<int64_t>(1, prefixes.numel()) << digit_bits;
  TORCH_CHECK_VALUE(counts.numel() == cells, "counts holds ", counts.numel(), " cells, not ",
                    cells);
  return key_element;
}

inline Element check_brackets(const at::Tensor& scores, at::ScalarType key,
                              const at::Tensor& prefixes, int64_t shift, const at::Tensor& low,
                              const at::Tensor& high, const at::Tensor& below) {
  check_key(scores.scalar_type(), key);
  const Element key_element = element_of(key, "key");
  const int64_t bits = key_bits(key_element), size = prefixes.numel();
  TORCH_CHECK_VALUE(shift >= 0 && shift < bits, "shift ", shift, " leaves the ", bits,
                    " bits of a key");
  int64_data(prefixes, "prefixes");
  int64_data(low, "low");
  int64_data(high, "high");
  int64_data(below, "below");
  TORCH_CHECK_VALUE(low.numel() == size && high.numel() == size && below.numel() == size,
                    "prefixes, low, high and below disagree in size");
  return key_element;
}

inline Element check_cuts(at::TensorList scores, at::ScalarType key, const at::Tensor& thresholds,
                          const at::Tensor& first_level, const at::Tensor& ties,
                          const at::Tensor& straddled, const at::Tensor& ranks) {
  for (const at::Tensor& tensor : scores)
    check_key(tensor.scalar_type(), key);
  const int64_t cuts = thresholds.numel(), num_levels = ties.numel();
  TORCH_CHECK_VALUE(
      first_level.numel() == cuts + 1 && straddled.numel() == cuts && ranks.numel() == cuts,
      "thresholds, first_level, straddled and ranks disagree in size");
  TORCH_CHECK_VALUE(num_levels <= 32767, "at most 32767 levels are supported, got ", num_levels);
  TORCH_CHECK_VALUE(cuts <= num_levels, "thresholds holds ", cuts, " keys for ", num_levels,
                    " levels; they must be distinct");
  TORCH_CHECK_TYPE(straddled.scalar_type() == at::kBool && straddled.is_contiguous(),
                   "straddled must be a contiguous bool tensor");
  int64_data(thresholds, "thresholds");
  int64_data(first_level, "first_level");
  int64_data(ties, "ties");
  int64_data(ranks, "ranks");
  return element_of(key, "key");
}

inline at::ScalarType level_type(int64_t num_levels) {
  return num_levels <= 255 ? at::kByte : at::kShort;
}

inline bool is_wide_levels(const at::Tensor& levels) {
  TORCH_CHECK_TYPE(levels.scalar_type() == at::kByte || levels.scalar_type() == at::kShort,
                   "levels must be uint8 or int16, got ", levels.scalar_type());
  return levels.scalar_type() == at::kShort;
}

inline void check_levelled(const at::Tensor& weight, const at::Tensor& levels) {
  is_wide_levels(levels);
  TORCH_CHECK_VALUE(weight.sizes() == levels.sizes(), "weight has shape ", weight.sizes(),
                    " but levels has ", levels.sizes());
}

inline void check_per_output(const std::optional<at::Tensor>& values, const char* argument,
                             int64_t outputs) {
  if (values.has_value())
    TORCH_CHECK_VALUE(values->dim() == 1 && values->size(0) == outputs, argument, " has shape ",
                      values->sizes(), " for ", outputs, " outputs");
}

}  // namespace confprune
