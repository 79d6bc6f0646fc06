// In place of csrc/cuda/ in builds without CUDA: every operator says so when it meets CUDA tensors.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "cuda_build.h"

namespace confprune {

std::string cuda_version() {
  return "";
}

std::string cuda_architectures() {
  return "";
}

namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(
      false, op.schema().name(),
      " got CUDA tensors, but this build of confprune has no CUDA kernels. Rebuild it where "
      "the CUDA toolkit is, with: CONFPRUNE_CUDA=1 pip install --no-build-isolation . (in "
      "its folder); or move the tensors to the CPU");
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY_IMPL(confprune, CUDA, m) {
  for (const char* name :
       {"magnitude_histogram", "magnitude_collect", "magnitude_select", "assign_levels",
        "cut_weights", "masked_weights", "masked_linear", "prefix_rows", "grid_linear", "grid_mlp",
        "grid_conv", "sparse_pack", "sparse_check", "sparse_unpack", "sparse_linear", "sparse_conv",
        "short_attention"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&confprune::refuse>());
}
