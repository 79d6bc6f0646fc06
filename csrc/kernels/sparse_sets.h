// The entry points of the sparse product, one for each instruction set.
#pragma once

#include <cstdint>

#include "kernels/sparse_product.h"

namespace confprune {

constexpr int64_t kTileBytes = 128;  // lanes that are computed together: two vectors of 64 bytes

struct SparseSet {
  void (*run)(const SparsePlan& plan, int64_t task, void* scratch);
};

SparseSet sparse_baseline();
#if defined(__x86_64__)
SparseSet sparse_avx2();
SparseSet sparse_avx512();
SparseSet sparse_avx512_vbmi();
#endif

}  // namespace confprune
