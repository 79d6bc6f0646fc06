// What the sparse operators ask of their arguments, on every device, and their dense ways.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "element_of.h"
#include "kernels/sparse_matrix.h"
#include "kernels/sparse_product.h"

namespace confprune {

inline void check_shape(int64_t rows, int64_t row_size, int64_t groups) {
  TORCH_CHECK_VALUE(rows >= 1 && row_size >= 1, "a matrix of ", rows, " rows of ", row_size,
                    " weights has no sparse form");
  TORCH_CHECK_VALUE(groups >= 1 && rows % groups == 0, groups, " groups do not divide ", rows,
                    " rows");
}

// What a matrix of CUDA tensors holds is not looked at here, which would wait for the device.
inline SparseMatrix matrix_of(const at::Tensor& values, const at::Tensor& columns,
                              const at::Tensor& slices, const at::Tensor& cells, int64_t rows,
                              int64_t row_size, int64_t groups) {
  check_shape(rows, row_size, groups);
  const Chunks chunks(rows, row_size, groups);
  TORCH_CHECK_TYPE(columns.scalar_type() == at::kByte && slices.scalar_type() == at::kByte &&
                       cells.scalar_type() == at::kLong,
                   "columns and slices must be uint8 and cells int64, got ", columns.scalar_type(),
                   ", ", slices.scalar_type(), " and ", cells.scalar_type());
  const auto is_list = [](const at::Tensor& tensor) {
    return tensor.dim() == 1 && tensor.is_contiguous();
  };
  const SparseMatrix sparse{values.const_data_ptr(),
                            element_of(values.scalar_type(), "values"),
                            columns.const_data_ptr<uint8_t>(),
                            slices.const_data_ptr<uint8_t>(),
                            cells.const_data_ptr<int64_t>(),
                            rows,
                            row_size,
                            groups};
  TORCH_CHECK_VALUE(is_list(values) && is_list(columns) && is_list(slices) &&
                        columns.size(0) == values.size(0) && cells.dim() == 2 &&
                        cells.size(0) == chunks.cells() + 3 && cells.size(1) == 2 &&
                        cells.is_contiguous() && (cells.is_cuda() || has_shape(sparse, chunks)),
                    "values, columns, slices and cells are not those of a matrix of shape [", rows,
                    ", ", row_size, "] in ", groups, " groups");
  return sparse;
}

// The sparse products have no derivative: an answer without one would train in silence.
inline void refuse_training(const at::Tensor& x) {
  TORCH_CHECK(!(at::GradMode::is_enabled() && x.requires_grad()),
              "sparse layers are for inference and x requires a gradient: call them under "
              "torch.no_grad() or torch.inference_mode(), or train the dense model");
}

inline int64_t inputs_of(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x needs at least one dimension");
  return x.size(-1);
}

inline void check_product(const at::Tensor& x, const at::Tensor& values,
                          const std::optional<at::Tensor>& bias, int64_t outputs) {
  element_of(x.scalar_type(), "x");
  TORCH_CHECK_TYPE((x.scalar_type() == at::kDouble) == (values.scalar_type() == at::kDouble),
                   "x is ", x.scalar_type(), " and the weights are ", values.scalar_type());
  if (bias.has_value())
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == outputs, "bias has shape ",
                      bias->sizes(), " for ", outputs, " outputs");
  refuse_training(x);
}

// Checks all but sizes for which `window_of` asks. x is [batch, channels, positions...], or without
// the batch.
inline void check_convolution(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const int64_t dims = int64_t(kernel.size());
  TORCH_CHECK_VALUE(
      dims >= 1 && dims <= kWindowDims && (x.dim() == dims + 2 || x.dim() == dims + 1),
      "sparse_conv takes x [batch, channels, positions...], or without the batch, "
      "and as many kernel sizes as positions, got ",
      x.sizes(), " and ", kernel);
  TORCH_CHECK_VALUE(int64_t(stride.size()) == dims && int64_t(padding.size()) == dims &&
                        int64_t(dilation.size()) == dims,
                    "stride, padding and dilation need ", dims, " values each");
  const int64_t channels = x.size(-dims - 1);
  TORCH_CHECK_VALUE(groups >= 1 && channels % groups == 0, groups, " groups do not divide ",
                    channels, " channels");
}

inline Window window_of(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation) {
  Window window{x.size(1), {}, {}, {}, {}, {}, {}};
  for (int d = 0; d < kWindowDims; ++d) {
    const int64_t s = d - (kWindowDims - x.dim() + 2);  // the last dimensions are the ones in use
    window.input[d] = s < 0 ? 1 : x.size(2 + s);
    window.kernel[d] = s < 0 ? 1 : kernel[s];
    window.stride[d] = s < 0 ? 1 : stride[s];
    window.padding[d] = s < 0 ? 0 : padding[s];
    window.dilation[d] = s < 0 ? 1 : dilation[s];
    TORCH_CHECK_VALUE(window.kernel[d] >= 1 && window.stride[d] >= 1 && window.dilation[d] >= 1 &&
                          window.padding[d] >= 0,
                      "kernel, stride and dilation must be positive and padding not negative");
    const int64_t room =
        window.input[d] + 2 * window.padding[d] - window.dilation[d] * (window.kernel[d] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, "the kernel is larger than the padded input in dimension ", s);
    window.output[d] = room / window.stride[d] + 1;
  }
  return window;
}

// Weights of a row of the matrix that a convolution is.
inline int64_t row_size_of(const Window& window, int64_t groups) {
  return window.channels / groups * window.kernel[0] * window.kernel[1] * window.kernel[2];
}

inline std::optional<at::Tensor> like(const std::optional<at::Tensor>& bias, const at::Tensor& x) {
  return bias.has_value() ? std::optional<at::Tensor>(bias->to(x.scalar_type())) : std::nullopt;
}

inline at::Tensor dense_linear(const at::Tensor& matrix, const at::Tensor& x,
                               const std::optional<at::Tensor>& bias) {
  return at::linear(x, matrix.to(x.scalar_type()), like(bias, x));
}

inline at::Tensor dense_conv(const at::Tensor& matrix, const at::Tensor& x,
                             const std::optional<at::Tensor>& bias, at::IntArrayRef kernel,
                             at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, int64_t groups) {
  std::vector<int64_t> shape{matrix.size(0), x.size(1) / groups};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  return at::convolution(x, matrix.view(shape).to(x.scalar_type()), like(bias, x), stride, padding,
                         dilation, false, std::vector<int64_t>(kernel.size(), 0), groups);
}

}  // namespace confprune
