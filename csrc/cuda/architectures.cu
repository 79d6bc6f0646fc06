#include "cuda/architectures.h"

#ifndef __CUDA_ARCH_LIST__  // another compiler than nvcc
#define __CUDA_ARCH_LIST__
#endif

namespace confprune::cuda {

const int* architectures(int* count) {
  static const int listed[] = {__CUDA_ARCH_LIST__, 0};
  *count = int(sizeof(listed) / sizeof(int)) - 1;
  return listed;
}

}  // namespace confprune::cuda
