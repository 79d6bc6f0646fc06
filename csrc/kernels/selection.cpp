#include "kernels/selection.h"

#include "kernels/prefix_index.h"

namespace confprune {
namespace {

// Adds all keys to the counters of their bits above `shift`. A key waits for its counter, and is
// waited for by few others: so the loop runs at one counter a cycle where memory keeps ahead.
template <class K, class T, class Shift, class Count>
void count_all(const T* x, int64_t n, Shift shift, Count* counts) {
  constexpr int kLine = 64 / int(sizeof(T));  // elements of a cache line
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(x + i + kAhead);
#pragma GCC unroll 8
    for (int j = 0; j < kLine; j += 4) {  // read before the counting, which may alias it
      const auto a = K::of(x[i + j]), b = K::of(x[i + j + 1]);
      const auto c = K::of(x[i + j + 2]), d = K::of(x[i + j + 3]);
      ++counts[a >> shift];
      ++counts[b >> shift];
      ++counts[c >> shift];
      ++counts[d >> shift];
    }
  }
  for (; i < n; ++i)
    ++counts[K::of(x[i]) >> shift];
}

template <class Count>
void histogram_any(const Source& source, Blocks& blocks, const Digit& digit, Count* counts) {
  dispatch(source.element, digit.key, [&](auto element, auto key_tag) {
    using T = decltype(element);
    using K = Key<key_tag()>;
    using Bits = typename K::Bits;
    const int shift = digit.shift;
    int64_t begin, end;
    if (digit.prefixes.empty()) {
      const std::integral_constant<int, table_shift(K::kBits)> usual;
      while (blocks.take(&begin, &end))
        for_chunks<T>(source, begin, end, [=](int64_t, const T* x, int64_t n) {
          if (shift == usual)
            count_all<K>(x, n, usual, counts);
          else
            count_all<K>(x, n, shift, counts);
        });
      return;
    }
    const int above = shift + digit.digit_bits;
    const uint64_t mask = (uint64_t(1) << digit.digit_bits) - 1;
    const PrefixIndex index(digit.prefixes, digit.key, above);
    while (blocks.take(&begin, &end))
      for_filtered<T, K>(source, begin, end, index, [&](const Bits* keys, int64_t n) {
        index.for_known(keys, n, [&](Bits key, int32_t row) {
          ++counts[(int64_t(row) << digit.digit_bits) + int64_t((key >> shift) & mask)];
        });
      });
  });
}

}  // namespace

int key_bits(Element element) {
  switch (element) {
    case Element::float32:
      return Key<Element::float32>::kBits;
    case Element::float64:
      return Key<Element::float64>::kBits;
    default:
      return Key<Element::float16>::kBits;
  }
}

void histogram(const Source& source, Blocks& blocks, const Digit& digit, uint32_t* counts) {
  histogram_any(source, blocks, digit, counts);
}

void histogram(const Source& source, Blocks& blocks, const Digit& digit, int64_t* counts) {
  histogram_any(source, blocks, digit, counts);
}

void collect(const Source& source, Blocks& blocks, const Brackets& brackets, int64_t* below,
             std::vector<int64_t>* keys) {
  const PrefixIndex index(brackets.prefixes, brackets.key, brackets.shift);
  dispatch(source.element, brackets.key, [&](auto element, auto key_tag) {
    using K = Key<key_tag()>;
    using Bits = typename K::Bits;
    struct Bracket {
      Bits low, size;
    };
    std::vector<Bracket> table;
    for (size_t row = 0; row < brackets.prefixes.size(); ++row) {
      constexpr int64_t last = int64_t((uint64_t(1) << K::kBits) - 1);
      const int64_t low = std::clamp<int64_t>(brackets.low[row], 0, last);
      const int64_t high = std::min(last, brackets.high[row]);
      table.push_back({Bits(low), high < low ? Bits(0) : Bits(Bits(high) - Bits(low) + 1)});
    }
    const auto look = [&, bracket = table.data()](const Bits* candidates, int64_t n) {
      Bits kept[kBatchRoom];
      int64_t size = 0;
      index.for_known(candidates, n, [&](Bits key, int32_t row) {
        const auto [low, width] = bracket[row];
        below[row] += key < low;
        kept[size] = key;
        size += Bits(key - low) < width;  // one under the bracket wraps to a large number
      });
      keys->insert(keys->end(), kept, kept + size);
    };
    int64_t begin, end;
    while (int64_t(keys->size()) <= brackets.limit && blocks.take(&begin, &end))
      for_filtered<decltype(element), K>(source, begin, end, index, look);
  });
}

}  // namespace confprune
