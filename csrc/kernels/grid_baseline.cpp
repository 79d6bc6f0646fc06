// 16-byte vectors: what every x86-64 and arm64 machine has.
#define CONFPRUNE_VECTOR_BYTES 16
#define CONFPRUNE_TILE_VECTORS 8
#include "kernels/grid_algorithm.h"
#include "kernels/instruction_set.h"

namespace confprune {

const InstructionSet& baseline_set() {
  static const InstructionSet set{"baseline", tile_lanes,    run_task,
                                  run_mlp,    run_attention, nullptr};
  return set;
}

}  // namespace confprune
