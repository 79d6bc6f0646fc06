// 32-byte vectors, for machines with AVX2 and FMA.
#if defined(__x86_64__)

#include "kernels/sparse_sets.h"
#include "kernels/x86_target.h"

CONFPRUNE_BEGIN_TARGET(CONFPRUNE_AVX2)

#define CONFPRUNE_VECTOR_BYTES 32
#include "kernels/sparse_generic.h"
// After the templates that it uses.
#include "kernels/sparse_algorithm.h"

namespace confprune {

SparseSet sparse_avx2() {
  return {run_task};
}

}  // namespace confprune

CONFPRUNE_END_TARGET

#endif
