// 32-byte vectors, for machines with AVX2.
#if defined(__x86_64__)

#include "kernels/x86_target.h"

CONFPRUNE_BEGIN_TARGET(CONFPRUNE_AVX2)

#define CONFPRUNE_VECTOR_BYTES 32
#define CONFPRUNE_TILE_VECTORS 8
#include "kernels/grid_algorithm.h"
#include "kernels/instruction_set.h"

namespace confprune {

const InstructionSet& avx2_set() {
  static const InstructionSet set{"avx2", tile_lanes, run_task, run_mlp, run_attention, nullptr};
  return set;
}

}  // namespace confprune

CONFPRUNE_END_TARGET

#endif
