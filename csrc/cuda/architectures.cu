#include "cuda/architectures.h"

namespace confprune::cuda {

#ifdef __CUDA_ARCH_LIST__
const int* architectures(int* count) {
  static const int listed[] = {__CUDA_ARCH_LIST__};
  *count = int(sizeof(listed) / sizeof(int));
  return listed;
}
#else  // another compiler than nvcc
const int* architectures(int* count) {
  *count = 0;
  return nullptr;
}
#endif

}  // namespace confprune::cuda
