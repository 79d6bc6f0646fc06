// Which keys lie in a few wanted bins: the filter in front of every second look at the weights.
#pragma once

#include <cstdint>

namespace confprune {

// The highest of the wanted bins (a key's bits above `shift`) and the kBins below it, one flag
// each. Keys under the window count as its first bin, keys over it as its last.
struct KeyWindow {
  static constexpr uint32_t kBins = 4096;
  int shift;
  uint32_t base;  // smallest key of the window
  uint16_t flags[kBins / 16];
};

// Writes to `found` the keys of `count` float32 weights that lie in a flagged bin, in order, and
// returns how many. `found` has room for `count`, rounded up to a multiple of 32.
using KeyFilter = int64_t (*)(const float* weights, int64_t count, const KeyWindow& window,
                              uint32_t* found);

#if defined(__x86_64__)
int64_t filter_keys_avx512(const float* weights, int64_t count, const KeyWindow& window,
                           uint32_t* found);
#endif

}  // namespace confprune
