#include "kernels/selection.h"

#include "kernels/prefix_index.h"

namespace confprune {
namespace {

constexpr int64_t kStep = 64 * kChunk;  // elements between two looks at a limit

// Adds all keys to the counters of their bits above `shift`. A key waits for its counter, and is
// waited for by few others: so the loop runs at one counter a cycle where memory keeps ahead.
template <class K, class T, class Shift, class Count>
void count_all(const T* x, int64_t n, Shift shift, Count* counts) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {  // read ahead of the counting, which may alias what is read
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAhead);
    const auto a = K::of(x[i]), b = K::of(x[i + 1]);
    const auto c = K::of(x[i + 2]), d = K::of(x[i + 3]);
    ++counts[a >> shift];
    ++counts[b >> shift];
    ++counts[c >> shift];
    ++counts[d >> shift];
  }
  for (; i < n; ++i)
    ++counts[K::of(x[i]) >> shift];
}

template <class Count>
void histogram_any(const Source& source, int64_t begin, int64_t end, const Digit& digit,
                   Count* counts) {
  dispatch(source.element, digit.key, [&](auto element, auto key_tag) {
    using T = decltype(element);
    using K = Key<key_tag()>;
    const int shift = digit.shift;
    if (digit.prefixes.empty())
      return for_chunks<T>(source, begin, end, [=](int64_t, const T* x, int64_t n) {
        const std::integral_constant<int, table_shift(K::kBits)> usual;
        if (shift == usual)
          count_all<K>(x, n, usual, counts);
        else
          count_all<K>(x, n, shift, counts);
      });
    const int above = shift + digit.digit_bits;
    const uint64_t mask = (uint64_t(1) << digit.digit_bits) - 1;
    const PrefixIndex index(digit.prefixes, digit.key, above);
    for_prefixed<T, K>(
        source, begin, end, index, [&](const auto* keys, const int32_t* rows, int64_t n) {
          for (int64_t i = 0; i < n; ++i)
            ++counts[(int64_t(rows[i]) << digit.digit_bits) + int64_t((keys[i] >> shift) & mask)];
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

void histogram(const Source& source, int64_t begin, int64_t end, const Digit& digit,
               uint32_t* counts) {
  histogram_any(source, begin, end, digit, counts);
}

void histogram(const Source& source, int64_t begin, int64_t end, const Digit& digit,
               int64_t* counts) {
  histogram_any(source, begin, end, digit, counts);
}

void collect(const Source& source, int64_t begin, int64_t end, const Brackets& brackets,
             int64_t* below, std::vector<int64_t>* keys) {
  const PrefixIndex index(brackets.prefixes, brackets.key, brackets.shift);
  const int64_t *const low = brackets.low, *const high = brackets.high;
  const auto look = [&](const auto* candidates, const int32_t* rows, int64_t n) {
    int64_t kept[kBatchRoom];
    int64_t size = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t key = int64_t(candidates[i]), row = rows[i];
      below[row] += key < low[row];
      kept[size] = key;
      size += (key >= low[row]) & (key <= high[row]);
    }
    keys->insert(keys->end(), kept, kept + size);
  };
  dispatch(source.element, brackets.key, [&](auto element, auto key_tag) {
    for (int64_t at = begin; at < end && int64_t(keys->size()) <= brackets.limit; at += kStep)
      for_prefixed<decltype(element), Key<key_tag()>>(source, at, std::min(end, at + kStep), index,
                                                      look);
  });
}

}  // namespace confprune
