// Chooses the kernel and the tiles of a masked product, and starts it.
#include "cuda/grid_linear.h"

#include <utility>

#include "cuda/grid_tiles.h"
#include "cuda/matrix_product.h"
#include "cuda/scalar_product.h"

namespace confprune::cuda {
namespace grid {
namespace {

bool aligned(const void* pointer, int64_t stride_bytes = 0) {
  return reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0 && stride_bytes % kChunkBytes == 0;
}

// Whether chunks of all operands are aligned, and whole.
bool aligned_operands(const GridLinear& product, int64_t bytes) {
  return aligned(product.x, product.x_stride * bytes) &&
         aligned(product.x, product.x_level_stride * bytes) &&
         aligned(product.weight, product.weight_stride * bytes) &&
         aligned(product.levels, product.levels_stride) && product.inputs % kChunkBytes == 0;
}

// What a multiprocessor takes at most for the blocks that fall to it, in units of `block`.
int64_t time_of(const Tiling& tiling, int64_t block) {
  return ceil_div(tiling.blocks(), device().multiprocessors) * block;
}

template <class T, int kFragments, int kLevels>
void launch_matrix(const GridLinear& product, int token_warps, Stream stream) {
  using Shape = MatrixShape<kFragments>;
  constexpr int kTokens = kWarpColumns / kLevels;
  MatrixTiling shape{
      tiling(product, Shape::kRows, kTokens * token_warps, kLevels * kWarpsAcross / token_warps),
      token_warps, 1, aligned_operands(product, sizeof(T)),
      aligned(product.y, product.outputs * int64_t(sizeof(T)))};
  // Two panels at once halve the barriers, and read whole lines of 128 bytes.
  if (2 * kStages * Shape::kPanelBytes <= device().shared_bytes)
    shape.panels = 2;
  launch(matrix_product<T, kFragments, kLevels>, dim3(unsigned(shape.tiling.blocks())),
         dim3(kThreads), size_t(shape.panels * kStages * Shape::kPanelBytes), stream, product,
         shape);
}

// One way to stand warps over the levels and tokens of a tile.
struct MatrixWay {
  int fragments, levels, token_warps;
};

MatrixWay choose(const GridLinear& product) {
  // Instructions that go with a matrix instruction and are not of the mask, itself included, by
  // what it takes; and those of a panel that do not grow with its fragments.
  constexpr int64_t kMultiply = 7, kPanel = 3;
  MatrixWay best{};
  int64_t least = INT64_MAX;
  for (const int fragments : {4, 2})
    for (const auto& [levels, token_warps] :
         {std::pair(8, 1), {4, 1}, {2, 1}, {1, 1}, {1, 2}, {1, 4}}) {
      const Tiling tiles = tiling(product, 32 * fragments, kWarpColumns / levels * token_warps,
                                  levels * kWarpsAcross / token_warps);
      const int64_t time = time_of(tiles, fragments * (kMultiply + levels) + kPanel);
      if (time < least)
        least = time, best = {fragments, levels, token_warps};
    }
  return best;
}

template <class T, int kFragments>
void matrix_by_levels(const GridLinear& product, const MatrixWay& way, Stream stream) {
  switch (way.levels) {
    case 8:
      return launch_matrix<T, kFragments, 8>(product, way.token_warps, stream);
    case 4:
      return launch_matrix<T, kFragments, 4>(product, way.token_warps, stream);
    case 2:
      return launch_matrix<T, kFragments, 2>(product, way.token_warps, stream);
    default:
      return launch_matrix<T, kFragments, 1>(product, way.token_warps, stream);
  }
}

template <class T>
void matrix(const GridLinear& product, Stream stream) {
  const MatrixWay way = choose(product);
  if (way.fragments == 4)
    matrix_by_levels<T, 4>(product, way, stream);
  else
    matrix_by_levels<T, 2>(product, way, stream);
}

template <class Real>
void scalar(const GridLinear& product, Stream stream) {
  using Shape = ScalarShape<Real>;
  ScalarTiling shape{{},
                     aligned_operands(product, sizeof(Real)),
                     aligned(product.y, product.outputs * int64_t(sizeof(Real)))};
  int64_t least = INT64_MAX;
  for (int tokens = Shape::kColumns; tokens >= Shape::kLaneColumns; tokens /= 2) {
    const Tiling tiles = tiling(product, Shape::kRows, tokens, Shape::kColumns / tokens);
    if (time_of(tiles, 1) < least)
      least = time_of(tiles, 1), shape.tiling = tiles;
  }
  launch(scalar_product<Real>, dim3(unsigned(shape.tiling.blocks())), dim3(kThreads),
         size_t(kStages * Shape::kPanelBytes), stream, product, shape);
}

}  // namespace
}  // namespace grid

void grid_linear(const GridLinear& product, Stream stream) {
  if (product.num_levels == 0 || product.batch == 0 || product.outputs == 0)
    return;
  switch (product.element) {
    case Element::bfloat16:
      return grid::matrix<BFloat16>(product, stream);
    case Element::float16:
      return grid::matrix<Half>(product, stream);
    case Element::float32:
      return grid::scalar<float>(product, stream);
    case Element::float64:
      return grid::scalar<double>(product, stream);
  }
}

}  // namespace confprune::cuda
