// 16-byte vectors: what every x86-64 and arm64 machine has.
#define CONFPRUNE_VECTOR_BYTES 16
#include "kernels/sparse_generic.h"
// After the templates that it uses.
#include "kernels/sparse_algorithm.h"

namespace confprune {

SparseSet sparse_baseline() {
  return {run_task};
}

}  // namespace confprune
