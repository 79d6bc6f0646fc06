#include "kernels/grid_product.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "kernels/grid_tasks.h"
#include "kernels/instruction_set.h"

namespace confprune {
namespace {

// Where minimal filtering is faster, as measured: from so many channels, and where its products are
// not many more than the weights alive.
constexpr int64_t kWinogradChannels = 16;
constexpr double kWinogradGain = 1.15;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kPackedBytes = 5 << 17;  // of a band of lines, within a second-level cache
constexpr int64_t kLeastBand = 4;          // lines: neighbouring bands share some
constexpr int64_t kLineOfLanes = 512;      // bytes from one input to the next, at most, unpacked
constexpr int64_t kVectorLanes = 16;       // whole vectors of every width
constexpr int64_t kLeastLanes = 32;
constexpr int64_t kHiddenBytes = 1 << 19;  // of the first layer's outputs, of some levels
constexpr int64_t kPackedElements = int64_t(1) << 22;  // beyond, fewer examples are packed together

// Whether minimal filtering is for this convolution; at which of its levels is another question.
bool is_winograd(const GridProduct& product) {
  const Convolution& c = product.convolution;
  return !product.shared && !product.wide && c.groups == 1 && c.kernel[0] == 1 &&
         c.kernel[1] == 3 && c.kernel[2] == 3 && c.input[0] == 1 && c.padding[0] == 0 &&
         c.stride[1] == c.stride[2] && c.stride[1] <= 2 && c.dilation[1] == 1 &&
         c.dilation[2] == 1 && c.channels >= kWinogradChannels &&
         product.rows.rows >= kWinogradChannels;
}

// Tiles of the output, down and across.
void winograd_tiles(const Convolution& c, int64_t (&tiles)[2]) {
  for (int d = 0; d < 2; ++d)
    tiles[d] = (c.output[d + 1] + kOutputSide - 1) / kOutputSide;
}

// The products of minimal filtering for a channel of one row.
template <int S>
int64_t filtered_products(const Convolution& c, const int64_t (&tiles)[2]) {
  int64_t products = 1;
  for (int d = 0; d < 2; ++d) {
    int64_t points = 0;
    for (int64_t tile = 0; tile < tiles[d]; ++tile) {
      const int64_t outputs = tile_start(c.output[d + 1], tiles[d], tile + 1) -
                              tile_start(c.output[d + 1], tiles[d], tile);
      for (int weight = 0; weight < kWeightSide; ++weight)
        points += Filter<S>::end(weight, int(outputs)) - Filter<S>::first(weight);
    }
    products *= points;
  }
  return products;
}

// The levels with so many weights alive that minimal filtering is faster.
std::vector<uint8_t> dense_levels(const GridProduct& product, const int64_t (&tiles)[2]) {
  const Convolution& c = product.convolution;
  const int64_t filtered =
      c.stride[1] == 1 ? filtered_products<1>(c, tiles) : filtered_products<2>(c, tiles);
  const double products =
      double(filtered) / double(c.output[1] * c.output[2] * c.kernel[1] * c.kernel[2]);
  const PrefixRows& rows = product.rows;
  const int64_t cells = rows.blocks * rows.rows;
  std::vector<uint8_t> dense(product.num_levels);
  for (int64_t k = 0; k < product.num_levels; ++k) {
    const int16_t* counts = rows.counts + product.levels[k] * cells;
    int64_t alive = 0;
    for (int64_t cell = 0; cell < cells; ++cell)
      alive += counts[cell];
    dense[k] = products <= kWinogradGain * double(alive) / double(rows.rows * rows.row_size);
  }
  return dense;
}

// At least so many elements, and as many as keep planes of whole cache lines in different sets of
// the first-level cache: the same positions of all channels are read together.
int64_t spread(int64_t elements, int64_t chunk, int64_t size) {
  constexpr int64_t kLine = 64, kGap = 16, kOffset = 9;  // lines
  if (elements == chunk || chunk * size % kLine != 0)
    return elements;
  const int64_t lines = elements * size / kLine;
  return (lines + (kOffset + kGap - lines % kGap) % kGap) * kLine / size;
}

PackedInput pack_layout(const GridProduct& product, int64_t chunk) {
  const Convolution& c = product.convolution;
  PackedInput packed;
  packed.chunk = chunk;
  int64_t planes = 1, reach_of_lines = 0;
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
    if (d == 1)
      reach_of_lines = reach;
  }
  const int64_t size = product.wide ? 8 : 4;
  const int64_t line = c.channels * planes * packed.extent[0] * packed.extent[2] * chunk * size;
  packed.band = std::max(kLeastBand, kPackedBytes / line - reach_of_lines);
  packed.band = std::min(packed.band, c.output[1]);
  const int64_t bands = (c.output[1] + packed.band - 1) / packed.band;
  packed.band = (c.output[1] + bands - 1) / bands;
  packed.extent[1] = packed.band + reach_of_lines;
  packed.plane =
      spread(packed.extent[0] * packed.extent[1] * packed.extent[2] * chunk, chunk, size);
  packed.channel_size = planes * packed.plane;
  const int64_t channels = std::max<int64_t>(1, c.channels / c.groups);
  if (packed.channel_size > std::numeric_limits<int32_t>::max() / channels)
    throw std::length_error("an example of a convolution has more than 2^31 elements");

  const int64_t taps = c.kernel[0] * c.kernel[1] * c.kernel[2];
  packed.stride = taps == 1 ? packed.channel_size : 0;
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
        int32_t(column / taps * packed.channel_size + phase * packed.plane + inside * chunk);
  }
  return packed;
}

// Whether the lanes of a linear layer's input already are whole vectors of neighbours, on cache
// lines of their own, and close enough together that a block of them stays in the cache.
bool is_packed(const GridProduct& product, int64_t lanes) {
  const Activation& x = product.x;
  const int64_t size = product.wide ? 8 : 4;
  const bool compute_type = x.element == (product.wide ? Element::float64 : Element::float32);
  return compute_type &&
         product.convolution.input[0] * product.convolution.input[1] *
                 product.convolution.input[2] ==
             1 &&
         product.convolution.padding[0] + product.convolution.padding[1] +
                 product.convolution.padding[2] ==
             0 &&
         x.batch_stride == 1 && product.batch % lanes == 0 && x.channel_stride % lanes == 0 &&
         x.channel_stride * size <= kLineOfLanes && x.level_stride * size % 64 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 64 == 0 &&
         x.channel_stride <=
             std::numeric_limits<int32_t>::max() / std::max<int64_t>(1, product.rows.row_size);
}

// Whether outputs are written a whole vector at a time, where the residual can be read the same
// way.
bool adds_residual(const GridProduct& product, int64_t chunk) {
  const Activation &y = product.y, &residual = product.residual;
  const Element compute = product.wide ? Element::float64 : Element::float32;
  return !product.shared && chunk == kConvolutionChunk && product.batch == chunk &&
         y.element == compute && y.batch_stride == 1 && y.position_strides[kSpatial - 1] == chunk &&
         residual.batch_stride == y.batch_stride && residual.channel_stride == y.channel_stride &&
         std::equal(y.position_strides, y.position_strides + kSpatial, residual.position_strides);
}

// Examples of a part, in whole vectors: as many in each of as many parts for every thread.
int64_t even_part(int64_t batch, int64_t lanes, int threads) {
  const int64_t rounds = (batch + lanes * threads - 1) / (lanes * threads);
  const int64_t even = (batch + rounds * threads - 1) / (rounds * threads);
  return (even + kVectorLanes - 1) / kVectorLanes * kVectorLanes;
}

}  // namespace

struct GridPlan::Details : GridDetails {};

GridPlan::GridPlan(const GridProduct& product, int threads) : details_(new Details) {
  GridDetails& d = *details_;
  d.product = product;
  d.lanes = instruction_set().lanes(product.wide);
  const Convolution& c = product.convolution;
  const bool linear = c.output[0] * c.output[1] * c.output[2] == 1;
  const int64_t widest =
      linear ? std::min(d.lanes, even_part(product.batch, d.lanes, 1)) : kConvolutionChunk;
  d.packed = pack_layout(product, 1);
  const int64_t fit = kPackedElements / std::max<int64_t>(1, c.channels * d.packed.channel_size);
  int64_t chunk = std::min(std::min(widest, product.batch), linear ? widest : fit);
  if (is_winograd(product) && fit >= kConvolutionChunk) {
    chunk = kConvolutionChunk;
    winograd_tiles(c, d.winograd.tiles);
    d.winograd.levels = dense_levels(product, d.winograd.tiles);
    d.winograd.stride = int(c.stride[1]);
  }
  if (chunk > 1)
    d.packed = pack_layout(product, chunk);
  d.leaves_residual = product.residual.data != nullptr && !adds_residual(product, chunk);
  if (d.leaves_residual) {
    d.product.residual.data = nullptr;
    d.product.relu = false;
  }
  d.in_place = linear && is_packed(product, d.lanes);
  if (d.in_place) {
    d.packed.channel_size = d.packed.stride = product.x.channel_stride;
    for (int64_t column = 0; column < product.rows.row_size; ++column)
      d.packed.offsets[column] = int32_t(column * product.x.channel_stride);
  }
  d.bands = (c.output[1] + d.packed.band - 1) / d.packed.band;
  d.parts = (product.batch + d.packed.chunk - 1) / d.packed.chunk * d.bands;
  const int64_t inputs = product.shared ? 1 : product.num_levels;
  // Enough tasks for all threads; the weights of a level are prepared once a task, inputs once a
  // group of rows.
  const int64_t wanted = std::max<int64_t>(1, kTasksPerThread * threads / inputs);
  d.part_groups = std::min(d.parts, wanted);
  const int64_t row_groups = wanted / d.part_groups;
  const int64_t rows = product.rows.rows;
  d.row_tile = std::max<int64_t>(kSharedRows, (rows + row_groups - 1) / row_groups);
  d.row_groups = (rows + d.row_tile - 1) / d.row_tile;
}

GridPlan::~GridPlan() {
  delete details_;
}

int64_t GridPlan::tasks() const {
  const GridDetails& d = *details_;
  return (d.product.shared ? 1 : d.product.num_levels) * d.part_groups * d.row_groups;
}

int64_t GridPlan::scratch_bytes() const {
  const GridDetails& d = *details_;
  const int64_t size = d.product.wide ? 8 : 4;
  const int64_t tile_rows = d.product.shared ? kSharedRows * d.product.num_levels : d.row_tile;
  const int64_t input = d.product.convolution.channels * d.packed.channel_size + d.lanes;
  int64_t work = tile_rows * d.lanes;
  if (!d.winograd.levels.empty()) {
    const Convolution& c = d.product.convolution;
    constexpr int64_t kMostRows = 8;  // of the dense product, to whose number rows are filled up
    const int64_t lanes = kFilteredTiles * d.packed.chunk;
    const int64_t rows = std::min(d.row_tile, d.product.rows.rows) + kMostRows;
    const int64_t channels = c.channels, image = c.input[1] * c.input[2] * d.packed.chunk;
    const int64_t room = d.winograd.stride == 1 ? Filter<1>::kRoom : Filter<2>::kRoom;
    const int64_t products = room * kFilteredRows * lanes;
    work = std::max(work, channels * image + kWeightPoints * (rows * channels + kPointGap) +
                              room * channels * lanes +
                              std::max(products, d.product.rows.row_size * kMostRows));
  }
  return (input + 16 + work) * size + 64;
}

bool GridPlan::leaves_residual() const {
  return details_->leaves_residual;
}

void GridPlan::run(int64_t task, void* scratch) const {
  instruction_set().run(*details_, task, scratch);
}

struct MlpPlan::Details : MlpDetails {};

MlpPlan::MlpPlan(const std::vector<GridProduct>& layers, int threads) : details_(new Details) {
  MlpDetails& d = *details_;
  const GridProduct& first = layers.front();
  const int64_t lanes = instruction_set().lanes(first.wide);
  // Few vectors make little of the weights read.
  const int64_t whole = even_part(first.batch, lanes, threads);
  const int64_t chunk = std::min(lanes, std::max(kLeastLanes, whole));
  d.parts = (first.batch + chunk - 1) / chunk;
  for (const GridProduct& product : layers) {
    GridDetails layer{};
    layer.product = product;
    layer.packed = pack_layout(product, chunk);
    layer.lanes = lanes;
    d.layers.push_back(std::move(layer));
  }
  d.between = 0;
  for (std::size_t i = 1; i + 1 < layers.size(); ++i)
    d.between = std::max(d.between, layers[i].rows.rows);
  d.widest = std::max(d.between, layers.back().rows.rows);
  const int64_t level = first.rows.rows * lanes * (first.wide ? 8 : 4);
  d.group = std::clamp<int64_t>(kHiddenBytes / level, 1, first.num_levels);
}

MlpPlan::~MlpPlan() {
  delete details_;
}

int64_t MlpPlan::parts() const {
  return details_->parts;
}

int64_t MlpPlan::scratch_bytes() const {
  const MlpDetails& d = *details_;
  const GridProduct& first = d.layers.front().product;
  // The input, its sums and outputs, and the partial sums and outputs of the layers that follow.
  const int64_t rows =
      first.convolution.channels + (1 + d.group) * first.rows.rows + d.widest + 2 * d.between;
  return rows * d.layers.front().lanes * (first.wide ? 8 : 4) + 64;
}

void MlpPlan::run(int64_t part, void* scratch) const {
  instruction_set().run_mlp(*details_, part, scratch);
}

}  // namespace confprune
