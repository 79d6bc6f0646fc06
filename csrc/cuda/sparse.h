// A matrix that holds its surviving weights only (kernels/sparse_matrix.h), on the device:
//
//   y = x Wᵀ + bias    for few vectors x
//   W                  with its zeros; for many vectors, whose product torch's own kernel does best
//
// Pruned weights take no part, as on the CPU: where an input is infinite, the outputs that it does
// not reach are not NaN. The sums of 16-bit weights are of floats, and in one order, whatever
// else the call holds and whatever the device: a vector's results do not depend on the others.
//
// The host does not see what `cells` holds. The kernels find there for what shape it was made, and
// where that is another one, every result is NaN.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.h"
#include "kernels/elements.h"
#include "kernels/sparse_matrix.h"

namespace confprune::cuda {

// All pointers are to device memory.
struct SparseLinear {
  SparseMatrix weight;  // of one group
  const void* x;        // [vectors, row_size], of type `element`
  const void* bias;     // [rows] doubles for float64 weights, else floats; null: 0
  void* y;              // [vectors, rows] of type `element`, contiguous
  Element element;      // float64 where the weights are, and only there
  int64_t vectors;
  int64_t x_strides[2];  // in elements
};

// Bytes of scratch memory that sparse_linear needs.
size_t sparse_linear_scratch(const SparseLinear& product);

// Return once the work is in the stream; errors are left for cudaGetLastError.
void sparse_linear(const SparseLinear& product, void* scratch, Stream stream);
void sparse_unpack(const SparseMatrix& sparse, void* dense, Stream stream);  // [rows, row_size]

}  // namespace confprune::cuda
