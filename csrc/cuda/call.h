// A call of an operator with CUDA tensors: where it works, and what memory it takes there.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

#include "cuda/device.h"

namespace confprune {

// The device and the stream of a call: those of one tensor, to which others are held.
class Call {
 public:
  Call(const at::Tensor& tensor, const char* argument)
      : device_(tensor.device()), argument_(argument), guard_(checked(tensor, argument)) {}

  cuda::Stream stream() const { return c10::cuda::getCurrentCUDAStream(device_.index()).stream(); }

  void check(const at::Tensor& tensor, const char* argument) const {
    TORCH_CHECK_VALUE(tensor.device() == device_, argument, " is on ", tensor.device(), " but ",
                      argument_, " is on ", device_, ": move one of them with .to(device)");
  }

  void check(const std::optional<at::Tensor>& tensor, const char* argument) const {
    if (tensor.has_value())
      check(*tensor, argument);
  }

 private:
  static at::Device checked(const at::Tensor& tensor, const char* argument) {
    TORCH_CHECK_VALUE(tensor.is_cuda(), argument,
                      " is on the CPU but others are on a CUDA device: "
                      "move one of them with .to(device)");
    return tensor.device();
  }

  at::Device device_;
  const char* argument_;
  c10::cuda::CUDAGuard guard_;
};

inline at::Tensor scratch(size_t bytes, const at::Tensor& like) {
  return at::empty({int64_t(bytes)}, like.options().dtype(at::kByte));
}

}  // namespace confprune
