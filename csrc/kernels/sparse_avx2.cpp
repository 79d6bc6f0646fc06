// 32-byte vectors, for machines with AVX2 and FMA.
#if defined(__x86_64__)

// The headers of the standard library come before the target is raised: their inline functions may
// be merged with other files' copies, which must run everywhere.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/sparse_sets.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define CONFPRUNE_VECTOR_BYTES 32
#include "kernels/sparse_generic.h"
// After the templates that it uses.
#include "kernels/sparse_algorithm.h"

namespace confprune {

SparseSet sparse_avx2() {
  return {run_task};
}

}  // namespace confprune

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
