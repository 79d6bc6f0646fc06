// `select`: a histogram over a window of keys, and again within the brackets that this leaves.
//
// A rank's bracket is 2^width keys, the first of which is kept in Selection::keys; `below` are the
// scores under it and `equal` those in it, so that a bracket of 2^0 keys is the answer. Brackets of
// successive ranks are the same or disjoint, in order; a run of ranks with the same is a group.
#include "cuda/selection.h"

#include <algorithm>

#include "cuda/counting.h"
#include "cuda/scan.h"
#include "cuda/scratch.h"
#include "cuda/tiles.h"

namespace confprune::cuda {
namespace {

constexpr unsigned kMostCells = 1u << 15;   // of a window: counters in shared memory
constexpr int64_t kSample = 1 << 16;        // scores that tell where the window should be
constexpr int kSampleBits = 15;             // of their keys
constexpr double kDeviations = 5;           // of a sampled rank that the window allows for
constexpr int kMostDigit = 16;              // bits of a key that one look within brackets tells
constexpr int64_t kMostCounters = 1 << 22;  // of such a look
constexpr int kNarrowing = 256;             // threads of a block that narrows brackets
constexpr uint16_t kNone = 0xffff;

// Counts the highest bits of some keys, spread evenly but for a jitter: a regular step could meet
// one column of a matrix alone.
template <Element kKey>
__global__ void __launch_bounds__(kThreads)
    sample_keys(Segments segments, int64_t size, Count* counts) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int64_t step = segments.size / size;
    const int64_t jitter = int64_t((uint64_t(i) * 0x9e3779b97f4a7c15u) >> 33) % step;
    const int64_t at = i * step + jitter;
    const Segment& segment = segments.list[first_where(
        segments.count - 1, [&](int64_t s) { return segments.list[s + 1].before > at; })];
    dispatch_element<kKey>(segment.element, [&](auto tag) {
      constexpr Element kFrom = decltype(tag)::value;
      const auto* data = static_cast<const typename Format<kFrom>::Bits*>(segment.data);
      const Key<kKey> key = key_of<kFrom, kKey>(data[at - segment.before]);
      atomicAdd(counts + (key >> (Format<kKey>::kBits - kSampleBits)), Count(1));
    });
  }
}

struct Sample {
  const Count* cumulative;
  int64_t size;
  int64_t scores;  // that it was drawn from

  // The cell where a rank (from 1) of all scores may lie at the least (side -1) or at the most (1);
  // within that of the extreme keys, zeros left out.
  __device__ int64_t cell(int64_t rank, int side) const {
    const double part = double(rank) / double(scores), expected = part * double(size);
    const double deviation = sqrt(expected * (part < 1 ? 1 - part : 0));
    const double at = expected + side * (kDeviations * deviation + 8);
    const double least = double(cumulative[0] + 1);
    const double wanted = at < least ? least : at < double(size) ? at : double(size);
    return place_of(int64_t(wanted), cumulative, int64_t(1) << kSampleBits).cell;
  }
};

// Lays the window over the keys from the smallest wanted rank to the largest.
__global__ void __launch_bounds__(kThreads)
    lay_window(Count* sampled, int64_t size, int64_t scores, int bits, const int64_t* rank,
               int64_t ranks, unsigned cells, Window* window) {
  cumulate(sampled, int64_t(1) << kSampleBits, dynamic_shared<Count>());
  if (threadIdx.x != 0)
    return;
  const Sample sample{sampled, size, scores};
  const int64_t first = first_where(ranks - 1, [&](int64_t k) { return rank[k] > 0; });
  const uint64_t low = uint64_t(sample.cell(rank[first], -1));
  const uint64_t high = uint64_t(sample.cell(rank[ranks - 1], 1));
  const int drop = bits - kSampleBits;
  *window = window_of(low << drop, ((high + 1) << drop) - 1, cells);
}

template <class Cells>
__device__ Cells load_cells(const Window* window) {
  if constexpr (std::is_same_v<Cells, Window>)
    return *window;
  else
    return Cells{};
}

// Counts all keys by cell, and NaN where the cells do not tell it.
template <Element kKey, class Cells>
__global__ void __launch_bounds__(kThreads, 1)
    count_cells(Segments segments, const Window* window, Count* counts, Count* nan) {
  const Cells cells = load_cells<Cells>(window);
  BlockCounts block(counts, cells.cells);
  unsigned met = 0;
  for_keys<kKey>(segments, [&](Key<kKey> key, bool valid) {
    block.add(valid, cells.cell(key));
    if constexpr (std::is_same_v<Cells, Window>)
      met += valid && key > Format<kKey>::kInfinity;
  });
  if (met > 0)
    atomicAdd(nan, Count(met));
  block.flush();
}

// The bits that tell `size` keys apart.
inline __device__ int width_of(uint64_t size) {
  return size <= 1 ? 0 : 64 - __clzll((long long)(size - 1));
}

// Gives every rank the cell that it lies in as its bracket.
template <Element kKey, class Cells>
__global__ void __launch_bounds__(kThreads)
    narrow_to_cells(Count* counts, const Window* window, const int64_t* rank, int64_t ranks,
                    Selection found, int* width) {
  constexpr int kBits = Format<kKey>::kBits;
  const Cells cells = load_cells<Cells>(window);
  cumulate(counts, cells.cells, dynamic_shared<Count>());
  for (int64_t k = threadIdx.x; k < ranks; k += blockDim.x) {
    const bool cuts = rank[k] > 0;
    const Place place = cuts ? place_of(rank[k], counts, cells.cells) : Place{0, 0, 0};
    const uint64_t start = cells.start(unsigned(place.cell), kBits);
    const int bits = width_of(cells.start(unsigned(place.cell) + 1, kBits) - start);
    found.keys[k] = int64_t(start);
    found.below[k] = place.before;
    found.equal[k] = place.inside;
    width[k] = bits < kBits ? bits : kBits;
  }
  if constexpr (!std::is_same_v<Cells, Window>)
    if (threadIdx.x == 0)
      *found.nan = int64_t(counts[cells.cells - 1] - counts[Format<kKey>::kInfinity]);
}

// The bracket of a group of ranks. In it the digit of a key is counted: what the key has above its
// lowest `drop` bits, from `start` on.
struct Group {
  uint64_t start;
  int drop;
  int leader;  // the first of its ranks
};

// What is left to look for.
struct Groups {
  Group* list;
  int* of_rank;     // -1 where the rank's key is found
  uint16_t* first;  // by cell, the first group in it or kNone
  Count* counters;  // of digits, by group
  struct Size {
    int groups;
    int digit;  // bits
  }* size;
};

// One block finds the groups, and digits for which there are counters.
__global__ void __launch_bounds__(kThreads)
    group_ranks(const Window* window, int64_t ranks, const int64_t* keys, const int* width,
                int64_t counters, Groups groups) {
  int* const shared = dynamic_shared<int>();
  int* const widest = shared + kWarp;
  for (unsigned cell = threadIdx.x; cell < window->cells; cell += blockDim.x)
    groups.first[cell] = kNone;
  if (threadIdx.x == 0)
    *widest = 0;
  int size = 0;
  for (int64_t from = 0; from < ranks; from += blockDim.x) {
    const int64_t k = from + threadIdx.x;
    const bool open = k < ranks && width[k] > 0;
    const bool leads = open && (k == 0 || keys[k - 1] != keys[k]);
    const Sums<int> leaders = block_sums(int(leads), shared);
    const int own = size + leaders.before + int(leads) - 1;
    if (leads)
      groups.list[own] = {uint64_t(keys[k]), width[k], int(k)};
    if (open)
      atomicMax(widest, width[k]);
    if (k < ranks)
      groups.of_rank[k] = open ? own : -1;
    size += leaders.all;
  }
  __syncthreads();
  int digit = *widest < kMostDigit ? *widest : kMostDigit;
  while (int64_t(size) << digit > counters)
    --digit;
  for (int g = int(threadIdx.x); g < size; g += int(blockDim.x)) {
    Group& group = groups.list[g];
    group.drop = group.drop > digit ? group.drop - digit : 0;
    const unsigned cell = window->cell(group.start);
    if (g == 0 || window->cell(groups.list[g - 1].start) != cell)
      groups.first[cell] = uint16_t(g);
  }
  if (threadIdx.x == 0)
    *groups.size = {size, digit};
}

__global__ void __launch_bounds__(kThreads) clear_counters(Groups groups) {
  const int64_t size = int64_t(groups.size->groups) << groups.size->digit;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x)
    groups.counters[i] = 0;
}

// Counts the digits of the keys in a group's bracket. Few keys are in any: most warps know from a
// table in shared memory that they have none.
template <Element kKey>
__global__ void __launch_bounds__(kThreads, 1)
    count_digits(Segments segments, const Window* window, Groups groups) {
  const Groups::Size size = *groups.size;
  if (size.groups == 0)
    return;
  const Window cells = *window;
  uint16_t* const first = dynamic_shared<uint16_t>();
  for (unsigned cell = threadIdx.x; cell < cells.cells; cell += blockDim.x)
    first[cell] = groups.first[cell];
  __syncthreads();
  WarpCounts counts(groups.counters, unsigned(size.groups) << size.digit);
  for_keys<kKey>(segments, [&](Key<kKey> key, bool valid) {
    const unsigned candidate = valid ? first[cells.cell(key)] : kNone;
    if (!__any_sync(kAllLanes, candidate != kNone))
      return;
    bool inside = false;
    unsigned counter = 0;
    if (candidate != kNone) {
      const Group* group = groups.list + candidate;
      const Group* const last = groups.list + size.groups - 1;
      if (group != last && group[1].start <= key)  // several groups in one cell
        group += first_where(last - group, [&](int64_t g) { return group[g + 1].start > key; });
      const Key<kKey> digit = (key - Key<kKey>(group->start)) >> group->drop;
      inside = key >= group->start && digit >> size.digit == 0;
      counter = (unsigned(group - groups.list) << size.digit) + unsigned(digit);
    }
    counts.add(inside, counter);
  });
  counts.flush();
}

// Narrows the brackets to what a digit tells, a group at a time.
__global__ void __launch_bounds__(kNarrowing)
    narrow_to_digits(Groups groups, const int64_t* rank, int64_t ranks, Selection found,
                     int* width) {
  const int64_t digits = int64_t(1) << groups.size->digit;
  for (int g = int(blockIdx.x); g < groups.size->groups; g += int(gridDim.x)) {
    Count* const counts = groups.counters + g * digits;
    cumulate(counts, digits, dynamic_shared<Count>());
    const Group group = groups.list[g];
    for (int64_t k = group.leader + threadIdx.x; k < ranks && groups.of_rank[k] == g;
         k += blockDim.x) {
      const Place place = place_of(rank[k] - found.below[k], counts, digits);
      found.keys[k] += place.cell << group.drop;
      found.below[k] += place.before;
      found.equal[k] = place.inside;
      width[k] = group.drop;
    }
  }
}

constexpr size_t kScanBytes = kWarp * sizeof(Count);

int64_t counters_for(int64_t ranks) {
  int64_t counters = int64_t(1) << kMostDigit;
  while (counters < kMostCounters && counters >> kMostDigit < ranks)
    counters *= 2;
  return counters;
}

// Looks within brackets that surely find all keys: each tells as many bits as there are counters
// for when no two ranks have the same bracket.
int looks_for(int bits, int64_t ranks) {
  int digit = kMostDigit;
  while (ranks << digit > counters_for(ranks))
    --digit;
  return (bits + digit - 1) / digit;
}

// What `select` keeps on the device.
struct Work {
  Segment* list;
  Count* counts;
  Count* sampled;
  Window* window;
  int* width;
  Groups groups;

  Work(Scratch& scratch, int64_t tensors, int64_t ranks)
      : list(scratch.take<Segment>(tensors + 1)),
        counts(scratch.take<Count>(kMostCells)),
        sampled(scratch.take<Count>(int64_t(1) << kSampleBits)),
        window(scratch.take<Window>(1)),
        width(scratch.take<int>(ranks)),
        groups{scratch.take<Group>(ranks), scratch.take<int>(ranks),
               scratch.take<uint16_t>(kMostCells), scratch.take<Count>(counters_for(ranks)),
               scratch.take<Groups::Size>(1)} {}
};

struct Selecting {
  Segments segments;
  const int64_t* rank;
  int64_t ranks;
  Selection found;
  Work work;
  Stream stream;

  template <Element kKey, class Cells>
  void look_at_cells(unsigned cells) const {
    clear(work.counts, cells * sizeof(Count), stream);
    launch(count_cells<kKey, Cells>, blocks_for(segments.tiles, 1), kThreads,
           BlockCounts::bytes(cells), stream, segments, work.window, work.counts,
           reinterpret_cast<Count*>(found.nan));
    launch(narrow_to_cells<kKey, Cells>, 1, kThreads, kScanBytes, stream, work.counts, work.window,
           rank, ranks, found, work.width);
  }

  template <Element kKey>
  void find_window(unsigned cells) const {
    const int64_t size = std::min(kSample, segments.size);
    clear(work.sampled, sizeof(Count) << kSampleBits, stream);
    if (size > 0)
      launch(sample_keys<kKey>, unsigned(std::min<int64_t>(16, (size + kThreads - 1) / kThreads)),
             kThreads, 0, stream, segments, size, work.sampled);
    launch(lay_window, 1, kThreads, kScanBytes, stream, work.sampled, size, segments.size,
           Format<kKey>::kBits, rank, ranks, cells, work.window);
  }

  template <Element kKey>
  void look_at_digits(unsigned cells) const {
    launch(group_ranks, 1, kThreads, (kWarp + 1) * sizeof(int), stream, work.window, ranks,
           found.keys, work.width, counters_for(ranks), work.groups);
    launch(clear_counters, blocks_for(counters_for(ranks) / kThreads, 2), kThreads, 0, stream,
           work.groups);
    launch(count_digits<kKey>, blocks_for(segments.tiles, 1), kThreads, cells * sizeof(uint16_t),
           stream, segments, work.window, work.groups);
    launch(narrow_to_digits, blocks_for(ranks, 2), kNarrowing, kScanBytes, stream, work.groups,
           rank, ranks, found, work.width);
  }

  template <Element kKey>
  void run() const {
    const bool roomy = size_t(device().shared_bytes) >= BlockCounts::bytes(kMostCells);
    if constexpr (Format<kKey>::kBits == 15)
      if (roomy)
        return look_at_cells<kKey, EveryKey>(EveryKey::cells);
    const unsigned cells = roomy ? kMostCells : kMostCells / 2;
    clear(found.nan, sizeof(int64_t), stream);
    find_window<kKey>(cells);
    look_at_cells<kKey, Window>(cells);
    for (int look = looks_for(Format<kKey>::kBits, ranks); look > 0; --look)
      look_at_digits<kKey>(cells);
  }
};

}  // namespace

size_t select_scratch(int64_t tensors, int64_t ranks) {
  Scratch scratch(nullptr);
  const Work work(scratch, tensors, ranks);
  return scratch.bytes();
}

void select(const Scores* scores, int64_t tensors, Element key, const int64_t* rank, int64_t ranks,
            const Selection& found, void* memory, Stream stream) {
  Scratch scratch(memory);
  const Work work(scratch, tensors, ranks);
  const Segments segments =
      store(tensors, [&](int64_t i) { return segment_of(scores[i]); }, work.list, stream);
  const Selecting selecting{segments, rank, ranks, found, work, stream};
  dispatch_key(key, [&](auto tag) { selecting.template run<decltype(tag)::value>(); });
}

}  // namespace confprune::cuda
