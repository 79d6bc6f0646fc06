#include "kernels/weight_cut.h"

#include <algorithm>
#include <limits>
#include <type_traits>

namespace confprune {
namespace {

constexpr int64_t kRun = 64;  // weights that are searched only if some of them are unsure

// 1 or 0, by the sign of a difference that cannot overflow: SSE2 compares no integers of 64 bits.
template <class Bits>
Bits greater(Bits key, Bits than) {
  return Bits(std::make_unsigned_t<Bits>(than - key) >> (8 * sizeof(Bits) - 1));
}

// Bits: the signed integer of a weight's size. Comparisons are counted in it too, so that a vector
// holds as many counters as weights.
template <class Bits>
CutCounts cut_bits(const Bits* weights, int64_t count, const WeightCut& cut, Bits infinity,
                   Bits* out, std::vector<int32_t>* unsure) {
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  const Bits sure = Bits(cut.surely_pruned), pruned = Bits(cut.pruned), last = Bits(cut.unsure);
  CutCounts counts;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const Bits* const from = weights + begin;
    Bits* const to = out + begin;
    const int64_t size = std::min(kRun, count - begin);
    Bits above = 0, beyond = 0, nan = 0;
    const auto cut_one = [&](int64_t i) {
      const Bits key = Bits(from[i] & kMagnitude);
      to[i] = Bits(from[i] & -greater(key, pruned));
      above = Bits(above + greater(key, sure));
      beyond = Bits(beyond + greater(key, last));
      nan = Bits(nan + greater(key, infinity));
    };
    if (size == kRun)
      for (int64_t i = 0; i < kRun; ++i)
        cut_one(i);
    else
      for (int64_t i = 0; i < size; ++i)
        cut_one(i);
    counts.surely_pruned += size - above;
    counts.nan += nan;
    if (above == beyond)
      continue;
    int32_t places[kRun];
    int64_t found = 0;
    for (int64_t i = 0; i < size; ++i) {  // without a branch: what is not wanted is overwritten
      const Bits key = Bits(from[i] & kMagnitude);
      places[found] = int32_t(begin + i);
      found += (key > sure) & (key <= last);
    }
    unsure->insert(unsure->end(), places, places + found);
  }
  return counts;
}

}  // namespace

CutCounts cut_weights(const void* weights, Element element, int64_t count, const WeightCut& cut,
                      void* out, std::vector<int32_t>* unsure) {
  const auto as = [&](auto infinity) {
    using Bits = decltype(infinity);
    return cut_bits(static_cast<const Bits*>(weights), count, cut, infinity,
                    static_cast<Bits*>(out), unsure);
  };
  switch (element) {
    case Element::float32:
      return as(int32_t(0x7f800000));
    case Element::float64:
      return as(int64_t(0x7ff0000000000000));
    case Element::float16:
      return as(int16_t(0x7c00));
    default:
      return as(int16_t(0x7f80));
  }
}

}  // namespace confprune
