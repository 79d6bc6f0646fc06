// A weight as it is at one level: y[i] = levels[i] > level ? w[i] : +0. Bits are chosen, nothing is
// computed, so that infinity and NaN are pruned as all else.
//
// Cost: reads a weight and its prune level and writes one weight; memory is the limit.
#pragma once

#include <cstdint>

namespace confprune {

struct LevelMask {
  const void* weight;
  int size;  // bytes of a weight: 2, 4 or 8
  const void* levels;
  bool wide_levels;  // int16 rather than uint8
  int64_t level;
};

// Writes elements [begin, end) of all to `out`.
void mask_weights(const LevelMask& mask, int64_t begin, int64_t end, void* out);

}  // namespace confprune
