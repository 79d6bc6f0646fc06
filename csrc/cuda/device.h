// What the kernels of this folder use of CUDA, and no more.
//
// Every source here is also plain C++: without nvcc, <lockstep.h> of the tests stands in for the
// device and runs the threads of a block on the CPU. Hence four rules. Kernels are started by
// `launch`. Shared memory comes from `dynamic_shared` alone. Shuffles, votes and matrix products
// are of whole warps. And a thread that waits for another block calls `pause` in the loop.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#elif __has_include(<lockstep.h>)
#define CONFPRUNE_LOCKSTEP
#include <lockstep.h>
#else  // those who start kernels, and are none
#include <cuda_runtime_api.h>
#endif

namespace confprune::cuda {

using Stream = cudaStream_t;

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What a kernel may count on: multiprocessors, and bytes of shared memory a block may ask for.
struct Device {
  int multiprocessors;
  int shared_bytes;
};

#ifdef __CUDACC__

// Of the current device.
inline Device device() {
  int index = 0;
  Device found{};
  cudaGetDevice(&index);
  cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  return found;
}

// Starts a kernel; what goes wrong is told by cudaGetLastError.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, Arguments... arguments) {
  // Bytes of shared memory that need no leave. Leave is asked for all there is, so that threads of
  // the host that start one kernel with more and with less do not take it from each other.
  constexpr size_t kFree = 48 << 10;
  if (shared_bytes > kFree && cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   device().shared_bytes) != cudaSuccess)
    return;
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
}

// Sets device memory to zero.
inline void clear(void* memory, size_t bytes, Stream stream) {
  cudaMemsetAsync(memory, 0, bytes, stream);
}

// The shared memory of the block, aligned to 16 bytes.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char confprune_shared[];
  return reinterpret_cast<T*>(confprune_shared);
}

// A word that other blocks write or read meanwhile.
template <class T>
__device__ T load_relaxed(const T* address) {
  return *static_cast<const volatile T*>(address);
}
template <class T>
__device__ void store_relaxed(T* address, T value) {
  *static_cast<volatile T*>(address) = value;
}

// Lets other blocks work while this thread waits for them.
inline __device__ void pause() {
  __nanosleep(20);
}

// Copies 16 aligned bytes to shared memory while the thread goes on. Copies are committed in
// groups; a wait leaves the latest `kPending` groups under way. Where there is nothing to copy,
// zeros are written.
inline __device__ void copy_async(void* shared, const void* global) {
  const unsigned address = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
inline __device__ void copy_async_or_zero(void* shared, const void* global, bool copy) {
  const unsigned address = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(copy ? 16 : 0)
               : "memory");
}
inline __device__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#elif defined(CONFPRUNE_LOCKSTEP)

using lockstep::clear;
using lockstep::copy_async;
using lockstep::copy_async_commit;
using lockstep::copy_async_or_zero;
using lockstep::copy_async_wait;
using lockstep::dynamic_shared;
using lockstep::launch;
using lockstep::load_relaxed;
using lockstep::pause;
using lockstep::store_relaxed;

inline Device device() {
  return {lockstep::settings().multiprocessors, lockstep::settings().shared_bytes};
}

#endif

}  // namespace confprune::cuda
