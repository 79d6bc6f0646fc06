// The masked product and the masked weights for ctypes.
#include "cuda/grid_linear.h"
#include "cuda/masked_weights.h"

extern "C" void settings(int multiprocessors, int shared_bytes, unsigned seed) {
  lockstep::settings().multiprocessors = multiprocessors;
  lockstep::settings().shared_bytes = shared_bytes;
  lockstep::settings().seed = seed;
}

extern "C" void grid_linear(const confprune::cuda::GridLinear* product) {
  confprune::cuda::grid_linear(*product, nullptr);
}

extern "C" void masked_weights(const confprune::cuda::MaskedWeights* masked) {
  confprune::cuda::masked_weights(*masked, nullptr);
}
