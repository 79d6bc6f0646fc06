// csrc/cuda/grid_linear.h and masked_weights.h for ctypes.
#include "cuda/grid_linear.h"
#include "cuda/masked_weights.h"

extern "C" {

void cuda_grid_linear(const confprune::cuda::GridLinear* product) {
  confprune::cuda::grid_linear(*product, nullptr);
}

void cuda_masked_weights(const confprune::cuda::MaskedWeights* masked) {
  confprune::cuda::masked_weights(*masked, nullptr);
}
}
