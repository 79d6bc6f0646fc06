// torch.ops.confprune.cut_weights: schema, argument checks, and dispatch to the kernel.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "arguments.h"
#include "kernels/selection.h"
#include "kernels/weight_cut.h"

namespace confprune {
namespace {

using at::Tensor;

Tensor cut_weights_op(const Tensor& weights, int64_t surely_pruned, int64_t pruned, int64_t unsure,
                      Tensor& out, Tensor& counts) {
  const Element element = element_of(weights.scalar_type(), "weights");
  TORCH_CHECK_VALUE(out.scalar_type() == weights.scalar_type() && out.sizes() == weights.sizes() &&
                        out.is_contiguous() && weights.is_contiguous(),
                    "weights and out must be contiguous, of one type and shape");
  TORCH_CHECK_VALUE(weights.numel() <= std::numeric_limits<int32_t>::max(), "weights has ",
                    weights.numel(), " elements, more than places are counted for");
  const int64_t largest = std::numeric_limits<int64_t>::max() >> (63 - key_bits(element));
  TORCH_CHECK_VALUE(
      -1 <= surely_pruned && surely_pruned <= pruned && pruned <= unsure && unsure <= largest,
      "surely_pruned, pruned and unsure must be keys in increasing order, or -1, got ",
      surely_pruned, ", ", pruned, " and ", unsure);
  int64_data(counts, "counts");
  TORCH_CHECK_VALUE(counts.numel() == 2, "counts holds ", counts.numel(), " cells, not 2");
  std::vector<int32_t> places;
  const CutCounts found = cut_weights(weights.const_data_ptr(), element, weights.numel(),
                                      {surely_pruned, pruned, unsure}, out.data_ptr(), &places);
  counts.data_ptr<int64_t>()[0] += found.surely_pruned;
  counts.data_ptr<int64_t>()[1] += found.nan;
  Tensor result = at::empty({int64_t(places.size())}, weights.options().dtype(at::kInt));
  std::copy(places.begin(), places.end(), result.data_ptr<int32_t>());
  return result;
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY_FRAGMENT(confprune, m) {
  m.def(
      "cut_weights(Tensor weights, int surely_pruned, int pruned, int unsure, Tensor(a!) out, "
      "Tensor(b!) counts) -> Tensor");
}

TORCH_LIBRARY_IMPL(confprune, CPU, m) {
  m.impl("cut_weights", confprune::cut_weights_op);
}
