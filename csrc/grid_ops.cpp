// torch.ops.confprune: the masked products of a grid; schemas, argument checks, and dispatch to the
// kernels.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "arguments.h"
#include "kernels/grid_product.h"
#include "kernels/level_mask.h"
#include "kernels/prefix_rows.h"

namespace confprune {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 16;  // weights a thread takes at least

Tensor masked_weights(const Tensor& weight, const Tensor& levels, const Tensor& level) {
  check_levelled(weight, levels);
  element_of(weight.scalar_type(), "weight");
  const int64_t* wanted = int64_data(level, "level");
  const Tensor dense = weight.contiguous(), own = levels.contiguous();
  std::vector<int64_t> shape = weight.sizes().vec();
  shape.insert(shape.begin(), level.numel());
  Tensor masked = at::empty(shape, weight.options());
  char* const out = static_cast<char*>(masked.mutable_data_ptr());
  for (int64_t k = 0; k < level.numel(); ++k) {
    const LevelMask mask{dense.const_data_ptr(), int(dense.itemsize()), own.const_data_ptr(),
                         is_wide_levels(own), wanted[k]};
    at::parallel_for(0, dense.numel(), kGrain, [&](int64_t begin, int64_t end) {
      mask_weights(mask, begin, end, out + k * dense.nbytes());
    });
  }
  return masked;
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
  Tensor starts = at::zeros({cells + 2}, long_options);
  Tensor counts = at::empty({num_levels, cells}, weight.options().dtype(at::kShort));
  int64_t* start = starts.data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, m.row_size));
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
  start[cells + 1] = m.row_size;  // which nothing else says; a product must not read beyond it
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
  const int64_t cells = outputs * ((row_size + block - 1) / std::max<int64_t>(1, block));
  TORCH_CHECK_VALUE(block >= 1 && rows[0].scalar_type() == compute &&
                        rows[1].scalar_type() == at::kShort && rows[2].scalar_type() == at::kLong &&
                        rows[3].scalar_type() == at::kShort && rows[2].numel() == cells + 2 &&
                        rows[3].dim() == 2 && rows[3].size(1) == cells &&
                        rows[0].numel() == rows[1].numel() && contiguous(rows) &&
                        rows[2].const_data_ptr<int64_t>()[cells] == rows[0].numel() &&
                        rows[2].const_data_ptr<int64_t>()[cells + 1] == row_size,
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

// What a product reads by pointer.
struct PerOutput {
  Tensor scale, shift;
};

PerOutput set_layer(GridProduct& product, const Follow& follow, const Tensor& level,
                    at::TensorList rows, int64_t outputs, int64_t row_size, int64_t block) {
  const auto per_output = [&](const std::optional<Tensor>& values) {
    return values.has_value() ? values->to(rows[0].scalar_type()).contiguous() : Tensor();
  };
  const PerOutput kept{per_output(follow.scale), per_output(follow.shift)};
  product.rows = {rows[0].const_data_ptr(),
                  rows[1].const_data_ptr<int16_t>(),
                  rows[2].const_data_ptr<int64_t>(),
                  rows[3].const_data_ptr<int16_t>(),
                  outputs,
                  row_size,
                  block,
                  (row_size + block - 1) / block,
                  rows[3].size(0)};
  product.scale = kept.scale.defined() ? kept.scale.const_data_ptr() : nullptr;
  product.shift = kept.shift.defined() ? kept.shift.const_data_ptr() : nullptr;
  product.relu = follow.relu;
  product.levels = level.const_data_ptr<int64_t>();
  product.num_levels = level.numel();
  product.wide = rows[0].scalar_type() == at::kDouble;
  return kept;
}

// Runs a plan's tasks on all threads. The layers' products note here where x is not finite.
template <class Plan>
void run_tasks(const Plan& plan, int64_t tasks, const std::atomic<bool>& finite) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
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
}

// Returns whether the residual, and the ReLU after it, are still to be taken.
bool multiply(GridProduct& product, const Tensor& x, const Follow& follow, const Tensor& level,
              at::TensorList rows, int64_t outputs, int64_t row_size, int64_t block) {
  if (x.numel() == 0 || outputs == 0 || level.numel() == 0)
    return false;
  const PerOutput kept = set_layer(product, follow, level, rows, outputs, row_size, block);
  // Rows in blocks would be walked once a block and level, so nothing is gained by sharing.
  product.shared = x.size(0) == 1 && product.rows.blocks == 1;
  if (x.size(0) == 1)
    product.x.level_stride = 0;
  std::atomic<bool> finite{true};
  product.finite = &finite;
  const GridPlan plan(product, at::get_num_threads());
  run_tasks(plan, plan.tasks(), finite);
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

Convolution linear(int64_t inputs) {
  return {inputs, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
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
  product.convolution = linear(x.size(2));
  product.x = activation_of(x, 0);
  product.y = activation_of(y, 0);
  product.batch = N;
  multiply(product, x, follow, level, rows, outputs, x.size(2), block);
  return y;
}

Tensor grid_mlp(const Tensor& x, const Tensor& level, at::TensorList rows, at::IntArrayRef outputs,
                at::IntArrayRef blocks, const c10::List<std::optional<Tensor>>& biases,
                const c10::List<std::optional<Tensor>>& scales, const c10::List<bool>& relus) {
  const size_t count = outputs.size();
  TORCH_CHECK_VALUE(
      count >= 2 && rows.size() == 4 * count && blocks.size() == count && biases.size() == count &&
          scales.size() == count && relus.size() == count,
      "grid_mlp takes rows, outputs, block, bias, scale and relu of two layers or more");
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) == 1, "grid_mlp takes x [1, N, in], got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
                    "grid_mlp computes in float32 or float64, got ", x.scalar_type());
  std::vector<GridProduct> products(count);
  std::vector<PerOutput> kept;
  std::atomic<bool> finite{true};
  for (size_t i = 0; i < count; ++i) {
    const Follow follow{scales.get(i), biases.get(i), std::nullopt, relus.get(i)};
    const int64_t inputs = i == 0 ? x.size(2) : outputs[i - 1];
    const at::TensorList own = rows.slice(4 * i, 4);
    check_product(x, follow, level, own, outputs[i], inputs, blocks[i]);
    GridProduct& product = products[i];
    kept.push_back(set_layer(product, follow, level, own, outputs[i], inputs, blocks[i]));
    product.convolution = linear(inputs);
    product.batch = x.size(1);
    product.shared = i == 0;
    product.finite = &finite;
  }
  const GridProduct& first = products.front();
  TORCH_CHECK_VALUE(first.rows.blocks == 1, "grid_mlp takes a first layer with rows of one block");
  Tensor y = at::empty({level.numel(), outputs.back(), x.size(1)}, x.options()).transpose(1, 2);
  if (y.numel() == 0)
    return y;
  products.front().x = activation_of(x, 0);
  products.back().y = activation_of(y, 0);
  const MlpPlan plan(products, at::get_num_threads());
  run_tasks(plan, plan.parts(), finite);
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

}  // namespace
}  // namespace confprune

TORCH_LIBRARY_FRAGMENT(confprune, m) {
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
      "grid_mlp(Tensor x, Tensor level, Tensor[] rows, int[] outputs, int[] blocks, "
      "Tensor?[] biases, Tensor?[] scales, bool[] relus) -> Tensor");
  m.def(
      "grid_conv(Tensor x, Tensor? bias, Tensor level, Tensor[] rows, int outputs, int block, "
      "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
      "Tensor? scale=None, bool relu=False, Tensor? residual=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(confprune, CPU, m) {
  m.impl("masked_weights", confprune::masked_weights);
  m.impl("prefix_rows", confprune::prefix_rows);
  m.impl("grid_linear", confprune::grid_linear);
  m.impl("grid_mlp", confprune::grid_mlp);
  m.impl("grid_conv", confprune::grid_conv);
}
