// 64-byte vectors, for machines with AVX-512.
#if defined(__x86_64__)

#include "kernels/x86_target.h"

CONFPRUNE_BEGIN_TARGET(CONFPRUNE_AVX512)

#define CONFPRUNE_VECTOR_BYTES 64
#define CONFPRUNE_TILE_VECTORS 8
#include "kernels/grid_algorithm.h"
#include "kernels/instruction_set.h"

namespace confprune {

const InstructionSet& avx512_set() {
  static const InstructionSet set{"avx512", tile_lanes,    run_task,
                                  run_mlp,  run_attention, filter_keys_avx512};
  return set;
}

}  // namespace confprune

CONFPRUNE_END_TARGET

#endif
