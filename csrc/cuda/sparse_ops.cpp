// torch.ops.confprune.sparse_* on CUDA tensors. Packing and checking are done on the CPU, and wait
// for the device; nothing else does.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/call.h"
#include "cuda/sparse.h"
#include "sparse_arguments.h"

namespace confprune {
namespace {

using at::Tensor;
using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Packed sparse_pack(const Tensor& weight, int64_t groups) {
  static const auto pack = operator_of<Packed(const Tensor&, int64_t)>("confprune::sparse_pack");
  const auto [values, columns, slices, cells] = pack.call(weight.cpu(), groups);
  const at::Device device = weight.device();
  return {values.to(device), columns.to(device), slices.to(device), cells.to(device)};
}

void sparse_check(const Tensor& values, const Tensor& columns, const Tensor& slices,
                  const Tensor& cells, int64_t rows, int64_t row_size, int64_t groups) {
  static const auto check =
      operator_of<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                       int64_t)>("confprune::sparse_check");
  check.call(values.cpu(), columns.cpu(), slices.cpu(), cells.cpu(), rows, row_size, groups);
}

void check_devices(const Call& call, const Tensor& values, const Tensor& columns,
                   const Tensor& slices, const Tensor& cells) {
  call.check(values, "values");
  call.check(columns, "columns");
  call.check(slices, "slices");
  call.check(cells, "cells");
}

Tensor sparse_unpack(const Tensor& values, const Tensor& columns, const Tensor& slices,
                     const Tensor& cells, int64_t rows, int64_t row_size, int64_t groups) {
  const Call call(values, "values");
  check_devices(call, values, columns, slices, cells);
  const SparseMatrix sparse = matrix_of(values, columns, slices, cells, rows, row_size, groups);
  Tensor weight = at::empty({rows, row_size}, values.options());
  cuda::sparse_unpack(sparse, weight.mutable_data_ptr(), call.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return weight;
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& columns,
                     const Tensor& slices, const Tensor& cells, const std::optional<Tensor>& bias,
                     int64_t outputs, int64_t dense_from) {
  const Call call(x, "x");
  check_devices(call, values, columns, slices, cells);
  call.check(bias, "bias");
  const int64_t inputs = inputs_of(x);
  const SparseMatrix weight = matrix_of(values, columns, slices, cells, outputs, inputs, 1);
  check_product(x, values, bias, outputs);
  const int64_t vectors = x.numel() / inputs;
  if (vectors >= dense_from)
    return dense_linear(sparse_unpack(values, columns, slices, cells, outputs, inputs, 1), x, bias);
  const Tensor rows = x.reshape({vectors, inputs});
  const at::ScalarType compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor own_bias = bias.has_value() ? bias->to(compute).contiguous() : Tensor();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  Tensor y = at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (y.numel() == 0)
    return y;
  const cuda::SparseLinear product{weight,
                                   rows.const_data_ptr(),
                                   bias.has_value() ? own_bias.const_data_ptr() : nullptr,
                                   y.mutable_data_ptr(),
                                   element_of(x.scalar_type(), "x"),
                                   vectors,
                                   {rows.stride(0), rows.stride(1)}};
  const Tensor memory = scratch(cuda::sparse_linear_scratch(product), x);
  cuda::sparse_linear(product, memory.mutable_data_ptr(), call.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// The weight is unpacked for every call.
Tensor sparse_conv(const Tensor& x, const Tensor& values, const Tensor& columns,
                   const Tensor& slices, const Tensor& cells, const std::optional<Tensor>& bias,
                   int64_t outputs, at::IntArrayRef kernel, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                   int64_t dense_from) {
  const Call call(x, "x");
  check_devices(call, values, columns, slices, cells);
  call.check(bias, "bias");
  check_convolution(x, kernel, stride, padding, dilation, groups);
  if (x.dim() == int64_t(kernel.size()) + 1)
    return sparse_conv(x.unsqueeze(0), values, columns, slices, cells, bias, outputs, kernel,
                       stride, padding, dilation, groups, dense_from)
        .squeeze(0);
  const Window window = window_of(x, kernel, stride, padding, dilation);
  check_product(x, values, bias, outputs);
  const Tensor matrix =
      sparse_unpack(values, columns, slices, cells, outputs, row_size_of(window, groups), groups);
  return dense_conv(matrix, x, bias, kernel, stride, padding, dilation, groups);
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY_IMPL(confprune, CUDA, m) {
  m.impl("sparse_pack", confprune::sparse_pack);
  m.impl("sparse_check", confprune::sparse_check);
  m.impl("sparse_unpack", confprune::sparse_unpack);
  m.impl("sparse_linear", confprune::sparse_linear);
  m.impl("sparse_conv", confprune::sparse_conv);
}
