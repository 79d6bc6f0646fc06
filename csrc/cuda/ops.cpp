// torch.ops.confprune.* on CUDA tensors: argument checks, the device and stream of the call, and
// the start of the kernels. Nothing here waits for the device, but where it says so.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cuda/architectures.h"
#include "cuda/call.h"
#include "cuda/grid_linear.h"
#include "cuda/levels.h"
#include "cuda/masked_weights.h"
#include "cuda/selection.h"
#include "cuda_build.h"

namespace confprune {

std::string cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string cuda_architectures() {
  int count = 0;
  const int* listed = cuda::architectures(&count);
  std::string text;
  for (int i = 0; i < count; ++i)
    text += (i == 0 ? "" : " ") + std::to_string(listed[i] / 100) + "." +
            std::to_string(listed[i] % 100 / 10);
  return text;
}

namespace {

using at::Tensor;

cuda::Scores scores_of(const Tensor& contiguous, const char* argument) {
  return {contiguous.const_data_ptr(), element_of(contiguous.scalar_type(), argument),
          contiguous.numel()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> magnitude_select(at::TensorList scores,
                                                            at::ScalarType key,
                                                            const Tensor& rank) {
  TORCH_CHECK_VALUE(!scores.empty(), "there are no scores to select from");
  const Call call(scores[0], "scores");
  call.check(rank, "rank");
  const int64_t* wanted = int64_data(rank, "rank");
  std::vector<Tensor> own;
  std::vector<cuda::Scores> sources;
  for (const Tensor& tensor : scores) {
    call.check(tensor, "one of the scores");
    check_key(tensor.scalar_type(), key);
    own.push_back(tensor.contiguous());
    sources.push_back(scores_of(own.back(), "scores"));
  }
  const Element key_element = element_of(key, "key");
  const int64_t tensors = int64_t(sources.size()), ranks = rank.numel();
  TORCH_CHECK_VALUE(ranks >= 1 && ranks <= 32767, "rank must hold 1 to 32767 ranks, got ", ranks);
  Tensor keys = at::empty_like(rank), below = at::empty_like(rank), equal = at::empty_like(rank),
         nan = at::empty({1}, rank.options());
  const Tensor memory = scratch(cuda::select_scratch(tensors, ranks), rank);
  cuda::select(sources.data(), tensors, key_element, wanted, ranks,
               {keys.data_ptr<int64_t>(), below.data_ptr<int64_t>(), equal.data_ptr<int64_t>(),
                nan.data_ptr<int64_t>()},
               memory.mutable_data_ptr(), call.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {keys, below, equal, nan};
}

void magnitude_histogram(const Tensor& scores, at::ScalarType key, const Tensor& prefixes,
                         int64_t shift, int64_t digit_bits, Tensor& counts) {
  const Call call(scores, "scores");
  call.check(prefixes, "prefixes");
  call.check(counts, "counts");
  const Element key_element = check_digit(scores, key, prefixes, shift, digit_bits, counts);
  const Tensor own = scores.contiguous();
  if (own.numel() == 0)
    return;
  cuda::histogram(scores_of(own, "scores"),
                  {key_element, int(shift), int(digit_bits), prefixes.const_data_ptr<int64_t>(),
                   prefixes.numel()},
                  counts.data_ptr<int64_t>(), call.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Waits for the device, to learn how many keys there are.
Tensor magnitude_collect(const Tensor& scores, at::ScalarType key, const Tensor& prefixes,
                         int64_t shift, const Tensor& low, const Tensor& high, int64_t limit,
                         Tensor& below) {
  const Call call(scores, "scores");
  call.check(prefixes, "prefixes");
  call.check(low, "low");
  call.check(high, "high");
  call.check(below, "below");
  const Element key_element = check_brackets(scores, key, prefixes, shift, low, high, below);
  const Tensor own = scores.contiguous();
  // One more than the limit, so that it is seen to be passed.
  const int64_t capacity = std::min(own.numel(), std::max<int64_t>(0, limit) + 1);
  const Tensor keys = at::empty({capacity}, prefixes.options());
  const Tensor found = at::zeros({1}, prefixes.options());
  if (own.numel() > 0) {
    cuda::collect(scores_of(own, "scores"),
                  {key_element, int(shift), prefixes.const_data_ptr<int64_t>(),
                   low.const_data_ptr<int64_t>(), high.const_data_ptr<int64_t>(), prefixes.numel()},
                  capacity, keys.data_ptr<int64_t>(), found.data_ptr<int64_t>(),
                  below.data_ptr<int64_t>(), call.stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return std::get<0>(keys.narrow(0, 0, std::min(capacity, found.item<int64_t>())).sort());
}

std::tuple<std::vector<Tensor>, Tensor> assign_levels(at::TensorList scores, at::ScalarType key,
                                                      const Tensor& thresholds,
                                                      const Tensor& first_level, const Tensor& ties,
                                                      const Tensor& straddled,
                                                      const Tensor& ranks) {
  const Call call(thresholds, "thresholds");
  call.check(first_level, "first_level");
  call.check(ties, "ties");
  call.check(straddled, "straddled");
  call.check(ranks, "ranks");
  for (const Tensor& tensor : scores)
    call.check(tensor, "one of the scores");
  const Element key_element =
      check_cuts(scores, key, thresholds, first_level, ties, straddled, ranks);
  std::vector<Tensor> own, levels;
  std::vector<cuda::Levelled> levelled;
  for (const Tensor& tensor : scores) {
    own.push_back(tensor.contiguous());
    levels.push_back(at::empty(tensor.sizes(), tensor.options()
                                                   .dtype(level_type(ties.numel()))
                                                   .memory_format(at::MemoryFormat::Contiguous)));
    levelled.push_back({scores_of(own.back(), "scores"), levels.back().mutable_data_ptr()});
  }
  const cuda::Cuts cuts{key_element,
                        thresholds.numel(),
                        ties.numel(),
                        thresholds.const_data_ptr<int64_t>(),
                        first_level.const_data_ptr<int64_t>(),
                        ties.const_data_ptr<int64_t>(),
                        straddled.const_data_ptr<bool>()};
  const int64_t count = int64_t(levelled.size());
  Tensor passed = ranks.clone();
  const Tensor memory = scratch(cuda::assign_scratch(levelled.data(), count, cuts), thresholds);
  cuda::assign(levelled.data(), count, cuts, passed.data_ptr<int64_t>(), memory.mutable_data_ptr(),
               call.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {levels, passed};
}

Tensor masked_weights(const Tensor& weight, const Tensor& levels, const Tensor& level) {
  const Call call(weight, "weight");
  call.check(levels, "levels");
  call.check(level, "level");
  check_levelled(weight, levels);
  const Tensor own = weight.contiguous(), own_levels = levels.contiguous();
  std::vector<int64_t> shape{level.numel()};
  shape.insert(shape.end(), weight.sizes().begin(), weight.sizes().end());
  const int64_t* wanted = int64_data(level, "level");
  Tensor out = at::empty(shape, weight.options().memory_format(at::MemoryFormat::Contiguous));
  const cuda::MaskedWeights masked{own.const_data_ptr(),
                                   own_levels.const_data_ptr(),
                                   wanted,
                                   out.mutable_data_ptr(),
                                   element_of(weight.scalar_type(), "weight"),
                                   is_wide_levels(levels),
                                   weight.numel(),
                                   level.numel()};
  if (out.numel() > 0) {
    cuda::masked_weights(masked, call.stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out;
}

Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// The type of scale and bias, when both have it; else the one that is computed in.
at::ScalarType follow_type(const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                           at::ScalarType element) {
  const at::ScalarType wide = element == at::kDouble ? at::kDouble : at::kFloat;
  if (scale.has_value() && bias.has_value())
    return scale->scalar_type() == bias->scalar_type() ? bias->scalar_type() : wide;
  return scale.has_value() ? scale->scalar_type() : bias.has_value() ? bias->scalar_type() : wide;
}

Tensor masked_linear(const Tensor& x, const Tensor& weight, const Tensor& levels,
                     const Tensor& level, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& scale, bool relu) {
  const Call call(x, "x");
  call.check(weight, "weight");
  call.check(levels, "levels");
  call.check(level, "level");
  call.check(bias, "bias");
  call.check(scale, "scale");
  TORCH_CHECK_VALUE(x.dim() == 3, "masked_linear takes x [1 or K, N, in], got ", x.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == x.size(2) && weight.size(1) > 0,
                    "weight has shape ", weight.sizes(), " for x of shape ", x.sizes());
  TORCH_CHECK_VALUE(weight.size(1) <= INT32_MAX, "weight has ", weight.size(1), " inputs; at most ",
                    INT32_MAX, " are supported");
  check_levelled(weight, levels);
  TORCH_CHECK_TYPE(levels.scalar_type() == at::kByte, "levels must be uint8, got ",
                   levels.scalar_type());
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "weight is ", weight.scalar_type(),
                   " but x is ", x.scalar_type());
  TORCH_CHECK_VALUE(x.size(0) == 1 || x.size(0) == level.numel(), "x has ", x.size(0),
                    " inputs for ", level.numel(), " levels; it takes one, or one a level");
  const int64_t outputs = weight.size(0);
  check_per_output(bias, "bias", outputs);
  check_per_output(scale, "scale", outputs);
  const int64_t* wanted = int64_data(level, "level");

  const Tensor own_x = contiguous_rows(x), own_weight = contiguous_rows(weight),
               own_levels = contiguous_rows(levels);
  const at::ScalarType follow = follow_type(scale, bias, x.scalar_type());
  const auto per_output = [&](const std::optional<Tensor>& values) {
    return values.has_value() ? values->to(follow).contiguous() : Tensor();
  };
  const Tensor own_scale = per_output(scale), own_bias = per_output(bias);
  Tensor y = at::empty({level.numel(), x.size(1), outputs},
                       x.options().memory_format(at::MemoryFormat::Contiguous));
  const cuda::GridLinear product{own_x.const_data_ptr(),
                                 own_weight.const_data_ptr(),
                                 own_levels.const_data_ptr<uint8_t>(),
                                 wanted,
                                 scale.has_value() ? own_scale.const_data_ptr() : nullptr,
                                 bias.has_value() ? own_bias.const_data_ptr() : nullptr,
                                 y.mutable_data_ptr(),
                                 element_of(x.scalar_type(), "x"),
                                 element_of(follow, "bias"),
                                 level.numel(),
                                 x.size(1),
                                 x.size(2),
                                 outputs,
                                 x.size(0) == 1 ? 0 : own_x.stride(0),
                                 own_x.stride(1),
                                 own_weight.stride(0),
                                 own_levels.stride(0),
                                 relu};
  if (y.numel() > 0) {
    cuda::grid_linear(product, call.stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return y;
}

// Torch's own has what is needed there.
Tensor short_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                       const std::optional<Tensor>& mask, double scale, bool causal) {
  return at::scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale);
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY_IMPL(confprune, CUDA, m) {
  m.impl("magnitude_histogram", confprune::magnitude_histogram);
  m.impl("magnitude_collect", confprune::magnitude_collect);
  m.impl("magnitude_select", confprune::magnitude_select);
  m.impl("assign_levels", confprune::assign_levels);
  m.impl("masked_weights", confprune::masked_weights);
  m.impl("masked_linear", confprune::masked_linear);
  m.impl("short_attention", confprune::short_attention);
}
