// Selection by magnitude on the device: the thresholds of all levels, without a word to the host.
//
// Keys are as on the CPU: the IEEE bits of |w| read as an unsigned integer, which order as |w| does
// (-0 is 0, +inf the largest, NaN above it). Scores of narrower types are widened exactly.
//
// Cost: one read of the scores where the keys have 15 bits (float16, bfloat16), else two, and more
// only where a sample of the scores misleads. Limit: memory bandwidth; one increment in shared
// memory a score, whose bank conflicts are near it for 16-bit scores.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.h"
#include "kernels/elements.h"

namespace confprune::cuda {

// A tensor on the device, contiguous, aligned to its elements.
struct Scores {
  const void* data;
  Element element;
  int64_t size;
};

// Where the levels cut: on the device, [ranks] each.
struct Selection {
  int64_t* keys;   // of the rank-th smallest score
  int64_t* below;  // scores with a smaller key
  int64_t* equal;  // scores with this key
  int64_t* nan;    // [1]: scores that are NaN; if any, the rest means nothing
};

// Bytes of device memory that `select` works in.
size_t select_scratch(int64_t tensors, int64_t ranks);

// Finds the rank[k]-th smallest score of all `tensors` together, for each k. `rank` on the
// device, of 1 to 32767 ranks, counts from 1, does not decrease and ends at the number of scores at
// most; 0 asks for nothing and gets zeros. `scores` is on the host and free once this returns;
// `scratch` is aligned to 256 bytes. Nothing here waits for the device, so that a graph can capture
// it.
void select(const Scores* scores, int64_t tensors, Element key, const int64_t* rank, int64_t ranks,
            const Selection& found, void* scratch, Stream stream);

// The digit of a key is `digit_bits` bits above its lowest `shift` bits; what stands above is its
// prefix. Counted are the keys whose prefix is among `prefixes`, [size] on the device, increasing;
// all keys where size is 0. There are fewer than 2^32 counters.
struct Digit {
  Element key;
  int shift;
  int digit_bits;
  const int64_t* prefixes;
  int64_t size;
};

// Adds the counts of the scores' digits to `counts`, [max(1, size), 2^digit_bits] on the device.
void histogram(const Scores& scores, const Digit& digit, int64_t* counts, Stream stream);

// Among the keys whose bits above `shift` are prefixes[i], those in [low[i], high[i]]; [size] each,
// on the device.
struct Brackets {
  Element key;
  int shift;
  const int64_t* prefixes;
  const int64_t* low;
  const int64_t* high;
  int64_t size;
};

// Writes the bracketed keys to `keys` in any order, as many as `capacity` allows, and adds their
// number to `found`, [1], all the same. Adds to below[i] the number of keys with prefix i under
// their bracket.
void collect(const Scores& scores, const Brackets& brackets, int64_t capacity, int64_t* keys,
             int64_t* found, int64_t* below, Stream stream);

}  // namespace confprune::cuda
