// Runs one selection kernel on weights like a network's, for instructions.py to count its
// instructions: instructions histogram|assign float32|bfloat16 N. Only what the functions
// `counted_*` call is counted.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/selection.h"

using namespace confprune;

namespace {

constexpr int kLevels = 100;

// Sparsities j / kLevels, as select() in confprune/selection.py cuts them.
Cuts cuts_of(Element element, std::vector<uint64_t> keys) {
  std::sort(keys.begin(), keys.end());
  Cuts cuts{element, {}, {}, {}, {}};
  for (int level = 0; level < kLevels; ++level) {
    const int64_t count = int64_t(keys.size()) * level / kLevels;
    cuts.ties.push_back(0);
    if (count == 0)
      continue;
    const uint64_t key = keys[count - 1];
    const auto [first, last] = std::equal_range(keys.begin(), keys.end(), key);
    cuts.ties.back() = count - (first - keys.begin());
    if (!cuts.values.empty() && cuts.values.back() == key)
      continue;
    cuts.values.push_back(key);
    cuts.first_level.push_back(level);
    cuts.straddled.push_back(cuts.ties.back() < last - first);
  }
  cuts.first_level.push_back(kLevels);
  return cuts;
}

}  // namespace

extern "C" __attribute__((noinline)) void counted_histogram(const Source& source, int64_t n,
                                                            const Digit& digit, uint32_t* counts) {
  Blocks all(0, n, n);
  histogram(source, all, digit, counts);
}

extern "C" __attribute__((noinline)) void counted_assign(const Source& source, int64_t n,
                                                         const CutTable& table, int64_t* ranks,
                                                         uint8_t* levels) {
  table.assign(source, 0, n, ranks, levels);
}

int main(int arguments, char** argument) {
  if (arguments != 4)
    return 2;
  const bool wide = std::strcmp(argument[2], "float32") == 0;
  const Element element = wide ? Element::float32 : Element::bfloat16;
  const int64_t n = std::atoll(argument[3]);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> weights(n);
  std::vector<BFloat16> narrow_weights(n);
  std::vector<uint64_t> keys(n);
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = normal(random);
    narrow(weights[i], &narrow_weights[i]);
    keys[i] =
        wide ? bit_cast<uint32_t>(weights[i]) & 0x7fffffffu : narrow_weights[i].bits & 0x7fffu;
  }
  Source source{};
  source.data = wide ? static_cast<const void*>(weights.data()) : narrow_weights.data();
  source.element = element;
  source.dims = 1;
  source.sizes[0] = n;
  source.strides[0] = 1;
  source.contiguous = true;

  if (std::strcmp(argument[1], "histogram") == 0) {
    const int digit_bits = std::min(17, key_bits(element));
    std::vector<uint32_t> counts(size_t(1) << digit_bits);
    counted_histogram(source, n, {element, key_bits(element) - digit_bits, digit_bits, {}},
                      counts.data());
    return counts[0] > n;
  }
  const CutTable table(cuts_of(element, keys));
  std::vector<int64_t> ranks(table.cuts().values.size());
  std::vector<uint8_t> levels(n);
  counted_assign(source, n, table, ranks.data(), levels.data());
  return levels[0] > kLevels;
}
