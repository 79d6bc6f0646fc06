// 64-byte vectors, for machines with AVX-512.
#if defined(__x86_64__)

// The headers of the standard library come before the target is raised: their inline functions may
// be merged with other files' copies, which must run everywhere.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(                                                            \
    __attribute__((                                                                      \
        target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif

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

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
