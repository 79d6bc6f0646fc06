// Linear layers one after the other, over a vector width; part of grid_algorithm.h.
//
// A tile of examples goes through all layers before the next, and what is between the layers is
// only held for a few levels at a time after the first layer, and for one after the others: layers
// of usual widths find their inputs in the second-level cache.

namespace confprune {
namespace {

// A tile of examples through all layers. The sums of the first, which all levels share, are left in
// memory from one group of levels to the next.
template <class T>
void run_mlp_typed(const MlpDetails& d, int64_t part, T* scratch) {
  using L = Lanes<T>;
  const GridDetails& head = d.layers.front();
  const GridDetails& tail = d.layers.back();
  const GridProduct& shared = head.product;
  const int64_t first = part * head.packed.chunk;
  const int64_t count = std::min(head.packed.chunk, shared.batch - first);
  T* const packed = scratch;
  T* const sums = packed + shared.convolution.channels * L::kTile;
  T* const tile = sums + shared.rows.rows * L::kTile;
  T* const hidden = tile + d.widest * L::kTile;
  T* const between[2] = {hidden + d.group * shared.rows.rows * L::kTile,
                         hidden + (d.group * shared.rows.rows + d.between) * L::kTile};
  Finite<T> finite;
  pack(head, static_cast<const T*>(shared.x.data), first, 0, packed, finite);
  const Activation& y = tail.product.y;
  with_vectors<CONFPRUNE_TILE_VECTORS>((count + L::kWidth - 1) / L::kWidth, [&](auto V) {
    constexpr int64_t kLanes = V() * L::kWidth;
    const int64_t level_size = shared.rows.rows * kLanes;
    const bool direct = y.batch_stride == 1 && count == kLanes;
    for (int64_t end = shared.num_levels; end > 0; end -= d.group) {
      const int64_t begin = std::max<int64_t>(0, end - d.group);
      shared_tile<T, V()>(head, {begin, end, sums}, 0, shared.rows.rows, packed,
                          Tile<T>{hidden, kLanes}, level_size);
      for (int64_t k = begin; k < end; ++k) {
        const T* x = hidden + (k - begin) * level_size;
        T* const outputs = static_cast<T*>(y.data) + k * y.level_stride + first * y.batch_stride;
        for (std::size_t i = 1; i < d.layers.size(); ++i) {
          const GridDetails& layer = d.layers[i];
          const int64_t rows = layer.product.rows.rows;
          finite.look(x, layer.product.rows.row_size * kLanes);
          Tile<T> to{between[i % 2], kLanes};
          if (&layer == &tail)
            to = direct ? Tile<T>{outputs, y.channel_stride} : Tile<T>{tile, L::kTile};
          level_tile<T, V()>(layer, Strided{kLanes}, k, 0, rows, x, tile, to);
          x = to.data;
        }
        if (!direct)
          store(tail, tile, tail.product.rows.rows, outputs, 0, kLanes, count);
      }
    }
  });
  if (!finite.all())
    shared.finite->store(false, std::memory_order_relaxed);
}

void run_mlp(const MlpDetails& d, int64_t part, void* scratch) {
  if (d.layers.front().product.wide)
    return run_mlp_typed(d, part, static_cast<double*>(scratch));
  run_mlp_typed(d, part, static_cast<float*>(scratch));
}

}  // namespace
}  // namespace confprune
