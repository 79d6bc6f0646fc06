// The sparse product of a few vectors, and the matrix with its zeros.
//
// Product: a block takes some cells of a chunk and up to 16 vectors. The vectors' inputs of a cell
// come to shared memory; every survivor is read once, and multiplied with its input of every
// vector. The rows' sums, in shared memory because each cell has them in another order, go to
// scratch memory, one copy for every part that a chunk's cells are cut into; a second kernel adds
// the parts. No order of additions depends on chance: within a cell one warp has a row, and cells
// follow each other.
//
// Bytes: 3 a survivor of 16 bits (5 of a float), and the parts twice, mostly in the L2 cache: at
// 4096 x 4096, 90 % sparsity and bf16 5.2 MB, and 1 MB a vector. Operations: a look-up of shared
// memory and a multiply-add for a survivor and a vector. Limits: memory bandwidth for one vector or
// two, the look-ups beyond, whose places in the banks are as random as the pattern.
//
// Unpacking: zeros are written and survivors put in their places, a sector of 32 bytes for each.
#include "cuda/sparse.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/numbers.h"
#include "cuda/sparse_cell.h"

namespace confprune::cuda {
namespace sparse {
namespace {

constexpr int kMostVectors = 16;             // of a block
constexpr int kResident = 4;                 // blocks of a multiprocessor
constexpr int64_t kBlocks = 512;             // that keep a device busy
constexpr int64_t kScratchBytes = 32 << 20;  // of the parts of all vectors but the first 16
constexpr int64_t kMostTogether = 1 << 16;   // vectors of a launch

// How the cells of a chunk are cut into parts. By the shape alone, and so the order of additions.
struct Parts {
  int64_t blocks;  // of a part
  int64_t count;

  explicit Parts(const Chunks& chunks)
      : blocks(std::min(ceil_div(chunks.cells(), kBlocks), chunks.blocks)),
        count(ceil_div(chunks.blocks, blocks)) {}
};

Chunks chunks_of(const SparseMatrix& sparse) {
  return Chunks(sparse.rows, sparse.row_size, sparse.groups);
}

bool wide(const SparseLinear& product) {
  return product.weight.element == Element::float64;
}

// Bytes of the parts of a vector.
int64_t part_bytes(const SparseLinear& product) {
  return Parts(chunks_of(product.weight)).count * product.weight.rows * (wide(product) ? 8 : 4);
}

// Vectors that are multiplied by one launch.
int64_t together(const SparseLinear& product) {
  const int64_t fit = kScratchBytes / part_bytes(product) / kMostVectors * kMostVectors;
  return std::min(product.vectors, std::clamp<int64_t>(fit, kMostVectors, kMostTogether));
}

// How the lanes of a warp share out slices: kRows rows at once, two lanes for the survivors of a
// row, each times kAcross lanes with kEach vectors.
template <class Real, int kVectors>
struct Lanes {
  static constexpr int kWide = 16 / int(sizeof(Real));  // numbers that are looked up at once
  static constexpr int kEach = kVectors < kWide ? kVectors : kWide;
  static constexpr int kAcross = kVectors / kEach;
  static constexpr int kRows = int(kWarp) / 2 / kAcross;
  static_assert(kSliceRows % kRows == 0, "no lane has a row outside of the slice");

  struct alignas(kEach * sizeof(Real)) Numbers {
    Real of[kEach];
  };
};

template <class Real, int kVectors>
struct ProductMemory {
  using Numbers = typename Lanes<Real, kVectors>::Numbers;
  static constexpr int kAcross = Lanes<Real, kVectors>::kAcross;

  Numbers inputs[kSparseBlock][kAcross];
  Numbers sums[kMostChunkRows][kAcross];
  CellMemory cell;
};

// sums[place of a row] += the row's survivors times their inputs.
template <class Stored, class Real, int kVectors>
__device__ void multiply_slice(const Slice& slice, const Stored* values, const uint8_t* columns,
                               ProductMemory<Real, kVectors>* memory) {
  using L = Lanes<Real, kVectors>;
  const int lane = int(threadIdx.x % kWarp), across = lane % L::kAcross;
  const int half = lane / int(kWarp / 2), rows = int(slice.rows);
#pragma unroll 1
  for (int first = 0; first < rows; first += L::kRows) {
    const int row = first + lane / L::kAcross % L::kRows;
    typename L::Numbers sums{};
    each_survivor(slice, row, half, [&](int at) {
      const Real value = Real(widen(values[at]));
      const typename L::Numbers inputs = memory->inputs[columns[at]][across];
#pragma unroll
      for (int i = 0; i < L::kEach; ++i)
        sums.of[i] += value * inputs.of[i];
    });
#pragma unroll
    for (int i = 0; i < L::kEach; ++i)
      sums.of[i] += __shfl_down_sync(kAllLanes, sums.of[i], kWarp / 2);
    if (half == 0 && row < rows) {
      typename L::Numbers& all = memory->sums[slice.places[row]][across];
#pragma unroll
      for (int i = 0; i < L::kEach; ++i)
        all.of[i] += sums.of[i];
    }
  }
}

// The inputs of a block of columns, of vectors from `first` on; zeros for those that are not there.
template <class T, class Real, int kVectors>
__device__ void load_inputs_of(const SparseLinear& product, int64_t block, int64_t first,
                               Real* inputs) {
  constexpr int kColumns = int(kSparseBlock), kTogether = kThreads / kColumns;
  constexpr int kRounds = (kVectors + kTogether - 1) / kTogether;
  const int column = int(threadIdx.x) % kColumns, vector = int(threadIdx.x) / kColumns;
  const int64_t at = block * kSparseBlock + column;
  const int left =
      at < product.weight.row_size ? int(product.vectors - first) - vector : 0;  // of this column
  const T* next = static_cast<const T*>(product.x) + (first + vector) * product.x_strides[0] +
                  at * product.x_strides[1];
  Real loaded[kRounds];  // all under way before the first store
#pragma unroll
  for (int round = 0; round < kRounds; ++round, next += kTogether * product.x_strides[0])
    loaded[round] = round * kTogether < left ? Real(widen(*next)) : Real(0);
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
    if (round * kTogether + vector < kVectors)
      inputs[column * kVectors + round * kTogether + vector] = loaded[round];
}

template <class Real, int kVectors>
__device__ void load_inputs(const SparseLinear& product, int64_t block, int64_t first,
                            Real* inputs) {
  if constexpr (std::is_same_v<Real, double>) {
    load_inputs_of<double, Real, kVectors>(product, block, first, inputs);
  } else {
    if (product.element == Element::float16)
      load_inputs_of<Half, Real, kVectors>(product, block, first, inputs);
    else if (product.element == Element::bfloat16)
      load_inputs_of<BFloat16, Real, kVectors>(product, block, first, inputs);
    else
      load_inputs_of<float, Real, kVectors>(product, block, first, inputs);
  }
}

// A block has a part of a chunk, and kVectors vectors from blockIdx.y * kVectors on. parts is
// [parts, vectors, rows].
template <class Stored, class Real, int kVectors>
__global__ void __launch_bounds__(kThreads, kResident)
    multiply(SparseLinear product, Chunks chunks, Parts cut, Real* parts) {
  auto* memory = dynamic_shared<ProductMemory<Real, kVectors>>();
  Real* sums = memory->sums[0][0].of;
  const SparseMatrix& weight = product.weight;
  const int64_t chunk = blockIdx.x / cut.count, part = blockIdx.x % cut.count;
  const int64_t first = int64_t(blockIdx.y) * kVectors;
  const bool fits = has_shape(weight, chunks);
  for (int i = int(threadIdx.x); i < int(kMostChunkRows) * kVectors; i += kThreads)
    sums[i] = fits ? Real(0) : Real(NAN);
  const int64_t begin = part * cut.blocks;
  const int64_t end = begin + cut.blocks < chunks.blocks ? begin + cut.blocks : chunks.blocks;
  for (int64_t block = begin; fits && block < end; ++block) {
    __syncthreads();  // the last cell is done
    load_inputs<Real, kVectors>(product, block, first, memory->inputs[0][0].of);
    const Cell cell(weight, chunk * chunks.blocks + block, &memory->cell);
    cell.each_slice([&](const Slice& slice, int64_t survivor) {
      multiply_slice(slice, static_cast<const Stored*>(weight.values) + survivor,
                     weight.columns + survivor, memory);
    });
  }
  __syncthreads();
  const int rows = int(chunks.rows(chunk));
  Real* out = parts + (part * product.vectors + first) * weight.rows + chunks.begin(chunk);
  for (int i = int(threadIdx.x); i < rows * kVectors; i += kThreads) {
    const int row = i % rows, vector = i / rows;
    if (first + vector < product.vectors)
      out[vector * weight.rows + row] = sums[row * kVectors + vector];
  }
}

// y = the sums of the parts, in their order, + bias
template <class Real>
__global__ void __launch_bounds__(kThreads, kResident)
    add_parts(SparseLinear product, int64_t parts, const Real* sums) {
  const int64_t size = product.vectors * product.weight.rows;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= size)
    return;
  Real sum = 0;
#pragma unroll 16  // loads under way: with one vector there are few threads
  for (int64_t part = 0; part < parts; ++part)
    sum += sums[part * size + at];
  if (product.bias != nullptr)
    sum += static_cast<const Real*>(product.bias)[at % product.weight.rows];
  store_number(sum, product.y, product.element, at);
}

// A block has a cell of the matrix, where zeros are.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    unpack(SparseMatrix sparse, Chunks chunks, T* dense) {
  const int64_t chunk = blockIdx.x / chunks.blocks, block = blockIdx.x % chunks.blocks;
  T* corner = dense + chunks.begin(chunk) * sparse.row_size + block * kSparseBlock;
  if (!has_shape(sparse, chunks)) {
    if (threadIdx.x < chunks.rows(chunk))
      narrow(decltype(widen(T{}))(NAN), corner + threadIdx.x * sparse.row_size);
    return;
  }
  const Cell cell(sparse, blockIdx.x, dynamic_shared<CellMemory>());
  const int lane = int(threadIdx.x % kWarp), rows = int(kSliceRows);
  cell.each_slice([&](const Slice& slice, int64_t survivor) {
    const int row = lane % rows;
    if (row >= slice.rows)
      return;
    const T* values = static_cast<const T*>(sparse.values) + survivor;
    const uint8_t* columns = sparse.columns + survivor;
    T* out = corner + slice.places[row] * sparse.row_size;
    each_survivor(slice, row, lane / rows, [&](int at) { out[columns[at]] = values[at]; });
  });
}

template <class Stored, int kVectors>
void launch_product(const SparseLinear& product, void* scratch, Stream stream) {
  using Real = decltype(widen(Stored{}));
  if constexpr (kVectors < kMostVectors)
    if (product.vectors > kVectors)
      return launch_product<Stored, 2 * kVectors>(product, scratch, stream);
  const Chunks chunks = chunks_of(product.weight);
  const Parts parts(chunks);
  Real* sums = static_cast<Real*>(scratch);
  launch(multiply<Stored, Real, kVectors>,
         dim3(unsigned(chunks.count * parts.count), unsigned(ceil_div(product.vectors, kVectors))),
         dim3(kThreads), sizeof(ProductMemory<Real, kVectors>), stream, product, chunks, parts,
         sums);
  launch(add_parts<Real>, dim3(unsigned(ceil_div(product.vectors * product.weight.rows, kThreads))),
         dim3(kThreads), 0, stream, product, parts.count, sums);
}

template <class T>
void launch_unpack(const SparseMatrix& sparse, void* dense, Stream stream) {
  const Chunks chunks = chunks_of(sparse);
  clear(dense, size_t(sparse.rows * sparse.row_size) * sizeof(T), stream);
  launch(unpack<T>, dim3(unsigned(chunks.cells())), dim3(kThreads), sizeof(CellMemory), stream,
         sparse, chunks, static_cast<T*>(dense));
}

template <class Body>
void with_element(Element element, Body body) {
  switch (element) {
    case Element::float32:
      return body(float{});
    case Element::float64:
      return body(double{});
    case Element::float16:
      return body(Half{});
    case Element::bfloat16:
      return body(BFloat16{});
  }
}

int64_t bytes_of(Element element) {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

}  // namespace
}  // namespace sparse

size_t sparse_linear_scratch(const SparseLinear& product) {
  return size_t(sparse::together(product) * sparse::part_bytes(product));
}

void sparse_linear(const SparseLinear& product, void* scratch, Stream stream) {
  const int64_t at_once = sparse::together(product), bytes = sparse::bytes_of(product.element);
  for (int64_t first = 0; first < product.vectors; first += at_once) {
    SparseLinear some = product;
    some.vectors = std::min(at_once, product.vectors - first);
    some.x = static_cast<const char*>(product.x) + first * product.x_strides[0] * bytes;
    some.y = static_cast<char*>(product.y) + first * product.weight.rows * bytes;
    sparse::with_element(product.weight.element, [&](auto zero) {
      sparse::launch_product<decltype(zero), 1>(some, scratch, stream);
    });
  }
}

void sparse_unpack(const SparseMatrix& sparse, void* dense, Stream stream) {
  sparse::with_element(sparse.element, [&](auto zero) {
    sparse::launch_unpack<decltype(zero)>(sparse, dense, stream);
  });
}

}  // namespace confprune::cuda
