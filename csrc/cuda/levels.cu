// `assign`: codes from a table, and levels from codes, in one walk over the tiles in order.
//
// Of the keys that equal a straddled value, a tile must know how many stand before it. So it counts
// its own, publishes the counts, and adds up those of the tiles before it until one has already
// published the sum of all up to itself. Tiles are handed out in order, so that what a tile waits
// for is finished or at work. A tile in which no level's share of a value ends gives all equals of
// that value one level; in the few others a warp numbers them.
#include "cuda/levels.h"

#include <algorithm>

#include "cuda/level_table.h"
#include "cuda/scratch.h"
#include "cuda/tiles.h"

namespace confprune::cuda {
namespace {

constexpr int kThreads = 512;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocks = 1;  // at once on a multiprocessor, whose shared memory has room for one
#else
constexpr int kBlocks = 2;
#endif
constexpr int kVectors = 4;                 // of 16 bytes that a thread reads at once
constexpr int kRun = 8;                     // elements that a lane numbers in a row
constexpr int kAhead = 6;                   // tiles whose counts a thread reads at once; 8 spill
constexpr int64_t kMostShares = 64 << 20;   // bytes for what the tiles of a launch publish
constexpr Count kCounted = Count(1) << 62;  // published: the equals of a tile
constexpr Count kSummed = Count(2) << 62;   // and those of all tiles before
constexpr Count kStatus = kCounted | kSummed;

// What a block knows of the keys equal to each value while it works on a tile, [size] each.
struct Equals {
  static constexpr size_t kBytes = sizeof(int64_t) + sizeof(unsigned) + 2 * sizeof(uint16_t);

  int64_t* before;    // the tile
  unsigned* count;    // in it
  uint16_t* level;    // of them
  uint16_t* divided;  // the cuts for which they have several levels

  __device__ Equals(char* memory, int64_t size)
      : before(reinterpret_cast<int64_t*>(memory)),
        count(reinterpret_cast<unsigned*>(before + size)),
        level(reinterpret_cast<uint16_t*>(count + size)),
        divided(level + size) {}
};

// The tiles of a launch, and what they share.
struct Shares {
  int64_t first;
  int64_t tiles;
  unsigned* ticket;  // tiles handed out
  Count* published;  // [tiles, cuts], zero at first
  char* equals;      // [tiles] Equals, where shared memory is not enough
  int64_t* ranks;    // [cuts]: equals before the first tile; in the end, up to the last one
};

// The shared memory of a block, within the 99 KiB that every device has. Narrow codes leave room
// for the cuts in it.
template <Element kKey, class Code>
struct Room {
  static constexpr bool kNarrow = sizeof(Code) == 1;
  static constexpr int kCodes = (kWindow<kKey> ? kKey == Element::float64 ? 16 << 10 : 32 << 10
                                 : kNarrow     ? 64 << 10
                                               : 32 << 10);  // bytes
  static constexpr int kTile = kCodes / int(sizeof(Code));
  static constexpr int kCuts = kNarrow ? kMostNarrow + 1 : 0;

  alignas(16) Code codes[kTile];
  alignas(16) Entry<kKey, Code> entries[kCells];
  alignas(8) char equals[kNarrow ? kCuts * Equals::kBytes : 1];
  Cut<kKey> cuts[kWindow<kKey> ? kCuts + 1 : 1];
  unsigned ticket;
  int divided;
};

template <Element kKey, class Code, class Level>
class Worker {
 public:
  using Shared = Room<kKey, Code>;

  __device__ Worker(const Cuts& cuts, const Table& table, const Shares& shares)
      : cuts_(cuts),
        shares_(shares),
        tie_(table.tie),
        list_(static_cast<const Cut<kKey>*>(table.cuts)) {
    if constexpr (kWindow<kKey>)
      cells_ = *table.window;
    uint4* const entries = reinterpret_cast<uint4*>(shared().entries);
    for (unsigned i = threadIdx.x; i < kCells * sizeof(Entry<kKey, Code>) / 16; i += kThreads)
      entries[i] = __ldg(static_cast<const uint4*>(table.entries) + i);
    if constexpr (kWindow<kKey> && Shared::kNarrow)
      for (unsigned i = threadIdx.x; i <= cuts.size; i += kThreads)
        shared().cuts[i] = list_[i];
  }

  __device__ void run(const Segments& segments) {
    while (take_tile()) {
      const int64_t number = shares_.first + tile_;
      const Tile tile(segment_of_tile(segments, number), number);
      dispatch_element<kKey>(tile.segment->element,
                             [&](auto tag) { assign<decltype(tag)::value>(tile); });
    }
  }

 private:
  static __device__ Shared& shared() { return *dynamic_shared<Shared>(); }

  __device__ Equals equals() const {
    if constexpr (Shared::kNarrow)
      return Equals(shared().equals, Shared::kCuts);
    else
      return Equals(shares_.equals + int64_t(tile_) * cuts_.size * int64_t(Equals::kBytes),
                    cuts_.size);
  }

  // Whether there is one more.
  __device__ bool take_tile() {
    if (threadIdx.x == 0)
      shared().ticket = atomicAdd(shares_.ticket, 1u);
    __syncthreads();
    tile_ = int(shared().ticket);
    if (tile_ >= shares_.tiles)
      return false;
    const Equals equals = this->equals();
    for (unsigned i = threadIdx.x; i < cuts_.size; i += kThreads)
      equals.count[i] = 0;
    if (threadIdx.x == 0)
      shared().divided = 0;
    __syncthreads();
    return true;
  }

  template <Element kFrom>
  __device__ void assign(const Tile& tile) {
    const auto* const data = tile.data<typename Format<kFrom>::Bits>();
    Level* const levels = static_cast<Level*>(tile.segment->levels) + tile.at;
    find_codes<kFrom>(data, tile.size);
    __syncthreads();
    if (*tie_ != 0) {
      find_equals();
      __syncthreads();
    }
    write_levels(levels, tile.size);
    if (shared().divided == 0)
      return;
    __syncthreads();
    for (int i = int(threadIdx.x / kWarp); i < shared().divided; i += kThreads / int(kWarp))
      number_equals<kFrom>(data, tile.size, equals().divided[i], levels);
  }

  // Codes of a tile's elements, and counts of those that tie.
  template <Element kFrom>
  __device__ void find_codes(const typename Format<kFrom>::Bits* data, int size) const {
    using Bits = typename Format<kFrom>::Bits;
    constexpr int kEach = 16 / int(sizeof(Bits));
    unsigned* const counts = equals().count;
    const Cut<kKey>* const cuts = Shared::kNarrow ? shared().cuts : list_;
    const auto code_at = [&](Bits bits) {
      return code_of<kKey, Code>(key_of<kFrom, kKey>(bits), cells_, shared().entries, cuts);
    };
    const auto count = [&](unsigned code) {
      if (code & kTie<Code>)
        atomicAdd(counts + (code & ~kTie<Code>), 1u);
    };
    const int vectors = aligned(data) ? size / kEach : 0;
#pragma unroll 1
    for (int from = int(threadIdx.x); from < vectors; from += kVectors * kThreads) {
      uint4 read[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (from + v * kThreads < vectors)
          read[v] = __ldg(reinterpret_cast<const uint4*>(data) + from + v * kThreads);
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (from + v * kThreads < vectors) {
          unsigned code[kEach];  // all of them before a branch is taken on one
#pragma unroll
          for (int i = 0; i < kEach; ++i)
            code[i] = code_at(unpack<Bits>(read[v], i));
          Pack<sizeof(Code), kEach> codes;
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            count(code[i]);
            codes.set(i, code[i]);
          }
          codes.store(shared().codes + (from + v * kThreads) * kEach);
        }
    }
    for (int i = vectors * kEach + int(threadIdx.x); i < size; i += kThreads) {
      const unsigned code = code_at(data[i]);
      count(code);
      shared().codes[i] = Code(code);
    }
  }

  // From the counts of equals to their levels.
  __device__ void find_equals() const {
    const Equals equals = this->equals();
    for (unsigned cut = threadIdx.x; cut < cuts_.size; cut += kThreads) {
      const int64_t count = equals.count[cut], before = equals_before(cut, count);
      equals.before[cut] = before;
      if (tile_ + 1 == shares_.tiles)
        store_relaxed(shares_.ranks + cut, before + count);
      if (count == 0)
        continue;
      const unsigned last = level_of(cut, before + count - 1);
      equals.level[cut] = uint16_t(last);
      if (level_of(cut, before) != last)
        equals.divided[atomicAdd(&shared().divided, 1)] = uint16_t(cut);
    }
  }

  // Publishes how many keys of this tile equal a value, and adds up those of the tiles before.
  __device__ int64_t equals_before(unsigned cut, int64_t count) const {
    const auto share_of = [&](int tile) {
      return shares_.published + int64_t(tile) * cuts_.size + cut;
    };
    Count* const own = share_of(tile_);
    if (tile_ > 0)
      store_relaxed(own, kCounted | Count(count));
    int64_t before = tile_ > 0 ? 0 : load_relaxed(shares_.ranks + cut);
    for (int tile = tile_ - 1; tile >= 0;) {
      Count seen[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        seen[i] = tile < i ? 0 : load_relaxed(share_of(tile - i));
      bool waits = false;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        waits |= (seen[i] & kStatus) == 0;
        if (waits || tile < 0)
          continue;
        before += int64_t(seen[i] & ~kStatus);
        tile = (seen[i] & kStatus) == kSummed ? -1 : tile - 1;
      }
      if (waits && tile >= 0)
        pause();
    }
    store_relaxed(own, kSummed | Count(before + count));
    return before;
  }

  // Of the key equal to a value that has `rank` equals before it.
  __device__ unsigned level_of(unsigned cut, int64_t rank) const {
    const int64_t first = cuts_.first_level[cut], last = cuts_.first_level[cut + 1];
    const int64_t* const ties = cuts_.ties + first;
    return unsigned(first + first_where(last - first, [&](int64_t j) { return ties[j] > rank; }));
  }

  __device__ void write_levels(Level* levels, int size) const {
    constexpr int kEach = 16 / int(sizeof(Level));
    const uint16_t* const level = equals().level;
    const auto level_at = [&](unsigned code) {
      return code & kTie<Code> ? level[code & ~kTie<Code>] : code;
    };
    const int vectors = aligned(levels) ? size / kEach : 0;
#pragma unroll 2
    for (int v = int(threadIdx.x); v < vectors; v += kThreads) {
      Pack<sizeof(Code), kEach> codes;
      codes.load(shared().codes + v * kEach);
      Pack<sizeof(Level), kEach> out;
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        out.set(i, level_at(codes.get(i)));
      out.store(levels + v * kEach);
    }
    for (int i = vectors * kEach + int(threadIdx.x); i < size; i += kThreads)
      levels[i] = Level(level_at(shared().codes[i]));
  }

  // A warp gives the equals of one value their levels, in order of position.
  template <Element kFrom>
  __device__ void number_equals(const typename Format<kFrom>::Bits* data, int size, unsigned cut,
                                Level* levels) const {
    const Key<kKey> value = Key<kKey>(cuts_.values[cut]);
    const int lane = int(threadIdx.x % kWarp);
    int64_t rank = equals().before[cut];
    for (int from = 0; from < size; from += int(kWarp) * kRun) {
      const int at = from + lane * kRun;
      unsigned equal = 0;  // a bit for each of the run
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        equal |= unsigned(at + i < size && key_of<kFrom, kKey>(data[at + i]) == value) << i;
      if (!__any_sync(kAllLanes, equal != 0))
        continue;
      int upto = __popc(equal);
      for (unsigned by = 1; by < kWarp; by *= 2) {
        const int other = __shfl_up_sync(kAllLanes, upto, by);
        upto += lane >= int(by) ? other : 0;
      }
      int64_t own = rank + upto - __popc(equal);
      rank += __shfl_sync(kAllLanes, upto, int(kWarp) - 1);
      for (; equal != 0; equal &= equal - 1)
        levels[at + __ffs(int(equal)) - 1] = Level(level_of(cut, own++));
    }
  }

  const Cuts& cuts_;
  const Shares& shares_;
  const int* const tie_;  // whether any value is straddled; in memory, for want of a register
  const Cut<kKey>* const list_;
  Cells<kKey> cells_;
  int tile_ = 0;  // of the launch
};

template <Element kKey, class Code, class Level>
__global__ void __launch_bounds__(kThreads, kBlocks)
    assign_tiles(Segments segments, Cuts cuts, Table table, Shares shares) {
  Worker<kKey, Code, Level>(cuts, table, shares).run(segments);
}

// What the host decides from the cuts and the sizes.
struct Plan {
  bool narrow;
  int64_t tile = 1;   // elements
  int64_t tiles = 0;  // of all tensors
  int64_t at_once;

  Plan(const Levelled* tensors, int64_t count, const Cuts& cuts)
      : narrow(cuts.levels <= kMostNarrow) {
    dispatch_key(cuts.key, [&](auto tag) {
      constexpr Element kKey = decltype(tag)::value;
      tile = narrow ? Room<kKey, uint8_t>::kTile : Room<kKey, uint16_t>::kTile;
    });
    for (int64_t i = 0; i < count; ++i)
      tiles += (tensors[i].scores.size + tile - 1) / tile;
    const int64_t each = cuts.size * int64_t(sizeof(Count) + (narrow ? 0 : Equals::kBytes));
    at_once = std::max<int64_t>(1, std::min(tiles, kMostShares / std::max<int64_t>(1, each)));
  }
};

struct Work {
  Segment* list;
  Table table;
  unsigned* ticket;
  Count* published;
  char* equals;

  Work(Scratch& scratch, int64_t tensors, const Plan& plan, const Cuts& cuts)
      : list(scratch.take<Segment>(tensors + 1)),
        table{scratch.take<uint16_t>(kCells), scratch.take<Cut<Element::float64>>(cuts.size + 1),
              scratch.take<Window>(1), scratch.take<int>(1)},
        ticket(scratch.take<unsigned>(1)),
        published(scratch.take<Count>(plan.at_once * cuts.size)),
        equals(scratch.take<char>(
            plan.narrow ? 0 : plan.at_once * cuts.size * int64_t(Equals::kBytes))) {}
};

struct Assigning {
  Segments segments;
  Cuts cuts;
  int64_t* ranks;
  Work work;
  int64_t at_once;
  Stream stream;

  template <Element kKey, class Code, class Level>
  void run() const {
    static_assert(sizeof(Room<kKey, Code>) <= 99 << 10, "not every device has so much");
    const int64_t most = int64_t(device().multiprocessors) * kBlocks;
    clear(work.table.tie, sizeof(int), stream);
    launch(make_table<kKey, Code>, kCells / kThreads + 1, kThreads, 0, stream, cuts, work.table);
    for (int64_t first = 0; first < segments.tiles; first += at_once) {
      const int64_t tiles = std::min(at_once, segments.tiles - first);
      clear(work.ticket, sizeof(unsigned), stream);
      clear(work.published, size_t(tiles * cuts.size) * sizeof(Count), stream);
      const Shares shares{first, tiles, work.ticket, work.published, work.equals, ranks};
      launch(assign_tiles<kKey, Code, Level>, unsigned(std::min(tiles, most)), kThreads,
             sizeof(Room<kKey, Code>), stream, segments, cuts, work.table, shares);
    }
  }
};

}  // namespace

size_t assign_scratch(const Levelled* tensors, int64_t count, const Cuts& cuts) {
  Scratch scratch(nullptr);
  const Work work(scratch, count, Plan(tensors, count, cuts), cuts);
  return scratch.bytes();
}

void assign(const Levelled* tensors, int64_t count, const Cuts& cuts, int64_t* ranks, void* memory,
            Stream stream) {
  const Plan plan(tensors, count, cuts);
  Scratch scratch(memory);
  const Work work(scratch, count, plan, cuts);
  const auto segment = [&](int64_t i) {
    Segment one{};
    one.data = tensors[i].scores.data;
    one.element = tensors[i].scores.element;
    one.size = tensors[i].scores.size;
    one.levels = tensors[i].levels;
    one.tile = plan.tile;
    return one;
  };
  const Segments segments = store(count, segment, work.list, stream);
  const Assigning assigning{segments, cuts, ranks, work, plan.at_once, stream};
  dispatch_key(cuts.key, [&](auto tag) {
    constexpr Element kKey = decltype(tag)::value;
    if (plan.narrow)
      assigning.template run<kKey, uint8_t, uint8_t>();
    else if (cuts.levels <= 255)
      assigning.template run<kKey, uint16_t, uint8_t>();
    else
      assigning.template run<kKey, uint16_t, int16_t>();
  });
}

}  // namespace confprune::cuda
