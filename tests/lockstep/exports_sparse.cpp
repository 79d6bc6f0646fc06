// csrc/cuda/sparse.h for ctypes: scratch memory comes from here.
#include <cstdlib>
#include <cstring>

#include "cuda/sparse.h"

extern "C" {

void cuda_sparse_linear(const confprune::cuda::SparseLinear* product) {
  const size_t bytes = confprune::cuda::sparse_linear_scratch(*product);
  void* scratch = std::malloc(bytes);
  std::memset(scratch, 0xff, bytes);  // NaN
  confprune::cuda::sparse_linear(*product, scratch, nullptr);
  std::free(scratch);
}

void cuda_sparse_unpack(const confprune::SparseMatrix* sparse, void* dense) {
  confprune::cuda::sparse_unpack(*sparse, dense, nullptr);
}
}
