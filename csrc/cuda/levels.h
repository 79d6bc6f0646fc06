// The prune level of every weight on the device, with ties broken by position.
//
// Cost: one read of the scores and one prune level written, whether or not levels take only a part
// of some equals. Limit: memory bandwidth; a table look-up in shared memory a score, and for each
// score that ties with a threshold an increment and a look-up more.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/selection.h"

namespace confprune::cuda {

// Where the levels cut: distinct threshold keys, increasing. A key below values[i] and above
// values[i - 1] is pruned first at level first_level[i] (first_level[size] = levels: never). Of the
// keys equal to values[i], in position order, the first ties[j] are pruned at level j, for j in
// [first_level[i], first_level[i + 1]). A value is straddled when some level takes only a part.
// All arrays are on the device.
struct Cuts {
  Element key;
  int64_t size;
  int64_t levels;              // at most 32767
  const int64_t* values;       // [size]
  const int64_t* first_level;  // [size + 1], does not decrease, at most `levels`
  const int64_t* ties;         // [levels]
  const bool* straddled;       // [size]
};

// Scores, and where their prune levels go: uint8 up to 255 levels, else int16; [scores.size].
struct Levelled {
  Scores scores;
  void* levels;
};

// Bytes of device memory that `assign` works in.
size_t assign_scratch(const Levelled* tensors, int64_t count, const Cuts& cuts);

// Writes the prune levels of all tensors, which follow each other in position. `ranks`, [cuts.size]
// on the device, holds how many equals of each straddled value stand before them, and is advanced.
// `tensors` is on the host and free once this returns; `scratch` is aligned to 256 bytes. Nothing
// here waits for the device, so that a graph can capture it.
void assign(const Levelled* tensors, int64_t count, const Cuts& cuts, int64_t* ranks, void* scratch,
            Stream stream);

}  // namespace confprune::cuda
