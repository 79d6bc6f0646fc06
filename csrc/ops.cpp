// torch.ops.confprune.*: schemas, argument checks, and dispatch to the kernels.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arguments.h"
#include "cuda_build.h"
#include "kernels/grid_product.h"
#include "kernels/instruction_set.h"
#include "kernels/prefix_rows.h"
#include "kernels/selection.h"

namespace confprune {
namespace {

using at::Tensor;

constexpr int64_t kSerial = 1 << 16;  // elements below which threads cost more than they save
constexpr int64_t kFlush = int64_t(1) << 31;  // elements a 32-bit counter is trusted with

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

// Calls body(part, begin, end) on disjoint ranges that cover [0, size), at most one for each
// thread.
template <class Body>
int64_t parts(int64_t size, Body body) {
  const int64_t threads = size < kSerial ? 1 : at::get_num_threads();
  const int64_t step = (size + threads - 1) / std::max<int64_t>(1, threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      body(part, std::min(size, part * step), std::min(size, (part + 1) * step));
  });
  return threads;
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
  const int64_t cells = counts.numel();
  const Digit digit{key_element, int(shift), int(digit_bits), prefixes_of(prefixes, prefix_bits)};
  const Source source = source_of(scores, "scores");
  int64_t* total = counts.data_ptr<int64_t>();
  if (scores.numel() < kSerial)
    return histogram(source, 0, scores.numel(), digit, total);

  std::mutex adding;
  parts(scores.numel(), [&](int64_t, int64_t begin, int64_t end) {
    std::unique_ptr<uint32_t[]> own(new uint32_t[cells]);
    for (int64_t at = begin; at < end; at += kFlush) {
      std::fill(own.get(), own.get() + cells, 0u);
      histogram(source, at, std::min(end, at + kFlush), digit, own.get());
      const std::lock_guard<std::mutex> lock(adding);
      for (int64_t cell = 0; cell < cells; ++cell)
        total[cell] += own[cell];
    }
  });
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
  int64_data(below, "below");
  std::vector<std::vector<int64_t>> found(size_t(at::get_num_threads()) + 1);
  std::mutex adding;
  const int64_t used = parts(scores.numel(), [&](int64_t part, int64_t begin, int64_t end) {
    std::vector<int64_t> own(size, 0);
    collect(source, begin, end, brackets, own.data(), &found[part]);
    const std::lock_guard<std::mutex> lock(adding);
    for (int64_t i = 0; i < size; ++i)
      below.data_ptr<int64_t>()[i] += own[i];
  });
  int64_t total = 0;
  for (const auto& keys : found)
    total += int64_t(keys.size());
  Tensor result = at::empty({total}, prefixes.options());
  int64_t* out = result.data_ptr<int64_t>();
  for (int64_t part = 0; part < used; ++part)
    out = std::copy(found[part].begin(), found[part].end(), out);
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

// The prune levels of one tensor; `rank` of each cut is advanced.
Tensor levels_of(const Tensor& scores, const CutTable& table, int64_t num_levels, int64_t* rank) {
  const int64_t cuts_size = int64_t(table.cuts().values.size());
  const Source source = source_of(scores, "scores");
  Tensor levels = at::empty(scores.sizes(), scores.options().dtype(level_type(num_levels)));
  const int64_t size = scores.numel();
  const int64_t threads = size < kSerial ? 1 : at::get_num_threads();
  std::vector<int64_t> equal((threads + 1) * cuts_size, 0);
  std::copy(rank, rank + cuts_size, equal.begin());
  if (table.any_straddled()) {
    // Ties are broken by position, so each part must know how many stand before it: all threads
    // count together in the parts that have one behind them.
    const int64_t step = (size + threads - 1) / threads;
    std::mutex adding;
    if (threads > 1)
      parts(std::min(size, step * (threads - 1)), [&](int64_t, int64_t begin, int64_t end) {
        std::vector<int64_t> own(cuts_size);
        for (int64_t at = begin; at < end;) {
          const int64_t part = at / step, stop = std::min(end, (part + 1) * step);
          std::fill(own.begin(), own.end(), 0);
          table.count_equal(source, at, stop, own.data());
          const std::lock_guard<std::mutex> lock(adding);
          for (int64_t cut = 0; cut < cuts_size; ++cut)
            equal[(part + 1) * cuts_size + cut] += own[cut];
          at = stop;
        }
      });
    for (int64_t part = 1; part <= threads; ++part)
      for (int64_t cut = 0; cut < cuts_size; ++cut)
        equal[part * cuts_size + cut] += equal[(part - 1) * cuts_size + cut];
  }
  parts(size, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t* own = equal.data() + part * cuts_size;
    if (levels.scalar_type() == at::kByte)
      table.assign(source, begin, end, own, levels.data_ptr<uint8_t>());
    else
      table.assign(source, begin, end, own, levels.data_ptr<int16_t>());
  });
  if (table.any_straddled())
    std::copy_n(equal.begin() + (threads - 1) * cuts_size, cuts_size, rank);
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

Tensor masked_weights(const Tensor& weight, const Tensor& levels, const Tensor& level) {
  check_levelled(weight, levels);
  int64_data(level, "level");
  std::vector<int64_t> shape(size_t(weight.dim()) + 1, 1);
  shape[0] = level.numel();
  return at::where(levels > level.view(shape), weight, at::zeros({}, weight.options()));
}

at::ScalarType compute_type(const Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prefix_rows(const Tensor& weight, const Tensor& levels,
                                                       int64_t num_levels, int64_t block) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be a matrix, got ", weight.dim(),
                    " dimensions");
  TORCH_CHECK_VALUE(weight.sizes() == levels.sizes(), "weight has shape ", weight.sizes(),
                    " but levels has ", levels.sizes());
  TORCH_CHECK_VALUE(num_levels >= 1 && num_levels <= 32767,
                    "num_levels must be in [1, 32767], got ", num_levels);
  TORCH_CHECK_VALUE(block >= 1 && block <= kMaxBlock, "block must be in [1, ", kMaxBlock, "], got ",
                    block);
  LevelledMatrix m{weight.const_data_ptr(),
                   element_of(weight.scalar_type(), "weight"),
                   {weight.stride(0), weight.stride(1)},
                   levels.const_data_ptr(),
                   is_wide_levels(levels),
                   {levels.stride(0), levels.stride(1)},
                   weight.size(0),
                   weight.size(1)};
  const int64_t blocks = (m.row_size + block - 1) / block;
  const int64_t cells = m.rows * blocks;
  const auto long_options = weight.options().dtype(at::kLong);
  Tensor starts = at::zeros({cells + 1}, long_options);
  Tensor counts = at::empty({num_levels, cells}, weight.options().dtype(at::kShort));
  int64_t* start = starts.data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, kSerial / std::max<int64_t>(1, m.row_size));
  std::atomic<int64_t> wrong{0};
  at::parallel_for(0, m.rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t met =
        count_prefixes(m, begin, end, block, num_levels, counts.data_ptr<int16_t>(), start);
    if (met != 0)
      wrong = met;
  });
  TORCH_CHECK_VALUE(wrong == 0, "prune level ", wrong.load(), " does not fit ", num_levels,
                    " levels");
  for (int64_t cell = 0; cell < cells; ++cell)
    start[cell + 1] += start[cell];
  Tensor values = at::empty({start[cells]}, weight.options().dtype(compute_type(weight)));
  Tensor columns = at::empty({start[cells]}, weight.options().dtype(at::kShort));
  at::parallel_for(0, m.rows, grain, [&](int64_t begin, int64_t end) {
    fill_prefixes(m, begin, end, block, num_levels, start, values.data_ptr(),
                  columns.data_ptr<int16_t>());
  });
  return {values, columns, starts, counts};
}

bool contiguous(at::TensorList tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t.is_contiguous(); });
}

// What follows the product of a layer: y = max(floor, scale * product + shift + residual).
struct Follow {
  std::optional<Tensor> scale;
  std::optional<Tensor> shift;
  std::optional<Tensor> residual;
  bool relu;
};

void check_product(const Tensor& x, const Follow& follow, const Tensor& level, at::TensorList rows,
                   int64_t outputs, int64_t row_size, int64_t block) {
  const at::ScalarType compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  int64_data(level, "level");
  TORCH_CHECK_VALUE(x.size(0) == 1 || x.size(0) == level.numel(), "x has ", x.size(0),
                    " inputs for ", level.numel(), " levels; it takes one, or one a level");
  TORCH_CHECK_VALUE(rows.size() == 4, "rows must be the four tensors of prefix_rows");
  TORCH_CHECK_VALUE(row_size > 0, "a weight with no columns has no grid product");
  const int64_t blocks = (row_size + block - 1) / std::max<int64_t>(1, block);
  TORCH_CHECK_VALUE(block >= 1 && rows[0].scalar_type() == compute &&
                        rows[1].scalar_type() == at::kShort && rows[2].scalar_type() == at::kLong &&
                        rows[3].scalar_type() == at::kShort &&
                        rows[2].numel() == outputs * blocks + 1 && rows[3].dim() == 2 &&
                        rows[3].size(1) == outputs * blocks && rows[0].numel() == rows[1].numel() &&
                        contiguous(rows) &&
                        rows[2].const_data_ptr<int64_t>()[outputs * blocks] == rows[0].numel(),
                    "rows were not made by prefix_rows with block ", block, " from a ", compute,
                    " matrix of shape [", outputs, ", ", row_size, "]");
  const int64_t num_levels = rows[3].size(0);
  const int64_t* wanted = level.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < level.numel(); ++k) {
    TORCH_CHECK_VALUE(wanted[k] >= 0 && wanted[k] < num_levels, "level ", wanted[k],
                      " is not on the grid of ", num_levels);
    TORCH_CHECK_VALUE(k == 0 || wanted[k] > wanted[k - 1], "level must be strictly increasing");
  }
  check_per_output(follow.scale, "scale", outputs);
  check_per_output(follow.shift, "bias", outputs);
}

// Returns whether the residual, and the ReLU after it, are still to be taken.
bool multiply(GridProduct& product, const Tensor& x, const Follow& follow, const Tensor& level,
              at::TensorList rows, int64_t outputs, int64_t row_size, int64_t block) {
  if (x.numel() == 0 || outputs == 0 || level.numel() == 0)
    return false;
  const auto per_output = [&](const std::optional<Tensor>& values) {
    return values.has_value() ? values->to(rows[0].scalar_type()).contiguous() : Tensor();
  };
  const Tensor scale = per_output(follow.scale), shift = per_output(follow.shift);
  product.rows = {rows[0].const_data_ptr(),
                  rows[1].const_data_ptr<int16_t>(),
                  rows[2].const_data_ptr<int64_t>(),
                  rows[3].const_data_ptr<int16_t>(),
                  outputs,
                  row_size,
                  block,
                  (row_size + block - 1) / block,
                  rows[3].size(0)};
  product.scale = scale.defined() ? scale.const_data_ptr() : nullptr;
  product.shift = shift.defined() ? shift.const_data_ptr() : nullptr;
  product.relu = follow.relu;
  product.levels = level.const_data_ptr<int64_t>();
  product.num_levels = level.numel();
  // Rows in blocks would be walked once a block and level, so nothing is gained by sharing.
  product.shared = x.size(0) == 1 && product.rows.blocks == 1;
  if (x.size(0) == 1)
    product.x.level_stride = 0;
  product.wide = x.scalar_type() == at::kDouble;
  std::atomic<bool> finite{true};
  product.finite = &finite;

  const int threads = at::get_num_threads();
  const GridPlan plan(product, threads);
  const int64_t tasks = plan.tasks();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    // Kept from call to call: fresh pages cost more than the products of a small layer.
    thread_local std::vector<char> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), size_t(plan.scratch_bytes()) + 64));
    void* aligned = reinterpret_cast<void*>((uintptr_t(scratch.data()) + 63) / 64 * 64);
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task = next++; task < tasks; task = next++)
        plan.run(task, aligned);
  });
  // A pruned weight times infinity is NaN in the masked network; here it would be left out.
  TORCH_CHECK(finite, "x holds infinity or NaN, which pruned weights would hide");
  return plan.leaves_residual();
}

Activation activation_of(const Tensor& tensor, int spatial) {
  Activation activation{const_cast<void*>(tensor.const_data_ptr()),
                        element_of(tensor.scalar_type(), "x"),
                        tensor.stride(0),
                        tensor.stride(1),
                        tensor.stride(2),
                        {0, 0, 0}};
  for (int s = 0; s < spatial; ++s)
    activation.position_strides[kSpatial - spatial + s] = tensor.stride(3 + s);
  return activation;
}

Tensor grid_linear(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& level,
                   at::TensorList rows, int64_t outputs, int64_t block, bool batch_minor,
                   const std::optional<Tensor>& scale, bool relu) {
  const Follow follow{scale, bias, std::nullopt, relu};
  TORCH_CHECK_VALUE(x.dim() == 3, "grid_linear takes x [1 or K, N, in], got ", x.sizes());
  check_product(x, follow, level, rows, outputs, x.size(2), block);
  const int64_t K = level.numel(), N = x.size(1);
  Tensor y = batch_minor ? at::empty({K, outputs, N}, x.options()).transpose(1, 2)
                         : at::empty({K, N, outputs}, x.options());
  GridProduct product{};
  product.convolution = {x.size(2), 1,         {1, 1, 1}, {1, 1, 1},
                         {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  product.x = activation_of(x, 0);
  product.y = activation_of(y, 0);
  product.batch = N;
  multiply(product, x, follow, level, rows, outputs, x.size(2), block);
  return y;
}

Tensor grid_conv(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& level,
                 at::TensorList rows, int64_t outputs, int64_t block, at::IntArrayRef kernel,
                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                 int64_t groups, const std::optional<Tensor>& scale, bool relu,
                 const std::optional<Tensor>& residual) {
  const Follow follow{scale, bias, residual, relu};
  const int spatial = int(kernel.size());
  TORCH_CHECK_VALUE(spatial >= 1 && spatial <= kSpatial && x.dim() == spatial + 3,
                    "grid_conv takes x [1 or K, N, channels, positions...] and as many kernel "
                    "sizes as positions, got ",
                    x.sizes(), " and ", kernel);
  TORCH_CHECK_VALUE(groups >= 1 && x.size(2) % groups == 0 && outputs % groups == 0, groups,
                    " groups do not divide ", x.size(2), " channels and ", outputs, " outputs");
  TORCH_CHECK_VALUE(int(stride.size()) == spatial && int(padding.size()) == spatial &&
                        int(dilation.size()) == spatial,
                    "stride, padding and dilation need ", spatial, " values each");
  GridProduct product{};
  Convolution& c = product.convolution;
  c.channels = x.size(2);
  c.groups = groups;
  product.batch = x.size(1);
  int64_t row_size = c.channels / groups;
  std::vector<int64_t> shape{level.numel(), outputs};
  for (int d = 0; d < kSpatial; ++d) {
    const int s = d - (kSpatial - spatial);  // the last dimensions are the ones in use
    c.input[d] = s < 0 ? 1 : x.size(3 + s);
    c.kernel[d] = s < 0 ? 1 : kernel[s];
    c.stride[d] = s < 0 ? 1 : stride[s];
    c.padding[d] = s < 0 ? 0 : padding[s];
    c.dilation[d] = s < 0 ? 1 : dilation[s];
    TORCH_CHECK_VALUE(c.kernel[d] >= 1 && c.stride[d] >= 1 && c.dilation[d] >= 1,
                      "kernel, stride and dilation must be positive");
    TORCH_CHECK_VALUE(c.input[d] >= 1, "x has no positions in dimension ", s);
    TORCH_CHECK_VALUE(c.padding[d] >= 0, "padding must not be negative, got ", padding);
    const int64_t room = c.input[d] + 2 * c.padding[d] - c.dilation[d] * (c.kernel[d] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, "the kernel is larger than the padded input in dimension ", s);
    c.output[d] = room / c.stride[d] + 1;
    row_size *= c.kernel[d];
    if (s >= 0)
      shape.push_back(c.output[d]);
  }
  check_product(x, follow, level, rows, outputs, row_size, block);
  // Batch last in memory: the next grid product, and what stands between, then never transpose.
  shape.push_back(product.batch);
  Tensor y = at::empty(shape, x.options()).movedim(-1, 1);
  product.x = activation_of(x, spatial);
  product.y = activation_of(y, spatial);
  if (residual.has_value()) {
    const auto of_level = y.sizes().slice(1);
    TORCH_CHECK_VALUE(residual->scalar_type() == x.scalar_type() && residual->dim() == y.dim() &&
                          (residual->size(0) == 1 || residual->size(0) == y.size(0)) &&
                          residual->sizes().slice(1) == of_level,
                      "residual is ", residual->scalar_type(), " of shape ", residual->sizes(),
                      " for outputs ", y.scalar_type(), " of shape ", y.sizes());
    product.residual = activation_of(*residual, spatial);
    if (residual->size(0) == 1)
      product.residual.level_stride = 0;
  }
  if (multiply(product, x, follow, level, rows, outputs, row_size, block)) {
    y.add_(*residual);
    if (relu)
      y.relu_();
  }
  return y;
}

c10::Dict<std::string, std::string> build_info() {
  c10::Dict<std::string, std::string> built;
#if defined(__clang__)
  built.insert("compiler", "clang " __clang_version__);
#else
  built.insert("compiler", "gcc " __VERSION__);
#endif
  built.insert("torch", TORCH_VERSION);
  built.insert("cuda", cuda_version());
  built.insert("architectures", cuda_architectures());
  return built;
}

}  // namespace
}  // namespace confprune

TORCH_LIBRARY(confprune, m) {
  m.def("instruction_set() -> str", [] { return std::string(confprune::instruction_set().name); });
  m.def("build_info() -> Dict(str, str)", confprune::build_info);
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
  m.def("masked_weights(Tensor weight, Tensor levels, Tensor level) -> Tensor");
  m.def(
      "masked_linear(Tensor x, Tensor weight, Tensor levels, Tensor level, Tensor? bias=None, "
      "Tensor? scale=None, bool relu=False) -> Tensor");
  m.def(
      "prefix_rows(Tensor weight, Tensor levels, int num_levels, int block) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "grid_linear(Tensor x, Tensor? bias, Tensor level, Tensor[] rows, int outputs, int block, "
      "bool batch_minor, Tensor? scale=None, bool relu=False) -> Tensor");
  m.def(
      "grid_conv(Tensor x, Tensor? bias, Tensor level, Tensor[] rows, int outputs, int block, "
      "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
      "Tensor? scale=None, bool relu=False, Tensor? residual=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(confprune, CPU, m) {
  m.impl("magnitude_histogram", confprune::magnitude_histogram);
  m.impl("magnitude_collect", confprune::magnitude_collect);
  m.impl("assign_levels", confprune::assign_levels);
  m.impl("masked_weights", confprune::masked_weights);
  m.impl("prefix_rows", confprune::prefix_rows);
  m.impl("grid_linear", confprune::grid_linear);
  m.impl("grid_conv", confprune::grid_conv);
}
