// Attention over short sequences, in float32:
//
//   y[t] = Σ_s softmax_s(scale · q[t] · k[s] + mask[t, s]) v[s]
//
// for each head of each example, q [queries, width], k and v [keys, width]. A query without a key,
// all of them masked, gets 0, as in torch.
//
// Operations: 4 · queries · keys · width a head. General kernels call a matrix product for each
// head, which takes longer than these few; here a head stays in the nearest caches.
#pragma once

#include <cstdint>

namespace confprune {

// A borrowed tensor [examples, heads, tokens, width], the strides of all but the last, which is 1.
struct Heads {
  const float* data;
  int64_t strides[3];
};

struct Attention {
  Heads query, key, value;
  Heads mask;  // [examples, heads, queries, keys]; without data: 0
  float* out;  // [examples, queries, heads, width]
  int64_t examples, heads, queries, keys, width;
  float scale;
  bool causal;  // a query sees the keys up to its own place only
};

// Bytes of scratch, 64-byte aligned, for one thread.
int64_t attention_scratch_bytes(const Attention& attention);

// The outputs of examples [begin, end).
void attend(const Attention& attention, int64_t begin, int64_t end, void* scratch);

}  // namespace confprune
