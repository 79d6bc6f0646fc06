// The masked copies of a weight at many levels:
//
//   out[k] = weight where levels > level[k], else 0
//
// Bytes: weight and levels read once, K copies written; the limit is memory bandwidth.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "kernels/elements.h"

namespace confprune::cuda {

// All pointers are to device memory; weight, levels and out are contiguous.
struct MaskedWeights {
  const void* weight;    // [size]
  const void* levels;    // [size] uint8, or int16
  const int64_t* level;  // [K]
  void* out;             // [K, size]
  Element element;       // of weight and out
  bool wide_levels;      // int16
  int64_t size;
  int64_t num_levels;  // K
};

// Returns once the work is in the stream; errors are left for cudaGetLastError.
void masked_weights(const MaskedWeights& masked, Stream stream);

}  // namespace confprune::cuda
