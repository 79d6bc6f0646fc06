// Which of a few prefixes a key has, and the few keys among many that have one: the second look.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels/instruction_set.h"
#include "kernels/selection_keys.h"

namespace confprune {
namespace {  // internal linkage, as elements.h

// Finds the row of a key's prefix: a table over the prefix's own high bits gives the first
// candidate.
class PrefixIndex {
 public:
  // The prefixes are a key's bits above `shift`.
  PrefixIndex(const std::vector<uint64_t>& prefixes, Element key, int shift)
      : prefixes_(prefixes),
        table_shift_(std::max(shift, table_shift(key_bits(key)))),
        shift_(shift),
        first_(size_t(1) << (key_bits(key) - table_shift_), -1),
        holds_(first_.size(), 0),
        window_{} {
    const int between = table_shift_ - shift_;
    for (size_t i = prefixes.size(); i-- > 0;) {
      first_[prefixes[i] >> between] = int32_t(i);
      holds_[prefixes[i] >> between] = 1;
    }
    if (prefixes.empty() || key != Element::float32)
      return;
    const uint32_t top = uint32_t(prefixes.back() >> between);
    const uint32_t base = std::max(top, KeyWindow::kBins - 2) - (KeyWindow::kBins - 2);
    window_.shift = table_shift_;
    window_.base = base << table_shift_;
    for (uint64_t prefix : prefixes) {
      const uint32_t bin = std::max(uint32_t(prefix >> between), base) - base;
      window_.flags[bin / 16] |= uint16_t(1u << (bin % 16));
    }
  }

  // Writes the keys that may have a known prefix to `found`, in order; returns their number.
  template <class K, class T, class Bits>
  int64_t filter(const T* x, int64_t count, Bits* found) const {
    if constexpr (std::is_same<T, float>::value && sizeof(Bits) == sizeof(float))
      if (const KeyFilter vectorised = instruction_set().filter)
        return vectorised(x, count, window_, found);
    const uint8_t* const holds = holds_.data();
    const int shift = table_shift_;
    int64_t size = 0;
    for (int64_t i = 0; i < count; ++i) {  // without a branch: what is not wanted is overwritten
      const Bits key = K::of(x[i]);
      found[size] = key;
      size += holds[key >> shift];
    }
    return size;
  }

  // Calls body(key, row) for those of `count` keys that have a known prefix.
  template <class Bits, class Body>
  void for_known(const Bits* keys, int64_t count, Body body) const {
    const int32_t* const first = first_.data();
    const int shift = table_shift_;
    if (shift == shift_) {
      for (int64_t i = 0; i < count; ++i)
        if (const int32_t row = first[keys[i] >> shift]; row >= 0)
          body(keys[i], row);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t candidate = first[keys[i] >> shift];
      if (candidate < 0)
        continue;
      if (const int32_t row = search(candidate, keys[i] >> shift_); row >= 0)
        body(keys[i], row);
    }
  }

 private:
  // The row of a prefix, which is none before `row`; or -1.
  int32_t search(int32_t row, uint64_t prefix) const {
    const int32_t size = int32_t(prefixes_.size());
    row += prefixes_[row] < prefix;  // most bins hold one, and either side is as likely
    while (row < size && prefixes_[row] < prefix)
      ++row;
    return row < size && prefixes_[row] == prefix ? row : -1;
  }

  const std::vector<uint64_t>& prefixes_;
  int table_shift_;
  int shift_;
  std::vector<int32_t> first_;  // by bin, or -1
  std::vector<uint8_t> holds_;  // the same question in less cache
  KeyWindow window_;
};

constexpr int64_t kBatch = 2048;  // so many together pay for fetching again what tells their rows
constexpr int64_t kBatchRoom = kBatch + kChunk;

// Calls body(keys, count) with the elements that may have a known prefix, some at a time, at most
// kBatchRoom. Few may, and no branch can be predicted among them: so they are gathered without one.
template <class T, class K, class Body>
void for_filtered(const Source& source, int64_t begin, int64_t end, const PrefixIndex& index,
                  Body body) {
  typename K::Bits keys[kBatchRoom];
  int64_t size = 0;
  for_chunks<T>(source, begin, end, [&](int64_t at, const T* x, int64_t n) {
    size += index.template filter<K>(x, n, keys + size);
    if (size < kBatch && at + n < end)
      return;
    body(keys, size);
    size = 0;
  });
}

}  // namespace
}  // namespace confprune
