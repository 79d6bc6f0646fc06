#include "kernels/attention.h"

#include "kernels/instruction_set.h"

namespace confprune {

int64_t attention_scratch_bytes(const Attention& attention) {
  constexpr int64_t kMostLanes = 16;
  const auto whole = [](int64_t size) { return (size + kMostLanes - 1) / kMostLanes * kMostLanes; };
  const int64_t keys = whole(attention.keys), width = whole(attention.width);
  // Keys, values and transposed keys; scores, outputs and mask.
  return (3 * keys * width + attention.queries * (2 * keys + width)) * int64_t(sizeof(float));
}

void attend(const Attention& attention, int64_t begin, int64_t end, void* scratch) {
  instruction_set().attend(attention, begin, end, scratch);
}

}  // namespace confprune
