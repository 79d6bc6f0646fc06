// Weights up to a cut set to zero, and where those near the cut stand: pruning where the cut is
// known, or known but for a few weights.
//
// Keys are magnitudes as in selection.h. Cost: one read, one write, and eight operations on
// integers for a vector of weights, which every x86-64 has; memory bandwidth is the limit.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/elements.h"

namespace confprune {

// Keys in increasing order, each the last of its kind; -1 is less than every key.
struct WeightCut {
  int64_t surely_pruned;
  int64_t pruned;
  int64_t unsure;
};

struct CutCounts {
  int64_t surely_pruned = 0;
  int64_t nan = 0;
};

// Writes `count` weights to `out`, zero where their key is at most cut.pruned; appends to `unsure`
// the places of those with a key above cut.surely_pruned and up to cut.unsure, in order.
CutCounts cut_weights(const void* weights, Element element, int64_t count, const WeightCut& cut,
                      void* out, std::vector<int32_t>* unsure);

}  // namespace confprune
