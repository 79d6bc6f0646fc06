// Kernels with a mistake each, by name: the stand-in for the device has to notice. And a sound one.
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace confprune::cuda {
namespace {

// Each block's sum, by way of warps and shared memory, added to what earlier blocks have left.
__global__ void chained_sum(const int* values, int* sum, int* turn) {
  int* warps = dynamic_shared<int>();
  int value = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int by = 16; by > 0; by /= 2)
    value += __shfl_xor_sync(kAllLanes, value, by);
  if (threadIdx.x % kWarp == 0)
    warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    while (load_relaxed(turn) != int(blockIdx.x))
      pause();
    __threadfence();
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp)
      *sum += warps[warp];
    __threadfence();
    store_relaxed(turn, int(blockIdx.x) + 1);
  }
}

__global__ void leaves_others_at_a_barrier() {
  if (threadIdx.x == 0)
    return;
  __syncthreads();
}

__global__ void different_barriers() {
  if (threadIdx.x < kWarp)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void votes_without_those_who_left() {
  if (threadIdx.x < 16)
    return;
  __any_sync(kAllLanes, 1);
}

__global__ void half_a_warp() {
  if (threadIdx.x < 16)
    __shfl_sync(0xffffu, 1, 0);
}

__global__ void lanes_apart() {
  if (threadIdx.x % 2)
    __ballot_sync(kAllLanes, 1);
  else
    __syncwarp();
}

__global__ void waits_for_ever(const int* never) {
  while (load_relaxed(never) == 0)
    pause();
}

__global__ void reads_before_the_copy_is_there(const uint4* from, unsigned* sum) {
  unsigned* shared = dynamic_shared<unsigned>();
  copy_async(&shared[4 * threadIdx.x], &from[threadIdx.x]);
  copy_async_commit();
  atomicAdd(sum, shared[4 * threadIdx.x]);
  copy_async_wait<0>();
}

// Sees its own copies, but not for sure those of others.
__global__ void reads_what_another_copied(const uint4* from, unsigned* sum) {
  unsigned* shared = dynamic_shared<unsigned>();
  copy_async(&shared[4 * threadIdx.x], &from[threadIdx.x]);
  copy_async_commit();
  copy_async_wait<0>();
  atomicAdd(sum, shared[4 * (threadIdx.x ^ 32)]);
}

__global__ void copies_from_between(const uint4* from) {
  copy_async(dynamic_shared<uint4>(), reinterpret_cast<const char*>(from) + 8);
}

// Right only where threads run in order.
__global__ void races(int* last) {
  *last = int(threadIdx.x);
}

// Right where the first threads run first, and nothing but the two barriers orders them.
__global__ void reads_what_is_being_written(int* sum) {
  int* shared = dynamic_shared<int>();
  __syncthreads();
  if (threadIdx.x == 0)
    *shared = 1;
  if (threadIdx.x == 40)
    *sum = *shared;
  __syncthreads();
}

__global__ void nothing() {}

// Whether the sum over copied ones is what it has to be.
int sum_of_copies(void (*kernel)(const uint4*, unsigned*)) {
  const std::vector<uint4> ones(64, uint4{1, 1, 1, 1});
  unsigned sum = 0;
  launch(kernel, dim3(1), dim3(64), 1024, nullptr, ones.data(), &sum);
  return sum == 64 ? 0 : 1;
}

int check(const std::string& mistake) {
  if (mistake == "none") {
    std::vector<int> values(8 * 96);
    std::iota(values.begin(), values.end(), 0);
    int sum = 0, turn = 0;
    launch(chained_sum, dim3(8), dim3(96), 3 * sizeof(int), nullptr, values.data(), &sum, &turn);
    return sum == std::accumulate(values.begin(), values.end(), 0) ? 0 : 1;
  }
  if (mistake == "left")
    launch(leaves_others_at_a_barrier, dim3(1), dim3(64), 0, nullptr);
  if (mistake == "barriers")
    launch(different_barriers, dim3(1), dim3(64), 0, nullptr);
  if (mistake == "vote")
    launch(votes_without_those_who_left, dim3(1), dim3(32), 0, nullptr);
  if (mistake == "half")
    launch(half_a_warp, dim3(1), dim3(32), 0, nullptr);
  if (mistake == "apart")
    launch(lanes_apart, dim3(1), dim3(32), 0, nullptr);
  if (mistake == "forever") {
    const int never = 0;
    launch(waits_for_ever, dim3(1), dim3(32), 0, nullptr, &never);
  }
  if (mistake == "early")
    return sum_of_copies(reads_before_the_copy_is_there);
  if (mistake == "others")
    return sum_of_copies(reads_what_another_copied);
  if (mistake == "between") {
    const uint4 two[2] = {};
    launch(copies_from_between, dim3(1), dim3(32), 16, nullptr, two);
  }
  if (mistake == "race") {
    int last = 0;
    launch(races, dim3(1), dim3(64), 0, nullptr, &last);
    return last == 63 ? 0 : 1;
  }
  if (mistake == "between barriers") {
    int sum = 0;
    launch(reads_what_is_being_written, dim3(1), dim3(64), sizeof(int), nullptr, &sum);
    return sum == 1 ? 0 : 1;
  }
  if (mistake == "shared")
    launch(nothing, dim3(1), dim3(32), 300 << 10, nullptr);
  if (mistake == "threads")
    launch(nothing, dim3(1), dim3(33), 0, nullptr);
  if (mistake == "empty")
    launch(nothing, dim3(0), dim3(32), 0, nullptr);
  if (mistake == "tall")
    launch(nothing, dim3(1, 1 << 16), dim3(32), 0, nullptr);
  return 0;
}

}  // namespace
}  // namespace confprune::cuda

int main(int, char** arguments) {
  lockstep::settings().seed = unsigned(std::atoi(arguments[2]));
  return confprune::cuda::check(arguments[1]);
}
