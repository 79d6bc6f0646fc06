// The operators that make sense on the CPU alone: with CUDA tensors each says what does its work.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace confprune {
namespace {

void refuse_prefix_rows(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              " got CUDA tensors, but makes what the grid operators of the CPU take. On CUDA these "
              "take the weight and its prune levels as they are, rows=[weight, levels] a layer");
}

void refuse_cut_weights(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              " got CUDA tensors, but masks files that pass through the memory of the CPU. Move "
              "them there with .cpu(); or on CUDA make prune levels, and mask with "
              "torch.ops.confprune.masked_weights");
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY_IMPL(confprune, CUDA, m) {
  using torch::CppFunction;
  m.impl("prefix_rows", CppFunction::makeFromBoxedFunction<&confprune::refuse_prefix_rows>());
  m.impl("cut_weights", CppFunction::makeFromBoxedFunction<&confprune::refuse_cut_weights>());
}
