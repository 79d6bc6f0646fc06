// The tiles of minimal filtering, over a vector width: where they are, and their points; part of
// grid_algorithm.h.

namespace confprune {
namespace {

constexpr int64_t kVectorsOfChunk = kConvolutionChunk / Lanes<float>::kWidth;

// Examples of an input in the lanes; what is outside of [begin, end) is padding.
struct Image {
  const float* data;  // of the example and channel 0, at `begin`
  int64_t channel_stride;
  int64_t strides[2];
  int64_t begin[2], end[2];
};

// The images of `count` examples at x: where they are, or in scratch [channel, position, chunk].
template <class Input>
Image image_of(const GridDetails& d, const Input* x, int64_t count, float* scratch) {
  const Convolution& c = d.product.convolution;
  const Activation& layout = d.product.x;
  const int64_t chunk = d.packed.chunk;
  Image image{reinterpret_cast<const float*>(x),
              layout.channel_stride,
              {layout.position_strides[1], layout.position_strides[2]},
              {c.padding[1], c.padding[2]},
              {c.padding[1] + c.input[1], c.padding[2] + c.input[2]}};
  if (std::is_same<Input, float>::value && layout.batch_stride == 1 && count == chunk)
    return image;
  image.data = scratch;
  image.channel_stride = c.input[1] * c.input[2] * chunk;
  image.strides[0] = c.input[2] * chunk;
  image.strides[1] = chunk;
  for (int64_t channel = 0; channel < c.channels; ++channel)
    for (int64_t line = 0; line < c.input[1]; ++line, scratch += c.input[2] * chunk)
      pack_line(x + channel * layout.channel_stride + line * layout.position_strides[1],
                layout.position_strides[2], layout.batch_stride, count, 0, c.input[2], 1, chunk, 0,
                scratch);
  return image;
}

// Where the inputs of a tile are, and its outputs.
struct TilePlace {
  const float* corner;
  int first[2], last[2];             // inputs outside of [first, last) are padding
  bool whole;                        // without padding
  int64_t lines[Filter<2>::kSide];   // from the corner to each line; where that is padding, to
  int32_t inside[Filter<2>::kSide];  // another one, and its bits are all 0 instead of all 1
  int64_t output;
  int outputs[2];
};

template <int S>
TilePlace place_tile(const GridDetails& d, const Image& image, int64_t index) {
  constexpr int kSide = Filter<S>::kSide;
  const Convolution& c = d.product.convolution;
  const int64_t* const tiles = d.winograd.tiles;
  const int64_t indices[2] = {index / tiles[1], index % tiles[1]};
  TilePlace tile{};
  tile.corner = image.data;
  tile.whole = true;
  for (int i = 0; i < 2; ++i) {
    const int64_t start = tile_start(c.output[1 + i], tiles[i], indices[i]);
    tile.outputs[i] = int(tile_start(c.output[1 + i], tiles[i], indices[i] + 1) - start);
    tile.output += start * d.product.y.position_strides[1 + i];
    const int64_t at = start * S;
    tile.corner += (at - image.begin[i]) * image.strides[i];
    tile.first[i] = int(std::max<int64_t>(0, image.begin[i] - at));
    tile.last[i] = int(std::min<int64_t>(kSide, image.end[i] - at));
    tile.whole = tile.whole && tile.first[i] == 0 && tile.last[i] == kSide;
    for (int r = 0; r < kSide && i == 0; ++r) {
      const int64_t line = std::min(std::max(at + r, image.begin[0]), image.end[0] - 1);
      tile.lines[r] = (line - at) * image.strides[0];
      tile.inside[r] = line == at + r ? -1 : 0;
    }
  }
  return tile;
}

// The vectors of points that meet each weight: those of a weight are places[starts[weight]] to
// places[starts[weight + 1]], counted from the first point of the first tile.
struct PointVectors {
  int64_t places[kFilteredTiles * Filter<2>::kPoints * kVectorsOfChunk];
  int64_t starts[kWeightPoints + 1];
};

template <int S>
PointVectors point_vectors(const TilePlace* tiles, int64_t count) {
  using F = Filter<S>;
  PointVectors found;
  int64_t at = 0;
  for (int weight = 0; weight < kWeightPoints; ++weight) {
    const int line = weight / kWeightSide, column = weight % kWeightSide;
    found.starts[weight] = at;
    for (int64_t t = 0; t < count; ++t)
      for (int r = F::first(line); r < F::end(line, tiles[t].outputs[0]); ++r)
        for (int c = F::first(column); c < F::end(column, tiles[t].outputs[1]); ++c)
          for (int64_t v = 0; v < kVectorsOfChunk; ++v)
            found.places[at++] =
                ((t * kVectorsOfChunk + v) * F::kRoom + r * F::kSide + c) * Lanes<float>::kWidth;
  }
  found.starts[kWeightPoints] = at;
  return found;
}

}  // namespace
}  // namespace confprune
