// csrc/cuda/selection.h and levels.h for ctypes: their scratch memory comes from here.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/levels.h"
#include "cuda/selection.h"

namespace {

using confprune::Element;
namespace cuda = confprune::cuda;

// Scratch memory of just the size that was asked for, with rubbish in it.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(std::aligned_alloc(256, bytes)) {
    std::memset(bytes_, 0xa5, bytes);
  }
  Memory(const Memory&) = delete;
  ~Memory() { std::free(bytes_); }
  void* get() const { return bytes_; }

 private:
  void* bytes_;
};

std::vector<cuda::Scores> scores_of(void** data, const int* element, const int64_t* size,
                                    int64_t count) {
  std::vector<cuda::Scores> scores;
  for (int64_t i = 0; i < count; ++i)
    scores.push_back({data[i], Element(element[i]), size[i]});
  return scores;
}

}  // namespace

extern "C" {

void configure(int multiprocessors, int shared_bytes, int resident, unsigned seed) {
  lockstep::settings() = {multiprocessors, shared_bytes, resident, seed};
}

void cuda_select(void** data, const int* element, const int64_t* size, int64_t tensors, int key,
                 const int64_t* rank, int64_t ranks, int64_t* keys, int64_t* below, int64_t* equal,
                 int64_t* nan) {
  const auto scores = scores_of(data, element, size, tensors);
  const Memory scratch(cuda::select_scratch(tensors, ranks));
  cuda::select(scores.data(), tensors, Element(key), rank, ranks, {keys, below, equal, nan},
               scratch.get(), nullptr);
}

void cuda_assign(void** data, const int* element, const int64_t* size, int64_t tensors, int key,
                 const int64_t* values, int64_t cuts, const int64_t* first_level,
                 const int64_t* ties, int64_t num_levels, const bool* straddled, int64_t* ranks,
                 void** levels) {
  std::vector<cuda::Levelled> levelled;
  for (const cuda::Scores& scores : scores_of(data, element, size, tensors))
    levelled.push_back({scores, levels[levelled.size()]});
  const cuda::Cuts at{Element(key), cuts, num_levels, values, first_level, ties, straddled};
  const Memory scratch(cuda::assign_scratch(levelled.data(), tensors, at));
  cuda::assign(levelled.data(), tensors, at, ranks, scratch.get(), nullptr);
}

void cuda_histogram(void* data, int element, int64_t size, int key, int shift, int digit_bits,
                    const int64_t* prefixes, int64_t rows, int64_t* counts) {
  cuda::histogram({data, Element(element), size}, {Element(key), shift, digit_bits, prefixes, rows},
                  counts, nullptr);
}

void cuda_collect(void* data, int element, int64_t size, int key, int shift,
                  const int64_t* prefixes, const int64_t* low, const int64_t* high, int64_t rows,
                  int64_t capacity, int64_t* keys, int64_t* found, int64_t* below) {
  cuda::collect({data, Element(element), size}, {Element(key), shift, prefixes, low, high, rows},
                capacity, keys, found, below, nullptr);
}
}
