// torch.ops.confprune: thresholds and prune levels; schemas, argument checks, and dispatch to the
// kernels.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "arguments.h"
#include "kernels/key_sort.h"
#include "kernels/selection.h"

namespace confprune {
namespace {

using at::Tensor;

constexpr int64_t kSerial = 1 << 16;  // elements below which threads cost more than they save
constexpr int64_t kFlush = int64_t(1) << 31;  // elements a 32-bit counter is trusted with
constexpr int64_t kBlock = 1 << 18;      // elements handed out at a time: starting one costs little
constexpr int64_t kElementsPerCut = 64;  // of a block, which has a counter for each cut
constexpr int64_t kCellsAdded = 1 << 14;  // by a thread at least

Source source_of(const Tensor& tensor, const char* argument) {
  TORCH_CHECK_VALUE(tensor.dim() <= Source::kMaxDims, argument, " has ", tensor.dim(),
                    " dimensions; at most ", Source::kMaxDims, " are supported");
  Source source{};
  source.data = tensor.const_data_ptr();
  source.element = element_of(tensor.scalar_type(), argument);
  source.dims = int(tensor.dim());
  source.contiguous = tensor.is_contiguous();
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    source.sizes[d] = tensor.size(d);
    source.strides[d] = tensor.stride(d);
  }
  return source;
}

int64_t threads_for(int64_t size) {
  return size < kSerial ? 1 : at::get_num_threads();
}

// Elements of a block of so many that all threads share.
int64_t block_of(int64_t size) {
  return std::clamp(size / (8 * threads_for(size)), kSerial / 8, kBlock);
}

// Calls body(blocks) once for each thread; together they take all blocks of [begin, end).
template <class Body>
void share(int64_t begin, int64_t end, int64_t block, Body body) {
  const int64_t threads = threads_for(end - begin);
  Blocks blocks(begin, end, block);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      body(blocks);
  });
}

std::vector<uint64_t> prefixes_of(const Tensor& prefixes, int bits) {
  const int64_t* data = int64_data(prefixes, "prefixes");
  for (int64_t i = 0; i < prefixes.numel(); ++i)
    TORCH_CHECK_VALUE(data[i] >= 0 && data[i] >> bits == 0 && (i == 0 || data[i] > data[i - 1]),
                      "prefixes must be increasing numbers of ", bits, " bits, got ", data[i]);
  return {data, data + prefixes.numel()};
}

void magnitude_histogram(const Tensor& scores, at::ScalarType key, const Tensor& prefixes,
                         int64_t shift, int64_t digit_bits, Tensor& counts) {
  const Element key_element = check_digit(scores, key, prefixes, shift, digit_bits, counts);
  const int prefix_bits = key_bits(key_element) - int(shift) - int(digit_bits);
  const int64_t cells = counts.numel(), size = scores.numel();
  const Digit digit{key_element, int(shift), int(digit_bits), prefixes_of(prefixes, prefix_bits)};
  const Source source = source_of(scores, "scores");
  int64_t* total = counts.data_ptr<int64_t>();
  if (size < kSerial) {
    Blocks all(0, size, size);
    return histogram(source, all, digit, total);
  }
  for (int64_t at = 0; at < size; at += kFlush) {
    std::mutex adding;
    std::vector<std::unique_ptr<uint32_t[]>> parts;
    share(at, std::min(size, at + kFlush), block_of(size), [&](Blocks& blocks) {
      std::unique_ptr<uint32_t[]> own(new uint32_t[cells]());
      histogram(source, blocks, digit, own.get());
      const std::lock_guard<std::mutex> lock(adding);
      parts.push_back(std::move(own));
    });
    at::parallel_for(0, cells, kCellsAdded, [&](int64_t begin, int64_t end) {
      for (const auto& part : parts)
        for (int64_t cell = begin; cell < end; ++cell)
          total[cell] += part[cell];
    });
  }
}

Tensor magnitude_collect(const Tensor& scores, at::ScalarType key, const Tensor& prefixes,
                         int64_t shift, const Tensor& low, const Tensor& high, int64_t limit,
                         Tensor& below) {
  const Element key_element = check_brackets(scores, key, prefixes, shift, low, high, below);
  const int bits = key_bits(key_element);
  std::vector<uint64_t> wanted = prefixes_of(prefixes, bits - int(shift));
  const int64_t size = prefixes.numel();
  const Brackets brackets{
      key_element, int(shift), std::move(wanted), int64_data(low, "low"), int64_data(high, "high"),
      limit};
  const Source source = source_of(scores, "scores");
  int64_t* total = below.data_ptr<int64_t>();
  std::vector<int64_t> found;
  std::mutex adding;
  share(0, scores.numel(), block_of(scores.numel()), [&](Blocks& blocks) {
    std::vector<int64_t> under(size, 0), own;
    collect(source, blocks, brackets, under.data(), &own);
    const std::lock_guard<std::mutex> lock(adding);
    found.insert(found.end(), own.begin(), own.end());
    for (int64_t i = 0; i < size; ++i)
      total[i] += under[i];
  });
  sort_keys(&found, bits);
  Tensor result = at::empty({int64_t(found.size())}, prefixes.options());
  std::copy(found.begin(), found.end(), result.data_ptr<int64_t>());
  return result;
}

CutTable cut_table(at::TensorList scores, at::ScalarType key, const Tensor& thresholds,
                   const Tensor& first_level, const Tensor& ties, const Tensor& straddled,
                   const Tensor& ranks) {
  const int64_t cuts_size = thresholds.numel(), num_levels = ties.numel();
  Cuts cuts;
  cuts.key = check_cuts(scores, key, thresholds, first_level, ties, straddled, ranks);
  const int64_t* values = int64_data(thresholds, "thresholds");
  const int64_t* first = int64_data(first_level, "first_level");
  const int64_t* tie = int64_data(ties, "ties");
  cuts.values.assign(values, values + cuts_size);
  cuts.first_level.assign(first, first + cuts_size + 1);
  cuts.ties.assign(tie, tie + num_levels);
  const bool* flags = straddled.const_data_ptr<bool>();
  cuts.straddled.assign(flags, flags + cuts_size);
  const int bits = key_bits(cuts.key);
  for (int64_t cut = 0; cut < cuts_size; ++cut)
    TORCH_CHECK_VALUE(
        values[cut] >= 0 && values[cut] >> bits == 0 && (cut == 0 || values[cut] > values[cut - 1]),
        "thresholds must be increasing keys of ", bits, " bits, got ", values[cut]);
  for (int64_t cut = 0; cut <= cuts_size; ++cut)
    TORCH_CHECK_VALUE(first[cut] >= (cut == 0 ? 0 : first[cut - 1]) && first[cut] <= num_levels,
                      "first_level must not decrease, in [0, ", num_levels, "], got ", first[cut]);
  return CutTable(std::move(cuts));
}

// Asks for the memory of a large new tensor in large pages: the first write to each of the small
// ones costs more than everything that is written to it.
void ask_for_large_pages(const Tensor& fresh) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t data = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + fresh.nbytes()) / kPage * kPage;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: it may fail
#endif
}

// Writes the prune levels of `size` elements; the ranks are advanced.
template <class Level>
void assign(const Source& source, int64_t size, const CutTable& table, int64_t* ranks,
            Level* levels) {
  if (threads_for(size) == 1)
    return table.assign(source, 0, size, ranks, levels);
  // Ties are broken by position, so they wait until it is known how many stand before each block.
  const int64_t cuts_size = int64_t(table.cuts().values.size());
  const int64_t block = std::max(block_of(size), kElementsPerCut * cuts_size);
  std::vector<Ties> ties((size + block - 1) / block);
  share(0, size, block, [&](Blocks& blocks) {
    for (int64_t begin, end; blocks.take(&begin, &end);)
      table.assign_untied(source, begin, end, &ties[begin / block], levels);
  });
  if (!table.any_straddled())
    return;
  for (Ties& own : ties)
    for (int64_t cut = 0; cut < cuts_size; ++cut)
      ranks[cut] += std::exchange(own.equal[cut], ranks[cut]);
  share(0, size, block, [&](Blocks& blocks) {
    for (int64_t begin, end; blocks.take(&begin, &end);)
      table.assign_tied(source, begin, end, &ties[begin / block], levels);
  });
}

// The prune levels of one tensor; the ranks are advanced.
Tensor levels_of(const Tensor& scores, const CutTable& table, int64_t num_levels, int64_t* ranks) {
  const Source source = source_of(scores, "scores");
  Tensor levels = at::empty(scores.sizes(), scores.options().dtype(level_type(num_levels)));
  ask_for_large_pages(levels);
  if (levels.scalar_type() == at::kByte)
    assign(source, scores.numel(), table, ranks, levels.data_ptr<uint8_t>());
  else
    assign(source, scores.numel(), table, ranks, levels.data_ptr<int16_t>());
  return levels;
}

std::tuple<std::vector<Tensor>, Tensor> assign_levels(at::TensorList scores, at::ScalarType key,
                                                      const Tensor& thresholds,
                                                      const Tensor& first_level, const Tensor& ties,
                                                      const Tensor& straddled,
                                                      const Tensor& ranks) {
  const CutTable table = cut_table(scores, key, thresholds, first_level, ties, straddled, ranks);
  std::vector<Tensor> levels;
  Tensor passed = ranks.clone();
  for (const Tensor& tensor : scores)
    levels.push_back(levels_of(tensor, table, ties.numel(), passed.data_ptr<int64_t>()));
  return {levels, passed};
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY_FRAGMENT(confprune, m) {
  m.def(
      "magnitude_histogram(Tensor scores, ScalarType key, Tensor prefixes, int shift, "
      "int digit_bits, Tensor(a!) counts) -> ()");
  m.def(
      "magnitude_collect(Tensor scores, ScalarType key, Tensor prefixes, int shift, Tensor low, "
      "Tensor high, int limit, Tensor(a!) below) -> Tensor");
  m.def(
      "magnitude_select(Tensor[] scores, ScalarType key, Tensor rank) "
      "-> (Tensor keys, Tensor below, Tensor equal, Tensor nan)");
  m.def(
      "assign_levels(Tensor[] scores, ScalarType key, Tensor thresholds, Tensor first_level, "
      "Tensor ties, Tensor straddled, Tensor ranks) -> (Tensor[] levels, Tensor ranks)");
}

TORCH_LIBRARY_IMPL(confprune, CPU, m) {
  m.impl("magnitude_histogram", confprune::magnitude_histogram);
  m.impl("magnitude_collect", confprune::magnitude_collect);
  m.impl("assign_levels", confprune::assign_levels);
}
