#include "kernels/level_mask.h"

#include <algorithm>
#include <limits>

namespace confprune {
namespace {

template <class Bits, class Level>
void choose(const LevelMask& mask, int64_t begin, int64_t end, void* out) {
  using Limits = std::numeric_limits<Level>;
  const Bits* const weight = static_cast<const Bits*>(mask.weight);
  const Level* const levels = static_cast<const Level*>(mask.levels);
  Bits* const to = static_cast<Bits*>(out);
  if (mask.level < Limits::min()) {
    std::copy(weight + begin, weight + end, to + begin);
    return;
  }
  // Of the levels' own type, which compares more of them at once.
  const Level level = Level(std::min<int64_t>(mask.level, Limits::max()));
  for (int64_t i = begin; i < end; ++i)
    to[i] = weight[i] & Bits(-Bits(levels[i] > level));
}

template <class Bits>
void choose_levels(const LevelMask& mask, int64_t begin, int64_t end, void* out) {
  if (mask.wide_levels)
    choose<Bits, int16_t>(mask, begin, end, out);
  else
    choose<Bits, uint8_t>(mask, begin, end, out);
}

}  // namespace

void mask_weights(const LevelMask& mask, int64_t begin, int64_t end, void* out) {
  switch (mask.size) {
    case 2:
      return choose_levels<uint16_t>(mask, begin, end, out);
    case 4:
      return choose_levels<uint32_t>(mask, begin, end, out);
    default:
      return choose_levels<uint64_t>(mask, begin, end, out);
  }
}

}  // namespace confprune
