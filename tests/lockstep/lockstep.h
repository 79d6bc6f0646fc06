// CUDA kernels on the CPU, for tests: stands in for the device where csrc/cuda is plain C++.
//
// Each thread of a block is a fiber that runs until it must wait: at a barrier, in an operation of
// its warp, or for another block. A few blocks are resident at once and take turns. The order of
// the turns is drawn from a seed, so that what depends on it shows. What a device would leave
// undefined stops the program with a message: operations of half a warp, lanes in different
// operations, threads at different barriers or that leave others at one, grids and shared memory
// over the limits, waiting for ever. Asynchronous copies arrive at the wait and not before.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace lockstep {

struct Settings {
  int multiprocessors = 3;
  int shared_bytes = 99 << 10;
  int resident = 2;   // blocks at once
  unsigned seed = 0;  // of the order of turns
};

inline Settings& settings() {
  static Settings current;
  return current;
}

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "lockstep: %s (block %u, thread %u)\n", reason, blockIdx.x, threadIdx.x);
  std::abort();
}

// ThreadSanitizer sees each fiber as a thread of its own, and is told what orders them on a device:
// barriers, __syncwarp and __threadfence, and the start and the end of a kernel. So it finds what
// races, whatever the order of the turns, in shared memory and between blocks.
#if defined(__SANITIZE_THREAD__)
inline void release(void* at) {
  __tsan_release(at);
}
inline void acquire(void* at) {
  __tsan_acquire(at);
}
// While one lives, what the stand-in itself reads and writes is not looked at.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
inline void release(void*) {}
inline void acquire(void*) {}
struct Unseen {
  Unseen() {}
};
#endif

enum class Operation { shuffle, vote, sync, load_matrix, multiply };

constexpr int kLanes = 32;
constexpr size_t kSlot = 64;  // bytes a lane can give to the others
constexpr size_t kStack = 256 << 10;

struct Warp {
  int arrived = 0, generation = 0;
  Operation operation = Operation::sync;
  alignas(16) unsigned char slots[2][kLanes][kSlot];
};

struct Copy {
  void* to;
  unsigned char from[16];
};

struct Block;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  const int* waits_for = nullptr;  // a generation that must differ from `seen`
  int seen = 0;
  jmp_buf jump;
  bool started = false, done = false, paused = false;
  std::vector<std::vector<Copy>> copies;  // groups of them, the last one open
  void* fake_stack = nullptr;             // AddressSanitizer's
  void* thread_state = nullptr;           // ThreadSanitizer's
};

struct Block {
  dim3 index;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  int live = 0, arrived = 0, generation = 0;
  int line = 0;  // of the barrier at which threads wait
  char order[2];
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  void run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024 || threads % kLanes != 0)
      fail("a block needs whole warps, 1024 threads at most");
    if (shared_bytes > size_t(settings().shared_bytes))
      fail("more shared memory than a block may have");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0)
      fail("an empty grid");
    if (grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu)
      fail("a larger grid than a device takes");
    release(&begun_);
    const Unseen unseen;
    kernel_ = std::move(kernel);
    gridDim = grid;
    blockDim = block;
    std::mt19937 random(settings().seed);
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    uint64_t next = 0;
    std::vector<std::unique_ptr<Block>> resident;
    for (int idle = 0; next < blocks || !resident.empty();) {
      while (next < blocks && resident.size() < size_t(std::max(1, settings().resident)))
        resident.push_back(start(grid, block, shared_bytes, next++));
      std::shuffle(resident.begin(), resident.end(), random);
      bool moved = false;
      for (auto& one : resident)
        moved |= turn(*one, random);
      idle = moved ? 0 : idle + 1;
      if (idle > 10000)
        fail("all threads wait for ever");
      resident.erase(std::remove_if(resident.begin(), resident.end(),
                                    [&](auto& one) { return finished(*one); }),
                     resident.end());
    }
    kernel_ = nullptr;
    acquire(&done_);
  }

  Fiber& current() { return *current_; }

  void wait(const int& generation) {
    current_->waits_for = &generation;
    current_->seen = generation;
    leave(false);
  }

  void pause() {
    const Unseen unseen;
    current_->paused = true;
    leave(false);
  }

  void barrier(int line) {
    const Unseen unseen;
    Block& block = *current_->block;
    // Two of them in turn: who is first at the next barrier is not ordered before who leaves this.
    char* const order = &block.order[block.generation % 2];
    release(order);
    if (block.arrived > 0 && block.line != line)
      fail("threads of one block are at different barriers");
    block.line = line;
    if (++block.arrived == int(block.fibers.size())) {
      block.arrived = 0;
      ++block.generation;
    } else {
      wait(block.generation);
    }
    acquire(order);
  }

  // Gives `mine` to the warp and returns what all lanes gave.
  template <class T>
  std::array<T, kLanes> exchange(Operation operation, const T& mine) {
    static_assert(sizeof(T) <= kSlot && std::is_trivially_copyable_v<T>, "too much for a lane");
    const Unseen unseen;
    Warp& warp = *current_->warp;
    if (warp.arrived == 0)
      warp.operation = operation;
    else if (warp.operation != operation)
      fail("lanes of one warp are in different operations");
    // Two sets of slots: who is first at the next operation must not overwrite what others read.
    auto& slots = warp.slots[warp.generation % 2];
    if (operation == Operation::sync)
      release(&slots);
    std::memcpy(slots[current_->lane], &mine, sizeof(T));
    if (++warp.arrived == kLanes) {
      warp.arrived = 0;
      ++warp.generation;
    } else {
      wait(warp.generation);
    }
    if (operation == Operation::sync)
      acquire(&slots);
    std::array<T, kLanes> all;
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(&all[lane], slots[lane], sizeof(T));
    return all;
  }

 private:
  std::unique_ptr<Block> start(dim3 grid, dim3 shape, size_t shared_bytes, uint64_t number) {
    auto block = std::make_unique<Block>();
    block->index = dim3(unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                        unsigned(number / grid.x / grid.y));
    block->shared.reset(new unsigned char[shared_bytes]);
    std::memset(block->shared.get(), 0xcd, shared_bytes);  // a device does not clear it either
    const unsigned threads = shape.x * shape.y * shape.z;
    block->live = int(threads);
    block->warps.resize(threads / kLanes);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber* fiber = take();
      fiber->thread = dim3(t % shape.x, t / shape.x % shape.y, t / shape.x / shape.y);
      fiber->block = block.get();
      fiber->warp = &block->warps[t / kLanes];
      fiber->lane = int(t % kLanes);
      block->fibers.push_back(fiber);
    }
    return block;
  }

  Fiber* take() {
    if (free_.empty()) {
      all_.push_back(std::make_unique<Fiber>());
      all_.back()->stack.reset(new char[kStack]);
#if defined(__SANITIZE_THREAD__)
      all_.back()->thread_state = __tsan_create_fiber(0);
#endif
      free_.push_back(all_.back().get());
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    fiber->waits_for = nullptr;
    fiber->started = fiber->done = fiber->paused = false;
    fiber->copies.assign(1, {});
    fiber->fake_stack = nullptr;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, &Machine::enter, 0);
    return fiber;
  }

  // Lets each thread of a block run once; whether one of them did more than to wait.
  bool turn(Block& block, std::mt19937& random) {
    bool moved = false;
    order_.resize(block.fibers.size());
    for (size_t i = 0; i < order_.size(); ++i)
      order_[i] = block.fibers[i];
    // Mostly in order, as devices do; then backwards; then any how.
    if (random() % 3 == 1)
      std::reverse(order_.begin(), order_.end());
    else if (random() % 3 == 2)
      std::shuffle(order_.begin(), order_.end(), random);
    for (Fiber* fiber : order_) {
      if (fiber->done || (fiber->waits_for && *fiber->waits_for == fiber->seen))
        continue;
      fiber->waits_for = nullptr;
      fiber->paused = false;
      resume(fiber);
      moved |= !fiber->paused;
    }
    if (block.arrived > 0 && block.live < int(block.fibers.size()))
      fail("a thread has left while others wait at a barrier");
    return moved;
  }

  bool finished(Block& block) {
    if (block.live > 0)
      return false;
    free_.insert(free_.end(), block.fibers.begin(), block.fibers.end());
    return true;
  }

  void resume(Fiber* fiber) {
    current_ = fiber;
    threadIdx = fiber->thread;
    blockIdx = fiber->block->index;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber->stack.get(), kStack);
    swapcontext(&home_, &fiber->context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#elif defined(__SANITIZE_THREAD__)
    home_state_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber->thread_state, __tsan_switch_to_fiber_no_sync);
    swapcontext(&home_, &fiber->context);
#else
    // A context is only for the start: it saves the mask of signals too, which takes a system call.
    if (_setjmp(home_jump_) != 0)
      return;
    if (fiber->started)
      _longjmp(fiber->jump, 1);
    fiber->started = true;
    setcontext(&fiber->context);
#endif
  }

  __attribute__((no_sanitize("thread"))) void leave(bool for_good) {
    Fiber* fiber = current_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber->fake_stack, home_stack_,
                                   home_size_);
    swapcontext(&fiber->context, &home_);
    __sanitizer_finish_switch_fiber(fiber->fake_stack, &home_stack_, &home_size_);
#elif defined(__SANITIZE_THREAD__)
    (void)for_good;
    __tsan_switch_to_fiber(home_state_, __tsan_switch_to_fiber_no_sync);
    swapcontext(&fiber->context, &home_);
#else
    if (for_good)
      _longjmp(home_jump_, 1);
    if (_setjmp(fiber->jump) == 0)
      _longjmp(home_jump_, 1);
#endif
  }

  void end() {
    const Unseen unseen;
    current_->done = true;
    --current_->block->live;
  }

  __attribute__((no_sanitize("thread"))) static void enter() {
    Machine& machine = instance();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.home_stack_, &machine.home_size_);
#endif
    acquire(&machine.begun_);
    machine.kernel_();
    release(&machine.done_);
    machine.end();
    machine.leave(true);
  }

  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_, order_;
  Fiber* current_ = nullptr;
  ucontext_t home_;
  jmp_buf home_jump_;
  const void* home_stack_ = nullptr;
  size_t home_size_ = 0;
  void* home_state_ = nullptr;
  char begun_ = 0, done_ = 0;  // what ThreadSanitizer knows launches by
};

template <class T>
std::array<T, kLanes> exchange(Operation operation, const T& mine) {
  return Machine::instance().exchange(operation, mine);
}

inline int lane() {
  const Unseen unseen;
  return Machine::instance().current().lane;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
  Machine::instance().run(grid, block, shared_bytes,
                          [&] { kernel(static_cast<Parameters>(arguments)...); });
}

inline void clear(void* memory, size_t bytes, cudaStream_t) {
  std::memset(memory, 0, bytes);
}

template <class T>
T* dynamic_shared() {
  const Unseen unseen;
  return reinterpret_cast<T*>(Machine::instance().current().block->shared.get());
}

template <class T>
T load_relaxed(const T* address) {
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}
template <class T>
void store_relaxed(T* address, T value) {
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
}

inline void pause() {
  Machine::instance().pause();
}

inline void copy_async_or_zero(void* shared, const void* global, bool copy) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail("an asynchronous copy of bytes that are not aligned to 16");
  Copy bytes{shared, {}};
  if (copy)
    std::memcpy(bytes.from, global, 16);
  std::memset(shared, 0xcd, 16);  // nothing is there before the wait
  const Unseen unseen;
  Machine::instance().current().copies.back().push_back(bytes);
}
inline void copy_async(void* shared, const void* global) {
  copy_async_or_zero(shared, global, true);
}
inline void copy_async_commit() {
  const Unseen unseen;
  Machine::instance().current().copies.emplace_back();
}
template <int kPending>
void copy_async_wait() {
  auto& groups = Machine::instance().current().copies;
  while (groups.size() > size_t(kPending) + 1) {
    for (const Copy& copy : groups.front())
      std::memcpy(copy.to, copy.from, 16);
    const Unseen unseen;
    groups.erase(groups.begin());
  }
}

inline void whole_warp(unsigned mask) {
  if (mask != 0xffffffffu)
    fail("an operation of a part of a warp");
}

}  // namespace lockstep

// The intrinsics, by their own names.

inline void __syncthreads(int line = __builtin_LINE()) {
  lockstep::Machine::instance().barrier(line);
}
inline void __syncwarp() {
  lockstep::exchange(lockstep::Operation::sync, 0);
}
inline void __threadfence() {
  static char fence;
  lockstep::acquire(&fence);
  lockstep::release(&fence);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  lockstep::whole_warp(mask);
  return lockstep::exchange(lockstep::Operation::shuffle, value)[from & 31];
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  lockstep::whole_warp(mask);
  const int lane = lockstep::lane(), from = lane - int(by);
  return lockstep::exchange(lockstep::Operation::shuffle, value)[from < 0 ? lane : from];
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  lockstep::whole_warp(mask);
  const int lane = lockstep::lane(), from = lane + int(by);
  return lockstep::exchange(lockstep::Operation::shuffle, value)[from > 31 ? lane : from];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  lockstep::whole_warp(mask);
  const int lane = lockstep::lane();
  return lockstep::exchange(lockstep::Operation::shuffle, value)[(lane ^ by) & 31];
}

inline unsigned __ballot_sync(unsigned mask, int condition) {
  lockstep::whole_warp(mask);
  const auto all = lockstep::exchange(lockstep::Operation::vote, condition);
  unsigned result = 0;
  for (int lane = 0; lane < lockstep::kLanes; ++lane)
    result |= unsigned(all[lane] != 0) << lane;
  return result;
}
inline int __any_sync(unsigned mask, int condition) {
  return __ballot_sync(mask, condition) != 0;
}
inline int __all_sync(unsigned mask, int condition) {
  return __ballot_sync(mask, condition) == 0xffffffffu;
}

inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __popcll(unsigned long long value) {
  return __builtin_popcountll(value);
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(unsigned(value));
}
inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll((unsigned long long)value);
}

// Four bytes of the eight of `y` and `x`, chosen by the digits of `choice`.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned choice) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= unsigned(bytes >> (8 * (choice >> 4 * i & 7)) & 0xff) << 8 * i;
  return result;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

// One thread of the CPU runs all: what it reads, changes and writes in one step is atomic.
template <class T, class Change>
T atomic_step(T* address, Change change) {
  const T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, T(change(old)), __ATOMIC_RELAXED);
  return old;
}
template <class T>
T atomicAdd(T* address, T value) {
  return atomic_step(address, [&](T old) { return old + value; });
}
template <class T>
T atomicMax(T* address, T value) {
  return atomic_step(address, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* address, T value) {
  return atomic_step(address, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicOr(T* address, T value) {
  return atomic_step(address, [&](T old) { return old | value; });
}
template <class T>
T atomicExch(T* address, T value) {
  return atomic_step(address, [&](T) { return value; });
}
