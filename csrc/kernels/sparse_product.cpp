#include "kernels/sparse_product.h"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "kernels/instruction_set.h"
#include "kernels/sparse_sets.h"

namespace confprune {
namespace {

constexpr int64_t kMostSingles = 2;  // examples that are quicker one by one than in lanes
constexpr int64_t kPackedBytes = int64_t(1) << 19;  // of one task: a core's L2 holds it

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

const SparseSet& chosen() {
  static const SparseSet set = [] {
#if defined(__x86_64__)
    const char* name = instruction_set().name;
    // Asked for by its name, AVX-512 is what all machines that have it share.
    if (std::strcmp(name, "avx512") == 0)
      return std::getenv("CONFPRUNE_ISA") == nullptr && __builtin_cpu_supports("avx512vbmi") &&
                     __builtin_cpu_supports("bmi2")
                 ? sparse_avx512_vbmi()
                 : sparse_avx512();
    if (std::strcmp(name, "avx2") == 0)
      return sparse_avx2();
#endif
    return sparse_baseline();
  }();
  return set;
}

bool wide(const SparseProduct& product) {
  return product.weight.element == Element::float64;
}

// Lanes of a tile.
int64_t lanes_of(const SparseProduct& product) {
  return kTileBytes / (wide(product) ? 8 : 4);
}

// A number of elements, at least `size`, that no power of two but a tile divides: rows and channels
// so far apart do not fall on the same few lines of the cache.
int64_t odd_tiles(int64_t size, int64_t tile) {
  return (divide_up(size, tile) | 1) * tile;
}

PackedLayout layout_of(const SparseProduct& product) {
  const Window& w = product.window;
  PackedLayout packed;
  for (int d = 0; d < kWindowDims; ++d) {
    packed.reach[d] = 0;
    for (int64_t k = 0; k < w.kernel[d]; ++k) {
      const int64_t at = k * w.dilation[d];
      packed.phases[d].push_back(at % w.stride[d]);
      packed.reach[d] = std::max(packed.reach[d], at / w.stride[d]);
    }
    auto& phases = packed.phases[d];
    std::sort(phases.begin(), phases.end());
    phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
  }
  return packed;
}

void set_extents(SparsePlan* plan) {
  const Window& w = plan->product.window;
  PackedLayout& packed = plan->packed;
  if (plan->linear) {
    std::fill_n(packed.extent, kWindowDims, 1);
    packed.plane = packed.channel_size = plan->together;
    return;
  }
  int64_t planes = 1;
  packed.plane = 1;
  for (int d = 0; d < kWindowDims; ++d) {
    packed.extent[d] = (d == plan->band_dim ? plan->band : w.output[d]) + packed.reach[d];
    packed.plane *= packed.extent[d];
    planes *= int64_t(packed.phases[d].size());
  }
  packed.channel_size = odd_tiles(planes * packed.plane, lanes_of(plan->product));
}

void set_offsets(SparsePlan* plan) {
  const Window& w = plan->product.window;
  PackedLayout& packed = plan->packed;
  const int64_t taps = w.kernel[0] * w.kernel[1] * w.kernel[2];
  const int64_t channels = w.channels / plan->product.weight.groups;
  if (packed.channel_size > std::numeric_limits<int32_t>::max() / std::max<int64_t>(1, channels))
    throw std::length_error("an example of a convolution has more than 2^31 elements");
  packed.offsets.resize(plan->product.weight.row_size);
  for (int64_t column = 0; column < plan->product.weight.row_size; ++column) {
    int64_t rest = column % taps, phase = 0, inside = 0, tap[kWindowDims];
    for (int d = kWindowDims - 1; d >= 0; --d) {
      tap[d] = rest % w.kernel[d] * w.dilation[d];
      rest /= w.kernel[d];
    }
    for (int d = 0; d < kWindowDims; ++d) {
      const auto& phases = packed.phases[d];
      const auto found = std::lower_bound(phases.begin(), phases.end(), tap[d] % w.stride[d]);
      phase = phase * int64_t(phases.size()) + (found - phases.begin());
      inside = inside * packed.extent[d] + tap[d] / w.stride[d];
    }
    packed.offsets[column] =
        int32_t(column / taps * packed.channel_size + phase * packed.plane + inside);
  }
}

// Examples in the lanes of a linear layer: a tile's two vectors, unless one wastes less.
int64_t examples_together(int64_t batch, int64_t lanes) {
  if (batch <= lanes / 4)
    return lanes / 4;
  if (batch <= lanes / 2)
    return lanes / 2;
  // Two vectors cost 20/11 of one.
  return divide_up(batch, lanes / 2) * 11 < divide_up(batch, lanes) * 20 ? lanes / 2 : lanes;
}

// The positions of a band, so that a task's inputs fit in the cache and there is work for all.
int64_t band_of(const SparsePlan& plan, int threads) {
  const Window& w = plan.product.window;
  const PackedLayout& packed = plan.packed;
  const int64_t positions = w.output[plan.band_dim], reach = packed.reach[plan.band_dim];
  int64_t bytes = w.channels * (wide(plan.product) ? 8 : 4);
  for (int d = 0; d < kWindowDims; ++d)
    bytes *=
        int64_t(packed.phases[d].size()) * (d == plan.band_dim ? 1 : w.output[d] + packed.reach[d]);
  const int64_t fit = kPackedBytes / std::max<int64_t>(1, bytes) - reach;
  // What neighbouring bands both pack is to be less than what one band has for itself.
  int64_t band = std::max<int64_t>({1, 2 * reach, fit});
  const int64_t shared_by = divide_up(threads, plan.example_groups);
  if (shared_by > 1)
    band = std::min(band, std::max<int64_t>({1, reach, divide_up(positions, shared_by)}));
  band = std::min(band, positions);
  return divide_up(positions, divide_up(positions, band));
}

// Into how many groups the rows are cut where there are fewer other tasks than threads.
int64_t row_groups_of(int64_t tasks, int64_t chunks, int threads) {
  if (tasks % threads == 0 || tasks >= 4 * threads)
    return 1;
  return std::min<int64_t>(chunks, threads / std::gcd<int64_t>(tasks, threads));
}

}  // namespace

SparsePlan::SparsePlan(const SparseProduct& of, int threads) : product(of) {
  const Window& w = product.window;
  const Chunks chunks(product.weight.rows, product.weight.row_size, product.weight.groups);
  const int64_t lanes = lanes_of(product);
  linear = product.weight.row_size == w.channels &&
           w.output[0] * w.output[1] * w.output[2] * product.weight.groups == 1 &&
           w.padding[0] + w.padding[1] + w.padding[2] == 0;
  single = linear && product.batch <= kMostSingles;
  if (!linear)
    packed = layout_of(product);
  together = linear && !single ? examples_together(product.batch, lanes) : 1;
  example_groups = divide_up(product.batch, together);
  band_dim = w.output[0] > 1 ? 0 : w.output[1] > 1 ? 1 : 2;
  band = linear ? 1 : band_of(*this, threads);
  bands = divide_up(w.output[band_dim], band);
  set_extents(this);
  if (!linear)
    set_offsets(this);
  // A single x is packed in no time: its chunks are dealt out one by one, unless they are so few
  // that each thread would get the same number anyway, from call to call others of them.
  row_groups = !single || threads == 1
                   ? row_groups_of(example_groups * bands, chunks.count, threads)
               : chunks.count <= 4 * threads ? threads
                                             : chunks.count;
  chunks_per_group = divide_up(chunks.count, std::max<int64_t>(1, row_groups));
  row_groups = divide_up(chunks.count, std::max<int64_t>(1, chunks_per_group));
}

int64_t SparsePlan::tasks() const {
  return example_groups * bands * row_groups;
}

int64_t SparsePlan::scratch_bytes() const {
  const int64_t lanes = lanes_of(product), rows = product.weight.rows;
  const int64_t aligned = kSparseBlock * lanes;
  const int64_t input = product.window.channels * packed.channel_size + kSparseBlock + 3 * lanes;
  const int64_t output = linear ? std::min(kMostChunkRows, rows) * together
                                : rows * odd_tiles(packed.extent[1] * packed.extent[2], lanes);
  return (aligned + input + output) * (wide(product) ? 8 : 4);
}

void SparsePlan::run(int64_t task, void* scratch) const {
  chosen().run(*this, task, scratch);
}

}  // namespace confprune
