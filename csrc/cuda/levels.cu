// `assign`: a table from the cells of keys to prune levels, and one walk over the tiles in order.
//
// Of the keys that equal a straddled value, a tile must know how many stand before it. So it counts
// its own, publishes the counts, and adds up those of the tiles before it until one has already
// published the sum of all up to itself. Tiles are handed out in order, so that what a tile waits
// for is finished or at work. A tile where no level's share of a value ends gives all equals of the
// value one level; in the few others a warp numbers them.
#include "cuda/levels.h"

#include <algorithm>

#include "cuda/scan.h"
#include "cuda/scratch.h"
#include "cuda/tiles.h"

namespace confprune::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kAtOnce = 4;                 // vectors of 16 bytes that a thread reads at once
constexpr int kKept = 64;                  // bytes that a thread keeps of a tile
constexpr unsigned kCells = 1u << 15;      // of the table
constexpr int kRun = 8;                    // elements that a lane numbers in a row
constexpr int kAhead = 8;                  // tiles whose counts a thread reads at once
constexpr int kMostNarrow = 127;           // levels whose codes have 8 bits
constexpr int64_t kMostShares = 64 << 20;  // bytes for the shares of one launch's tiles
constexpr uint16_t kSearch = 0x8000;
constexpr Count kCounted = Count(1) << 62;  // a share's own equals
constexpr Count kSummed = Count(2) << 62;   // and those of all tiles before
constexpr Count kStatus = Count(3) << 62;

// What becomes of a key is a code: a prune level; or, past these, the cut it ties with.
template <Element kKey>
struct Cut {
  Key<kKey> value;
  uint16_t below;  // the code of keys between this value and the one before
  uint16_t equal;
};

// An exact cell for each key of 15 bits, else a window over the cuts.
template <Element kKey>
using Cells = std::conditional_t<Format<kKey>::kBits == 15, EveryKey, Window>;

// The table gives a cell's code, or kSearch with the first of the cuts to compare with.
struct Table {
  uint16_t* cells;
  Window* window;
  void* cuts;  // [size + 1] Cut, the last one above all keys
  int* ties;   // whether any value is straddled
};

template <Element kKey>
__device__ Cells<kKey> cells_of(const Cuts& cuts) {
  if constexpr (Format<kKey>::kBits == 15) {
    return EveryKey{};
  } else {
    const uint64_t low = cuts.size == 0 ? 1 : uint64_t(cuts.values[0]);
    return window_of(low, cuts.size == 0 ? 1 : uint64_t(cuts.values[cuts.size - 1]), kCells);
  }
}

// A thread for each cell, and one for each cut and what is above them all.
template <Element kKey>
__global__ void make_table(Cuts cuts, Table table) {
  const Cells<kKey> cells = cells_of<kKey>(cuts);
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  if constexpr (std::is_same_v<Cells<kKey>, Window>)
    if (thread == 0)
      *table.window = cells;
  if (thread <= cuts.size) {
    const bool last = thread == cuts.size;
    const bool tie = !last && cuts.straddled[thread];
    const uint16_t below = uint16_t(cuts.first_level[thread]);
    const Key<kKey> value = last ? ~Key<kKey>(0) : Key<kKey>(cuts.values[thread]);
    static_cast<Cut<kKey>*>(table.cuts)[thread] = {
        value, below, tie ? uint16_t(cuts.levels + 1 + thread) : below};
    if (tie)
      *table.ties = 1;
  }
  if (thread >= kCells)
    return;
  const uint64_t start = cells.start(thread, Format<kKey>::kBits);
  const uint64_t end = cells.start(thread + 1, Format<kKey>::kBits);
  const int64_t first =
      first_where(cuts.size, [&](int64_t i) { return uint64_t(cuts.values[i]) >= start; });
  const uint16_t below = uint16_t(cuts.first_level[first]);
  if (first == cuts.size || uint64_t(cuts.values[first]) >= end)
    table.cells[thread] = below;
  else if constexpr (std::is_same_v<Cells<kKey>, Window>)
    table.cells[thread] = uint16_t(kSearch | first);
  else
    table.cells[thread] = cuts.straddled[first] ? uint16_t(cuts.levels + 1 + first) : below;
}

// What a block keeps of the cuts while it works on a tile, [size] each.
struct Equals {
  int64_t* before;    // the tile, of the keys equal to a value
  unsigned* count;    // of them in the tile
  uint16_t* level;    // of them
  uint16_t* divided;  // the cuts whose equals in the tile have several levels

  static constexpr size_t kBytes = sizeof(int64_t) + sizeof(unsigned) + 2 * sizeof(uint16_t);

  __host__ __device__ Equals(char* memory, int64_t size)
      : before(reinterpret_cast<int64_t*>(memory)),
        count(reinterpret_cast<unsigned*>(before + size)),
        level(reinterpret_cast<uint16_t*>(count + size)),
        divided(level + size) {}
};

// What the tiles of one launch share, and how.
struct Shares {
  int64_t first;     // of the launch's tiles
  int64_t tiles;     // their number
  unsigned* ticket;  // tiles handed out
  Count* counts;     // [tiles, cuts], zero at first: the status, and equals
  char* equals;      // [tiles] Equals, where shared memory is not enough
  int64_t* ranks;    // [cuts]: equals before the first tile; then, before the next launch's
};

// `kCount` small numbers of `kSize` bytes, in whole words.
template <int kSize, int kCount>
struct Pack {
  static constexpr int kEach = 4 / kSize;  // in a word
  uint32_t words[(kCount + kEach - 1) / kEach] = {};

  __device__ unsigned get(int i) const {
    return words[i / kEach] >> (8 * kSize * (i % kEach)) & ((1u << (8 * kSize)) - 1);
  }
  __device__ void set(int i, unsigned value) {  // once
    words[i / kEach] |= value << (8 * kSize * (i % kEach));
  }
  __device__ void store(void* to) const {
    constexpr int kBytes = kSize * kCount;
    if constexpr (kBytes == 16)
      *static_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    else if constexpr (kBytes == 8)
      *static_cast<uint2*>(to) = {words[0], words[1]};
    else if constexpr (kBytes == 4)
      *static_cast<uint32_t*>(to) = words[0];
    else
      *static_cast<uint16_t*>(to) = uint16_t(words[0]);
  }
};

// A block at work. Up to kMostNarrow levels, codes have 8 bits and the cuts are in shared memory.
template <Element kKey, class Code, class Level>
class Worker {
 public:
  static constexpr bool kNarrow = sizeof(Code) == 1;
  static constexpr int kTile = kThreads * kKept / int(sizeof(Code));

  static size_t shared_bytes() {
    return sizeof(Head) + kCells * sizeof(uint16_t) +
           (kNarrow ? (kMostNarrow + 1) * (sizeof(Cut<kKey>) + Equals::kBytes) : 0);
  }

  __device__ Worker(const Cuts& cuts, const Table& table, const Shares& shares)
      : cuts_(cuts), shares_(shares), ties_(*table.ties != 0), levels_(unsigned(cuts.levels)) {
    if constexpr (std::is_same_v<Cells<kKey>, Window>)
      cells_ = *table.window;
    const uint4* const from = reinterpret_cast<const uint4*>(table.cells);
    uint4* const to = reinterpret_cast<uint4*>(dynamic_shared<char>() + sizeof(Head));
    constexpr unsigned kVectors = kCells * sizeof(uint16_t) / sizeof(uint4);
    for (unsigned i = threadIdx.x; i < kVectors; i += kThreads)
      to[i] = __ldg(from + i);
    if constexpr (kNarrow)
      for (unsigned i = threadIdx.x; i <= cuts.size; i += kThreads)
        shared_cuts()[i] = static_cast<const Cut<kKey>*>(table.cuts)[i];
    list_ = kNarrow ? shared_cuts() : static_cast<const Cut<kKey>*>(table.cuts);
  }

  __device__ void run(const Segments& segments) {
    for (;;) {
      if (threadIdx.x == 0)
        head()->tile = atomicAdd(shares_.ticket, 1u);
      __syncthreads();
      tile_ = head()->tile;
      if (tile_ >= shares_.tiles)
        return;
      for (unsigned i = threadIdx.x; ties_ && i < cuts_.size; i += kThreads)
        equals().count[i] = 0;
      if (threadIdx.x == 0)
        head()->divided = 0;
      __syncthreads();
      const int64_t number = shares_.first + tile_;
      const Tile tile(segment_of_tile(segments, number), number);
      dispatch_element<kKey>(tile.segment->element,
                             [&](auto tag) { assign<decltype(tag)::value>(tile); });
    }
  }

 private:
  struct Head {
    int64_t tile;
    int divided;
  };

  static __device__ Head* head() { return dynamic_shared<Head>(); }
  static __device__ const uint16_t* cells() {
    return reinterpret_cast<const uint16_t*>(dynamic_shared<char>() + sizeof(Head));
  }
  static __device__ Cut<kKey>* shared_cuts() {
    return reinterpret_cast<Cut<kKey>*>(dynamic_shared<char>() + sizeof(Head) +
                                        kCells * sizeof(uint16_t));
  }
  __device__ Equals equals() const {
    if constexpr (kNarrow)
      return Equals(reinterpret_cast<char*>(shared_cuts() + kMostNarrow + 1), kMostNarrow + 1);
    else
      return Equals(shares_.equals + tile_ * cuts_.size * Equals::kBytes, cuts_.size);
  }

  __device__ unsigned code_of(Key<kKey> key) const {
    const unsigned entry = cells()[cells_.cell(key)];
    if constexpr (std::is_same_v<Cells<kKey>, Window>)
      if (entry & kSearch) {
        const Cut<kKey>* cut = list_ + (entry & ~kSearch);
        while (cut->value < key)
          ++cut;
        return cut->value == key ? cut->equal : cut->below;
      }
    return entry;
  }

  __device__ bool ties(unsigned code) const { return code > levels_; }
  __device__ unsigned cut_of(unsigned code) const { return code - levels_ - 1; }

  template <Element kFrom>
  __device__ void assign(const Tile& tile) {
    using Bits = typename Format<kFrom>::Bits;
    const Bits* const data = tile.data<Bits>();
    Level* const out = static_cast<Level*>(tile.segment->levels) + tile.at;
    if (tile.size == kTile && aligned(data) && aligned(out))
      assign_whole<kFrom>(data, out);
    else
      assign_part<kFrom>(data, tile.size, out);
    if (ties_ && head()->divided > 0) {
      __syncthreads();
      for (int i = int(threadIdx.x / kWarp); i < head()->divided; i += kThreads / kWarp)
        number_equals<kFrom>(data, tile.size, equals().divided[i], out);
    }
  }

  // Keeps the codes of the tile from when its ties are counted until their levels are known.
  template <Element kFrom>
  __device__ void assign_whole(const typename Format<kFrom>::Bits* data, Level* out) {
    using Bits = typename Format<kFrom>::Bits;
    constexpr int kEach = 16 / int(sizeof(Bits)), kVectors = kTile / kThreads / kEach;
    const uint4* const vectors = reinterpret_cast<const uint4*>(data) + threadIdx.x;
    const Equals equals = this->equals();
    Pack<sizeof(Code), kEach> codes[kVectors];
    uint32_t tied = 0;  // a bit for each vector
#pragma unroll
    for (int from = 0; from < kVectors; from += kAtOnce) {
      uint4 read[kAtOnce];
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v)
        read[v] = __ldg(vectors + (from + v) * kThreads);
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v)
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const unsigned code = code_of(key_of<kFrom, kKey>(unpack<Bits>(read[v], i)));
          codes[from + v].set(i, code);
          if (ties(code)) {
            atomicAdd(equals.count + cut_of(code), 1u);
            tied |= 1u << (from + v);
          }
        }
    }
    if (ties_)
      find_levels();
    Level* const to = out + threadIdx.x * kEach;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Level* const at = to + v * kThreads * kEach;
      if (sizeof(Code) == sizeof(Level) && !(tied >> v & 1)) {
        codes[v].store(at);
        continue;
      }
      Pack<sizeof(Level), kEach> levels;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const unsigned code = codes[v].get(i);
        levels.set(i, ties(code) ? equals.level[cut_of(code)] : code);
      }
      levels.store(at);
    }
  }

  // The same for the end of a tensor, and for one that is not aligned: reads it again instead.
  template <Element kFrom>
  __device__ void assign_part(const typename Format<kFrom>::Bits* data, int size, Level* out) {
    const Equals equals = this->equals();
    if (ties_) {
      for (int i = int(threadIdx.x); i < size; i += kThreads) {
        const unsigned code = code_of(key_of<kFrom, kKey>(data[i]));
        if (ties(code))
          atomicAdd(equals.count + cut_of(code), 1u);
      }
      find_levels();
    }
    for (int i = int(threadIdx.x); i < size; i += kThreads) {
      const unsigned code = code_of(key_of<kFrom, kKey>(data[i]));
      out[i] = Level(ties(code) ? equals.level[cut_of(code)] : code);
    }
  }

  // From the counts of equals in this tile to their levels.
  __device__ void find_levels() {
    __syncthreads();
    const Equals equals = this->equals();
    for (unsigned i = threadIdx.x; i < cuts_.size; i += kThreads) {
      const int64_t count = equals.count[i], before = equals_before(i, count);
      equals.before[i] = before;
      if (tile_ + 1 == shares_.tiles)
        shares_.ranks[i] = before + count;
      if (count == 0)
        continue;
      const unsigned last = level_of(i, before + count - 1);
      equals.level[i] = uint16_t(last);
      if (level_of(i, before) != last)
        equals.divided[atomicAdd(&head()->divided, 1)] = uint16_t(i);
    }
    __syncthreads();
  }

  // Publishes how many keys of this tile equal a value, and adds up those of the tiles before.
  __device__ int64_t equals_before(unsigned cut, int64_t count) const {
    Count* const own = shares_.counts + tile_ * cuts_.size + cut;
    int64_t before = 0;
    if (tile_ == 0) {
      before = shares_.ranks[cut];
    } else {
      store_relaxed(own, kCounted | Count(count));
      for (int64_t tile = tile_ - 1; tile >= 0;) {
        Count seen[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          seen[i] = tile < i ? 0 : load_relaxed(own - (tile_ - tile + i) * cuts_.size);
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
    }
    store_relaxed(own, kSummed | Count(before + count));
    return before;
  }

  // Of the key equal to a value that has `rank` equals before it.
  __device__ unsigned level_of(unsigned cut, int64_t rank) const {
    const int64_t first = cuts_.first_level[cut], last = cuts_.first_level[cut + 1];
    return unsigned(
        first + first_where(last - first, [&](int64_t j) { return cuts_.ties[first + j] > rank; }));
  }

  // A warp gives the equals of one value their levels, in order of position.
  template <Element kFrom>
  __device__ void number_equals(const typename Format<kFrom>::Bits* data, int size, unsigned cut,
                                Level* out) const {
    const Key<kKey> value = Key<kKey>(cuts_.values[cut]);
    const int lane = int(threadIdx.x % kWarp);
    int64_t rank = equals().before[cut];
    for (int from = 0; from < size; from += int(kWarp) * kRun) {
      const int at = from + lane * kRun;
      unsigned equal = 0;  // a bit for each of the run
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        equal |= unsigned(at + i < size && key_of<kFrom, kKey>(data[at + i]) == value) << i;
      int before = __popc(equal);
      for (unsigned by = 1; by < kWarp; by *= 2) {
        const int other = __shfl_up_sync(kAllLanes, before, by);
        before += lane >= int(by) ? other : 0;
      }
      const int all = __shfl_sync(kAllLanes, before, int(kWarp) - 1);
      int64_t own = rank + before - __popc(equal);
      for (; equal != 0; equal &= equal - 1)
        out[at + __ffs(int(equal)) - 1] = Level(level_of(cut, own++));
      rank += all;
    }
  }

  const Cuts& cuts_;
  const Shares& shares_;
  const bool ties_;
  const unsigned levels_;
  Cells<kKey> cells_;
  const Cut<kKey>* list_;
  int64_t tile_ = 0;  // of the launch
};

template <Element kKey, class Code, class Level>
__global__ void __launch_bounds__(kThreads, 2)
    assign_tiles(Segments segments, Cuts cuts, Table table, Shares shares) {
  Worker<kKey, Code, Level>(cuts, table, shares).run(segments);
}

bool narrow(const Cuts& cuts) {
  return cuts.levels <= kMostNarrow;
}

int64_t tile_size(const Cuts& cuts) {
  return int64_t(kThreads) * kKept / (narrow(cuts) ? 1 : 2);
}

int64_t tiles_of(const Levelled* tensors, int64_t count, const Cuts& cuts) {
  const int64_t tile = tile_size(cuts);
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i)
    tiles += (tensors[i].scores.size + tile - 1) / tile;
  return tiles;
}

// Tiles of one launch: as many as there is memory for.
int64_t tiles_at_once(int64_t tiles, const Cuts& cuts) {
  const int64_t bytes = cuts.size * int64_t(sizeof(Count) + (narrow(cuts) ? 0 : Equals::kBytes));
  return std::max<int64_t>(1, std::min(tiles, kMostShares / std::max<int64_t>(1, bytes)));
}

struct Work {
  Segment* list;
  Table table;
  unsigned* ticket;
  Count* counts;
  char* equals;

  Work(Scratch& scratch, int64_t tensors, int64_t tiles, const Cuts& cuts)
      : list(scratch.take<Segment>(tensors + 1)),
        table{scratch.take<uint16_t>(kCells), scratch.take<Window>(1),
              scratch.take<Cut<Element::float64>>(cuts.size + 1), scratch.take<int>(1)},
        ticket(scratch.take<unsigned>(1)),
        counts(scratch.take<Count>(tiles * cuts.size)),
        equals(scratch.take<char>(narrow(cuts) ? 0 : tiles * cuts.size * int64_t(Equals::kBytes))) {
  }
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
    clear(work.table.ties, sizeof(int), stream);
    launch(make_table<kKey>, kCells / kThreads + 1, kThreads, 0, stream, cuts, work.table);
    for (int64_t first = 0; first < segments.tiles; first += at_once) {
      const int64_t tiles = std::min(at_once, segments.tiles - first);
      const Shares shares{first, tiles, work.ticket, work.counts, work.equals, ranks};
      clear(work.ticket, sizeof(unsigned), stream);
      clear(work.counts, size_t(tiles * cuts.size) * sizeof(Count), stream);
      launch(assign_tiles<kKey, Code, Level>,
             unsigned(std::min<int64_t>(tiles, int64_t(device().multiprocessors) * 2)), kThreads,
             Worker<kKey, Code, Level>::shared_bytes(), stream, segments, cuts, work.table, shares);
    }
  }
};

}  // namespace

size_t assign_scratch(const Levelled* tensors, int64_t count, const Cuts& cuts) {
  Scratch scratch(nullptr);
  const Work work(scratch, count, tiles_at_once(tiles_of(tensors, count, cuts), cuts), cuts);
  return scratch.bytes();
}

void assign(const Levelled* tensors, int64_t count, const Cuts& cuts, int64_t* ranks, void* memory,
            Stream stream) {
  Scratch scratch(memory);
  const int64_t at_once = tiles_at_once(tiles_of(tensors, count, cuts), cuts);
  const Work work(scratch, count, at_once, cuts);
  const auto segment = [&](int64_t i) {
    Segment one{};
    one.data = tensors[i].scores.data;
    one.element = tensors[i].scores.element;
    one.size = tensors[i].scores.size;
    one.levels = tensors[i].levels;
    one.tile = tile_size(cuts);
    return one;
  };
  const Segments segments = store(count, segment, work.list, stream);
  const Assigning assigning{segments, cuts, ranks, work, at_once, stream};
  dispatch_key(cuts.key, [&](auto tag) {
    constexpr Element kKey = decltype(tag)::value;
    if (narrow(cuts))
      assigning.template run<kKey, uint8_t, uint8_t>();
    else if (cuts.levels <= 255)
      assigning.template run<kKey, uint16_t, uint8_t>();
    else
      assigning.template run<kKey, uint16_t, int16_t>();
  });
}

}  // namespace confprune::cuda
