// torch.ops.confprune: what was built, and what it runs on.
#include <ATen/core/Dict.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "cuda_build.h"
#include "kernels/instruction_set.h"

namespace confprune {
namespace {

c10::Dict<std::string, std::string> build_info() {
  c10::Dict<std::string, std::string> built;
#if defined(__clang__)
  built.insert("compiler", "clang " __clang_version__);
#else
  built.insert("compiler", "gcc " __VERSION__);
#endif
  built.insert("torch", TORCH_VERSION);
  built.insert("cuda", cuda_version());
  built.insert("architectures", cuda_architectures());
  return built;
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY(confprune, m) {
  m.def("instruction_set() -> str", [] { return std::string(confprune::instruction_set().name); });
  m.def("build_info() -> Dict(str, str)", confprune::build_info);
}
