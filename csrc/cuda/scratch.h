// Parts of one piece of device memory that the caller gives.
#pragma once

#include <cstddef>
#include <cstdint>

namespace confprune::cuda {

// Without memory it tells how much is needed: take the parts, then ask for `bytes`.
class Scratch {
 public:
  static constexpr size_t kAlignment = 256;

  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    char* const part = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (size_t(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(part);
  }

  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

}  // namespace confprune::cuda
