// Sorting keys, digit by digit from the lowest (radix sort): a few reads and writes of each, and no
// comparison for the processor to guess. A digit that all keys share is passed over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace confprune {

// Sorts keys of so many bits, increasing.
inline void sort_keys(std::vector<int64_t>* keys, int bits) {
  constexpr int kDigit = 11;  // bits: the counters stay in a first-level cache
  constexpr size_t kCells = size_t(1) << kDigit;
  constexpr size_t kFew = 512;  // are sorted before the counters are cleared
  if (keys->size() < kFew)
    return std::sort(keys->begin(), keys->end());
  std::vector<int64_t> other(keys->size());
  std::vector<size_t> places(kCells);
  for (int shift = 0; shift < bits; shift += kDigit) {
    const auto digit = [shift](int64_t key) { return size_t(key >> shift) & (kCells - 1); };
    std::fill(places.begin(), places.end(), 0);
    for (const int64_t key : *keys)
      ++places[digit(key)];
    if (places[digit(keys->front())] == keys->size())
      continue;
    size_t next = 0;
    for (size_t& place : places) {
      const size_t count = place;
      place = next;
      next += count;
    }
    for (const int64_t key : *keys)
      other[places[digit(key)]++] = key;
    keys->swap(other);
  }
}

}  // namespace confprune
