// What the CUDA kernels were built with. One of csrc/cuda/ops.cpp and csrc/without_cuda.cpp, which
// are compiled with and without CUDA, defines these.
#pragma once

#include <string>

namespace confprune {

std::string cuda_version();        // such as "13.0"; empty where no kernels were built
std::string cuda_architectures();  // such as "8.0 9.0"

}  // namespace confprune
