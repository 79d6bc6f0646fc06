// torch.ops.confprune.sparse_*: schemas, argument checks, and dispatch to the kernels.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "element_of.h"
#include "kernels/sparse_matrix.h"
#include "kernels/sparse_product.h"
#include "sparse_arguments.h"

namespace confprune {
namespace {

using at::Tensor;

constexpr int64_t kSerial = 1 << 14;  // multiply-adds below which threads cost more than they save

DenseMatrix dense_of(const Tensor& weight, int64_t groups) {
  return {const_cast<void*>(weight.const_data_ptr()),
          element_of(weight.scalar_type(), "weight"),
          {weight.stride(0), weight.stride(1)},
          weight.size(0),
          weight.size(1),
          groups};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_pack(const Tensor& weight, int64_t groups) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be a matrix, got ", weight.dim(),
                    " dimensions");
  check_shape(weight.size(0), weight.size(1), groups);
  const DenseMatrix dense = dense_of(weight, groups);
  const Chunks chunks(dense.rows, dense.row_size, groups);
  const auto bytes = weight.options().dtype(at::kByte);
  Tensor cells = at::zeros({chunks.cells() + 3, 2}, weight.options().dtype(at::kLong));
  int64_t* cell = cells.data_ptr<int64_t>();
  at::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      measure_chunk(dense, chunk, cell);
  });
  for (int64_t at = 0; at < 2 * chunks.cells(); ++at)
    cell[at + 2] += cell[at];
  name_shape(dense, cell);
  const int64_t* totals = cell + 2 * chunks.cells();
  Tensor values = at::empty({totals[0]}, weight.options());
  Tensor columns = at::empty({totals[0]}, bytes), slices = at::empty({totals[1]}, bytes);
  at::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      fill_chunk(dense, chunk, cell, values.data_ptr(), columns.data_ptr<uint8_t>(),
                 slices.data_ptr<uint8_t>());
  });
  return {values, columns, slices, cells};
}

void sparse_check(const Tensor& values, const Tensor& columns, const Tensor& slices,
                  const Tensor& cells, int64_t rows, int64_t row_size, int64_t groups) {
  const char* fault = fault_of(matrix_of(values, columns, slices, cells, rows, row_size, groups),
                               values.numel(), slices.numel());
  TORCH_CHECK_VALUE(fault == nullptr, "not a sparse matrix of shape [", rows, ", ", row_size,
                    "]: ", fault);
}

Tensor sparse_unpack(const Tensor& values, const Tensor& columns, const Tensor& slices,
                     const Tensor& cells, int64_t rows, int64_t row_size, int64_t groups) {
  const SparseMatrix sparse = matrix_of(values, columns, slices, cells, rows, row_size, groups);
  Tensor weight = at::zeros({rows, row_size}, values.options());
  const DenseMatrix dense = dense_of(weight, groups);
  const Chunks chunks(rows, row_size, groups);
  at::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      scatter_chunk(sparse, chunk, dense);
  });
  return weight;
}

void run(const SparseProduct& product) {
  const Window& w = product.window;
  const int64_t positions = w.output[0] * w.output[1] * w.output[2];
  const int64_t survivors =
      product.weight.cells
          [2 * Chunks(product.weight.rows, product.weight.row_size, product.weight.groups).cells()];
  const int threads = survivors * product.batch * positions < kSerial ? 1 : at::get_num_threads();
  const SparsePlan plan(product, threads);
  const int64_t tasks = plan.tasks();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(threads, tasks), 1, [&](int64_t begin, int64_t end) {
    // Kept from call to call: fresh pages cost more than the products of a small layer.
    thread_local std::vector<char> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), size_t(plan.scratch_bytes()) + 64));
    void* aligned = reinterpret_cast<void*>((uintptr_t(scratch.data()) + 63) / 64 * 64);
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task = next++; task < tasks; task = next++)
        plan.run(task, aligned);
  });
}

// Calls the product with y [batch, outputs, positions...], x likewise, at most three positions
// each.
void run_product(const SparseMatrix& weight, const Tensor& x, const std::optional<Tensor>& bias,
                 const Window& window, const Tensor& y) {
  if (y.numel() == 0)
    return;
  const auto batch_of = [](const Tensor& tensor) {
    Batch batch{const_cast<void*>(tensor.const_data_ptr()),
                element_of(tensor.scalar_type(), "x"),
                tensor.stride(0),
                tensor.stride(1),
                {0, 0, 0}};
    for (int64_t s = 2; s < tensor.dim(); ++s)
      batch.position_strides[kWindowDims - tensor.dim() + s] = tensor.stride(s);
    return batch;
  };
  const at::ScalarType compute = weight.element == Element::float64 ? at::kDouble : at::kFloat;
  Tensor own_bias = bias.value_or(Tensor());
  if (own_bias.defined() && !(own_bias.scalar_type() == compute && own_bias.is_contiguous()))
    own_bias = own_bias.to(compute).contiguous();
  run({weight, window, batch_of(x), batch_of(y),
       own_bias.defined() ? own_bias.const_data_ptr() : nullptr, x.size(0)});
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& columns,
                     const Tensor& slices, const Tensor& cells, const std::optional<Tensor>& bias,
                     int64_t outputs, int64_t dense_from) {
  const int64_t inputs = inputs_of(x);
  const SparseMatrix weight = matrix_of(values, columns, slices, cells, outputs, inputs, 1);
  check_product(x, values, bias, outputs);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  const int64_t batch = x.numel() / inputs;
  if (batch >= dense_from)
    return dense_linear(sparse_unpack(values, columns, slices, cells, outputs, inputs, 1), x, bias);
  const Window window{inputs, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  // Not through the dispatcher, which takes as long as some small layers.
  const Tensor y = at::detail::empty_cpu({batch, outputs}, x.scalar_type());
  run_product(weight, x.dim() == 2 ? x : x.reshape({batch, inputs}), bias, window, y);
  return x.dim() == 2 ? y : y.view(shape);
}

Tensor sparse_conv(const Tensor& x, const Tensor& values, const Tensor& columns,
                   const Tensor& slices, const Tensor& cells, const std::optional<Tensor>& bias,
                   int64_t outputs, at::IntArrayRef kernel, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                   int64_t dense_from) {
  check_convolution(x, kernel, stride, padding, dilation, groups);
  const int64_t dims = int64_t(kernel.size());
  if (x.dim() == dims + 1)
    return sparse_conv(x.unsqueeze(0), values, columns, slices, cells, bias, outputs, kernel,
                       stride, padding, dilation, groups, dense_from)
        .squeeze(0);
  const auto all = [](at::IntArrayRef sizes, int64_t value) {
    return std::all_of(sizes.begin(), sizes.end(), [=](int64_t size) { return size == value; });
  };
  if (dims > 1 && all(kernel, 1) && all(stride, 1) && all(padding, 0) && x.is_contiguous()) {
    // A kernel of one tap sees no neighbours, so all positions stand in one line.
    std::vector<int64_t> shape = x.sizes().vec();
    shape[1] = outputs;
    return sparse_conv(x.flatten(2), values, columns, slices, cells, bias, outputs, {1}, {1}, {0},
                       {1}, groups, dense_from)
        .view(shape);
  }
  const Window window = window_of(x, kernel, stride, padding, dilation);
  const int64_t row_size = row_size_of(window, groups);
  const SparseMatrix weight = matrix_of(values, columns, slices, cells, outputs, row_size, groups);
  check_product(x, values, bias, outputs);
  std::vector<int64_t> shape{x.size(0), outputs};
  shape.insert(shape.end(), window.output + kWindowDims - dims, window.output + kWindowDims);
  const int64_t products = x.size(0) * window.output[0] * window.output[1] * window.output[2];
  if (products >= dense_from)
    return dense_conv(sparse_unpack(values, columns, slices, cells, outputs, row_size, groups), x,
                      bias, kernel, stride, padding, dilation, groups);
  const Tensor y = at::empty(shape, x.options());
  run_product(weight, x, bias, window, y);
  return y;
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY_FRAGMENT(confprune, m) {
  m.def("sparse_pack(Tensor weight, int groups) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sparse_check(Tensor values, Tensor columns, Tensor slices, Tensor cells, int rows, "
      "int row_size, int groups) -> ()");
  m.def(
      "sparse_unpack(Tensor values, Tensor columns, Tensor slices, Tensor cells, int rows, "
      "int row_size, int groups) -> Tensor");
  m.def(
      "sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor slices, Tensor cells, "
      "Tensor? bias, int outputs, int dense_from) -> Tensor");
  m.def(
      "sparse_conv(Tensor x, Tensor values, Tensor columns, Tensor slices, Tensor cells, "
      "Tensor? bias, int outputs, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "int groups, int dense_from) -> Tensor");
}

TORCH_LIBRARY_IMPL(confprune, CPU, m) {
  m.impl("sparse_pack", confprune::sparse_pack);
  m.impl("sparse_check", confprune::sparse_check);
  m.impl("sparse_unpack", confprune::sparse_unpack);
  m.impl("sparse_linear", confprune::sparse_linear);
  m.impl("sparse_conv", confprune::sparse_conv);
}
