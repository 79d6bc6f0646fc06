#include "kernels/grid_product.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "kernels/grid_tasks.h"
#include "kernels/instruction_set.h"

namespace confprune {
namespace {

constexpr int64_t kConvolutionChunk = 16;
constexpr int64_t kPackedElements = int64_t(1) << 22;  // beyond, fewer examples are packed together

PackedInput pack_layout(const GridProduct& product, int64_t chunk) {
  const Convolution& c = product.convolution;
  PackedInput packed;
  packed.chunk = chunk;
  int64_t planes = 1;
  for (int d = 0; d < kSpatial; ++d) {
    int64_t reach = 0;
    for (int64_t k = 0; k < c.kernel[d]; ++k) {
      const int64_t at = k * c.dilation[d];
      packed.phases[d].push_back(at % c.stride[d]);
      reach = std::max(reach, at / c.stride[d]);
    }
    auto& phases = packed.phases[d];
    std::sort(phases.begin(), phases.end());
    phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
    packed.extent[d] = c.output[d] + reach;
    planes *= int64_t(phases.size());
  }
  const int64_t plane = packed.extent[0] * packed.extent[1] * packed.extent[2] * chunk;
  packed.channel_size = planes * plane;
  const int64_t channels = std::max<int64_t>(1, c.channels / c.groups);
  if (packed.channel_size > std::numeric_limits<int32_t>::max() / channels)
    throw std::length_error("an example of a convolution has more than 2^31 elements");

  const int64_t taps = c.kernel[0] * c.kernel[1] * c.kernel[2];
  packed.offsets.resize(product.rows.row_size);
  for (int64_t column = 0; column < product.rows.row_size; ++column) {
    int64_t rest = column % taps;
    int64_t phase = 0, inside = 0;
    int64_t tap[kSpatial];
    for (int d = kSpatial - 1; d >= 0; --d) {
      tap[d] = rest % c.kernel[d] * c.dilation[d];
      rest /= c.kernel[d];
    }
    for (int d = 0; d < kSpatial; ++d) {
      const auto& phases = packed.phases[d];
      const auto found = std::lower_bound(phases.begin(), phases.end(), tap[d] % c.stride[d]);
      phase = phase * int64_t(phases.size()) + (found - phases.begin());
      inside = inside * packed.extent[d] + tap[d] / c.stride[d];
    }
    packed.offsets[column] =
        int32_t(column / taps * packed.channel_size + phase * plane + inside * chunk);
  }
  return packed;
}

}  // namespace

struct GridPlan::Details : GridDetails {};

GridPlan::GridPlan(const GridProduct& product, int threads) : details_(new Details) {
  GridDetails& d = *details_;
  d.product = product;
  d.lanes = instruction_set().lanes(product.wide);
  const Convolution& c = product.convolution;
  const bool linear = c.output[0] * c.output[1] * c.output[2] == 1;
  const int64_t widest = linear ? d.lanes : kConvolutionChunk;
  d.packed = pack_layout(product, 1);
  const int64_t fit = kPackedElements / std::max<int64_t>(1, c.channels * d.packed.channel_size);
  const int64_t chunk = std::min(std::min(widest, product.batch), linear ? widest : fit);
  if (chunk > 1)
    d.packed = pack_layout(product, chunk);
  d.chunks = (product.batch + d.packed.chunk - 1) / d.packed.chunk;
  const int64_t inputs = product.shared ? 1 : product.num_levels;
  const int64_t row_groups =
      std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, inputs * d.chunks));
  const int64_t rows = product.rows.rows;
  d.row_tile = std::max<int64_t>(kSharedRows, (rows + row_groups - 1) / row_groups);
  d.row_groups = (rows + d.row_tile - 1) / d.row_tile;
}

GridPlan::~GridPlan() {
  delete details_;
}

int64_t GridPlan::tasks() const {
  const GridDetails& d = *details_;
  return (d.product.shared ? 1 : d.product.num_levels) * d.chunks * d.row_groups;
}

int64_t GridPlan::scratch_bytes() const {
  const GridDetails& d = *details_;
  const int64_t size = d.product.wide ? 8 : 4;
  const int64_t tile_rows = d.product.shared ? kSharedRows * d.product.num_levels : d.row_tile;
  const int64_t input = d.product.convolution.channels * d.packed.channel_size + d.lanes;
  return (input + 16 + tile_rows * d.lanes) * size + 64;
}

void GridPlan::run(int64_t task, void* scratch) const {
  instruction_set().run(*details_, task, scratch);
}

}  // namespace confprune
