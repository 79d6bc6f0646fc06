// `histogram` and `collect`: what a selection over several devices asks of each.
//
// Cost: one read of the scores, and for each a binary search among the prefixes. Counters are in
// shared memory where it has room for them.
#include <algorithm>

#include "cuda/counting.h"
#include "cuda/scan.h"
#include "cuda/selection.h"
#include "cuda/tiles.h"

namespace confprune::cuda {
namespace {

// One tensor as a list, in the parameters of a kernel.
struct Alone {
  Segment list[2];

  explicit Alone(const Scores& scores) : list{segment_of(scores), Segment{}} {
    list[1].before = scores.size;
    list[1].first = tiles();
  }
  int64_t tiles() const { return (list[0].size + list[0].tile - 1) / list[0].tile; }
};

// Calls body(key, valid) for all of this block.
template <Element kKey, class Body>
__device__ void for_keys(const Alone& alone, Body body) {
  for_keys<kKey>(Segments{alone.list, 1, alone.list[1].first, alone.list[1].before}, body);
}

// The row of a prefix among increasing ones; no prefix: that of all keys. -1 where it is not there.
inline __device__ int64_t row_of(uint64_t prefix, const int64_t* prefixes, int64_t size) {
  if (size == 0)
    return 0;
  const int64_t row = first_where(size, [&](int64_t i) { return uint64_t(prefixes[i]) >= prefix; });
  return row < size && uint64_t(prefixes[row]) == prefix ? row : -1;
}

template <Element kKey, class Counts>
__global__ void __launch_bounds__(kThreads, 1)
    count_prefixed(const __grid_constant__ Alone scores, Digit digit, unsigned cells,
                   Count* counts) {
  Counts own(counts, cells);
  for_keys<kKey>(scores, [&](Key<kKey> key, bool valid) {
    const uint64_t known = uint64_t(key) >> digit.shift, prefix = known >> digit.digit_bits;
    const int64_t row = row_of(prefix, digit.prefixes, digit.size);
    const uint64_t low = known - (prefix << digit.digit_bits);
    own.add(valid && row >= 0, unsigned((uint64_t(row) << digit.digit_bits) + low));
  });
  own.flush();
}

template <Element kKey>
__global__ void __launch_bounds__(kThreads, 1)
    collect_bracketed(const __grid_constant__ Alone scores, Brackets brackets, int64_t capacity,
                      int64_t* keys, Count* found, Count* below) {
  const unsigned lane = threadIdx.x % kWarp;
  WarpCounts under(below, unsigned(brackets.size));
  for_keys<kKey>(scores, [&](Key<kKey> bits, bool valid) {
    const int64_t key = int64_t(bits);
    const int64_t row = brackets.size == 0 ? -1
                                           : row_of(uint64_t(key) >> brackets.shift,
                                                    brackets.prefixes, brackets.size);
    const bool known = valid && row >= 0;
    under.add(known && key < brackets.low[row], unsigned(row));
    const bool inside = known && key >= brackets.low[row] && key <= brackets.high[row];
    const unsigned lanes = __ballot_sync(kAllLanes, inside);
    if (lanes == 0)
      return;
    Count at = 0;
    if (lane == 0)
      at = atomicAdd(found, Count(__popc(lanes)));
    at = __shfl_sync(kAllLanes, at, 0) + Count(__popc(lanes & ((1u << lane) - 1)));
    if (inside && int64_t(at) < capacity)
      keys[at] = key;
  });
  under.flush();
}

}  // namespace

void histogram(const Scores& scores, const Digit& digit, int64_t* counts, Stream stream) {
  const Alone alone(scores);
  const int64_t cells = std::max<int64_t>(1, digit.size) << digit.digit_bits;
  const size_t bytes = BlockCounts::bytes(cells);
  const int blocks = blocks_for(alone.tiles(), 1);
  Count* const all = reinterpret_cast<Count*>(counts);
  dispatch_key(digit.key, [&](auto tag) {
    constexpr Element kKey = decltype(tag)::value;
    if (bytes <= size_t(device().shared_bytes))
      launch(count_prefixed<kKey, BlockCounts>, blocks, kThreads, bytes, stream, alone, digit,
             unsigned(cells), all);
    else
      launch(count_prefixed<kKey, WarpCounts>, blocks, kThreads, 0, stream, alone, digit,
             unsigned(cells), all);
  });
}

void collect(const Scores& scores, const Brackets& brackets, int64_t capacity, int64_t* keys,
             int64_t* found, int64_t* below, Stream stream) {
  const Alone alone(scores);
  dispatch_key(brackets.key, [&](auto tag) {
    launch(collect_bracketed<decltype(tag)::value>, blocks_for(alone.tiles(), 1), kThreads, 0,
           stream, alone, brackets, capacity, keys, reinterpret_cast<Count*>(found),
           reinterpret_cast<Count*>(below));
  });
}

}  // namespace confprune::cuda
