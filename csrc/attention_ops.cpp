// torch.ops.confprune: attention; schema, argument checks, and dispatch to the kernel.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "kernels/attention.h"

namespace confprune {
namespace {

using at::Tensor;

Heads heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

Tensor with_neighbours(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : tensor.contiguous();
}

Tensor short_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                       const std::optional<Tensor>& mask, double scale, bool causal) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && key.sizes() == value.sizes() &&
                        query.size(0) == key.size(0) && query.size(1) == key.size(1) &&
                        query.size(3) == key.size(3),
                    "short_attention takes query, key and value [examples, heads, tokens, width], "
                    "got ",
                    query.sizes(), ", ", key.sizes(), " and ", value.sizes());
  const std::vector<int64_t> scores{query.size(0), query.size(1), query.size(2), key.size(2)};
  TORCH_CHECK_VALUE(!mask.has_value() || mask->sizes() == at::IntArrayRef(scores), "mask is ",
                    mask.has_value() ? mask->sizes() : at::IntArrayRef(), " for scores ",
                    at::IntArrayRef(scores));
  for (const Tensor& tensor : {query, key, value, mask.value_or(query)})
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, "short_attention takes float32, got ",
                     tensor.scalar_type());
  const Tensor q = with_neighbours(query), k = with_neighbours(key), v = with_neighbours(value);
  const Tensor added = mask.has_value() ? with_neighbours(*mask) : Tensor();
  Tensor out = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options());
  const Attention attention{heads_of(q),
                            heads_of(k),
                            heads_of(v),
                            mask.has_value() ? heads_of(added) : Heads{},
                            out.data_ptr<float>(),
                            q.size(0),
                            q.size(1),
                            q.size(2),
                            k.size(2),
                            q.size(3),
                            float(scale),
                            causal};
  at::parallel_for(0, attention.examples, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(attention_scratch_bytes(attention) + 64);
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64;
    attend(attention, begin, end, reinterpret_cast<void*>(aligned));
  });
  return out.transpose(1, 2);
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY_FRAGMENT(confprune, m) {
  m.def(
      "short_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, "
      "bool causal) -> Tensor");
}

TORCH_LIBRARY_IMPL(confprune, CPU, m) {
  m.impl("short_attention", confprune::short_attention);
}
