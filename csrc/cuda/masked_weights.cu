// A thread takes 16 bytes of weights with their prune levels, and writes them K times.
#include "cuda/masked_weights.h"

namespace confprune::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

template <class T, int kSize>
struct alignas(sizeof(T) * kSize < kVectorBytes ? sizeof(T) * kSize : kVectorBytes) Vector {
  T values[kSize];
};

template <class T, class Level, int kSize>
__global__ void mask(MaskedWeights masked) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (at >= masked.size)
    return;
  using Weights = Vector<T, kSize>;
  const auto weights = *reinterpret_cast<const Weights*>(static_cast<const T*>(masked.weight) + at);
  const auto levels =
      *reinterpret_cast<const Vector<Level, kSize>*>(static_cast<const Level*>(masked.levels) + at);
  T* out = static_cast<T*>(masked.out) + at;
#pragma unroll 1  // a copy of this loop for the last levels would write number by number
  for (int64_t k = 0; k < masked.num_levels; ++k, out += masked.size) {
    const int64_t wanted = masked.level[k];
    const int level = int(wanted < -1 ? -1 : wanted > INT16_MAX ? INT16_MAX : wanted);
    Weights alive;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      alive.values[i] = int(levels.values[i]) > level ? weights.values[i] : T{};
    *reinterpret_cast<Weights*>(out) = alive;
  }
}

template <class T, class Level>
void launch_mask(const MaskedWeights& masked, Stream stream) {
  constexpr int kSize = kVectorBytes / int(sizeof(T));
  const auto multiple = [](const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  const bool vectors = masked.size % kSize == 0 && multiple(masked.weight, kVectorBytes) &&
                       multiple(masked.out, kVectorBytes) &&
                       multiple(masked.levels, alignof(Vector<Level, kSize>));
  const int64_t block = int64_t(kThreads) * (vectors ? kSize : 1);
  launch(vectors ? mask<T, Level, kSize> : mask<T, Level, 1>,
         dim3(unsigned((masked.size + block - 1) / block)), dim3(kThreads), 0, stream, masked);
}

template <class T>
void mask_by_levels(const MaskedWeights& masked, Stream stream) {
  if (masked.wide_levels)
    launch_mask<T, int16_t>(masked, stream);
  else
    launch_mask<T, uint8_t>(masked, stream);
}

}  // namespace

void masked_weights(const MaskedWeights& masked, Stream stream) {
  if (masked.size == 0 || masked.num_levels == 0)
    return;
  switch (masked.element) {
    case Element::float32:
      return mask_by_levels<float>(masked, stream);
    case Element::float64:
      return mask_by_levels<double>(masked, stream);
    case Element::float16:
      return mask_by_levels<Half>(masked, stream);
    case Element::bfloat16:
      return mask_by_levels<BFloat16>(masked, stream);
  }
}

}  // namespace confprune::cuda
