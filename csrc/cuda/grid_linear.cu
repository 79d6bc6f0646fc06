// Chooses the kernel and the tiles of a masked product, and starts it.
#include "cuda/grid_linear.h"

#include <algorithm>

#include "cuda/grid_tiles.h"
#include "cuda/matrix_product.h"
#include "cuda/scalar_product.h"

namespace confprune::cuda {
namespace grid {
namespace {

bool aligned(const void* pointer, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0 && stride_bytes % kChunkBytes == 0;
}

Alignment alignment_of(const GridLinear& product, int64_t bytes) {
  // Rows are of whole chunks, and begin at places that 32 bits count in chunks.
  constexpr int64_t kReach = int64_t(1) << 32;
  const int64_t x_numbers =
      product.num_levels * product.x_level_stride + product.batch * product.x_stride;
  const int64_t weights = product.outputs * product.weight_stride;
  const int64_t levels = product.outputs * product.levels_stride;  // of a byte
  const bool operands =
      aligned(product.x, product.x_stride * bytes) &&
      aligned(product.x, product.x_level_stride * bytes) &&
      aligned(product.weight, product.weight_stride * bytes) &&
      aligned(product.levels, product.levels_stride) && product.inputs % kChunkBytes == 0 &&
      std::max({x_numbers * bytes, weights * bytes, levels}) < kReach * kChunkBytes;
  return {operands, aligned(product.y, product.outputs * bytes)};
}

// The tiling that takes the multiprocessor with most blocks least long.
class Choice {
 public:
  explicit Choice(const Device& device) : multiprocessors_(device.multiprocessors) {}

  // Whether this one, whose blocks take `block`, is the best so far.
  bool better(const Tiling& tiling, int64_t block) {
    const int64_t time = ceil_div(tiling.blocks(), multiprocessors_) * block;
    const bool better = time < least_;
    least_ = better ? time : least_;
    return better;
  }

 private:
  int64_t multiprocessors_;
  int64_t least_ = INT64_MAX;
};

// A tile of the matrix product: 16 `fragments` rows and `levels` levels a warp.
struct MatrixWay {
  int fragments, levels;
  Tiling tiling;
};

MatrixWay matrix_way(const GridLinear& product, const Device& device) {
  // Instructions for a matrix instruction beside those of the mask, and for a panel whatever its
  // rows: read off the compiled loop, a matrix instruction taken for six.
  constexpr int kMultiply = 7, kPanel = 5;
  MatrixWay best{};
  Choice choice(device);
  for (const int fragments : {4, 2})
    for (const int levels : {8, 4, 2, 1})
      for (const int token_warps : {1, 2, 4}) {
        const Tiling tiling =
            tiling_of(product, 32 * fragments, kWarpColumns / levels * token_warps,
                      levels * kWarpsAcross / token_warps);
        if (choice.better(tiling, fragments * (kMultiply + levels) + kPanel))
          best = {fragments, levels, tiling};
      }
  return best;
}

template <class T, int kFragments, int kLevels>
void launch_matrix(const GridLinear& product, const Tiling& tiling, const Device& device,
                   Stream stream) {
  constexpr int kBytes = kStages * MatrixTile<kFragments>::Layout::kBytes;
  // Two panels at once halve the barriers, and read whole lines of 128 bytes.
  const int panels = 2 * kBytes <= device.shared_bytes ? 2 : 1;
  launch(matrix_product<T, kFragments, kLevels>, dim3(unsigned(tiling.blocks())), dim3(kThreads),
         size_t(panels * kBytes), stream, product, tiling, alignment_of(product, sizeof(T)),
         panels);
}

template <class T, int kFragments>
void launch_matrix(const GridLinear& product, const MatrixWay& way, const Device& device,
                   Stream stream) {
  switch (way.levels) {
    case 8:
      return launch_matrix<T, kFragments, 8>(product, way.tiling, device, stream);
    case 4:
      return launch_matrix<T, kFragments, 4>(product, way.tiling, device, stream);
    case 2:
      return launch_matrix<T, kFragments, 2>(product, way.tiling, device, stream);
    default:
      return launch_matrix<T, kFragments, 1>(product, way.tiling, device, stream);
  }
}

template <class T>
void matrix(const GridLinear& product, const Device& device, Stream stream) {
  const MatrixWay way = matrix_way(product, device);
  if (way.fragments == 4)
    launch_matrix<T, 4>(product, way, device, stream);
  else
    launch_matrix<T, 2>(product, way, device, stream);
}

template <class Real>
void scalar(const GridLinear& product, const Device& device, Stream stream) {
  using Size = ScalarTile<Real>;
  Tiling best{};
  Choice choice(device);
  for (int tokens = Size::kColumns; tokens >= Size::kLaneColumns; tokens /= 2) {
    const Tiling tiling = tiling_of(product, Size::kRows, tokens, Size::kColumns / tokens);
    if (choice.better(tiling, 1))
      best = tiling;
  }
  launch(scalar_product<Real>, dim3(unsigned(best.blocks())), dim3(kThreads),
         size_t(kStages * Size::Layout::kBytes), stream, product, best,
         alignment_of(product, sizeof(Real)));
}

}  // namespace
}  // namespace grid

void grid_linear(const GridLinear& product, Stream stream) {
  if (product.num_levels == 0 || product.batch == 0 || product.outputs == 0)
    return;
  const Device found = device();
  switch (product.element) {
    case Element::bfloat16:
      return grid::matrix<BFloat16>(product, found, stream);
    case Element::float16:
      return grid::matrix<Half>(product, found, stream);
    case Element::float32:
      return grid::scalar<float>(product, found, stream);
    case Element::float64:
      return grid::scalar<double>(product, found, stream);
  }
}

}  // namespace confprune::cuda
