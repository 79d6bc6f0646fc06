// Large results in large pages, where the system gives them on request.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace confprune {

// To be called before anything is written to memory just allocated: its first touch then costs one
// fault for 2 MiB instead of 512. Only whole huge pages within the range, so that it grows by none.
inline void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = (uintptr_t(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (uintptr_t(data) + bytes) & ~(kHugePage - 1);
  if (end > begin)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // or not, as it likes
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace confprune
