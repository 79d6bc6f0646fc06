"""torch.ops.confprune.sparse_*: each operator against a slow reference, its registration, errors.

The data of most cases are small integers, whose sums are exact in every order of additions, so that
kernel and reference must agree bit for bit.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import INSTRUCTION_SETS, check_on
from torch import Tensor

from confprune.sparse.modules import NEVER
from confprune.sparse.operators import check, conv, linear, pack, unpack

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
BATCHES = [1, 2, 3, 8, 9, 16, 17, 32, 33, 48, 64, 65]


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-3, 4, shape).to(dtype)


def pruned(*shape: int, density: float = 0.2, dtype: torch.dtype = torch.float32) -> Tensor:
    kept = torch.rand(shape) < density
    return torch.where(kept, integers(*shape), 0).to(dtype)


def slow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    b = None if bias is None else bias.double()
    return F.linear(x.double(), weight.double(), b).to(x.dtype)


def slow_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **geometry) -> Tensor:
    b = None if bias is None else bias.double()
    convolution = CONVOLUTIONS[weight.ndim - 2]
    return convolution(x.double(), weight.double(), b, **geometry).to(x.dtype)


def run_linear(x, weight, bias=None, dense_from=NEVER):
    return linear(x, *pack(weight, 1), bias, weight.shape[0], dense_from)


def run_conv(x, weight, bias=None, *, stride, padding, dilation, groups, dense_from=NEVER):
    packed = pack(weight.flatten(1), groups)
    kernel = list(weight.shape[2:])
    each = [[n] * len(kernel) if isinstance(n, int) else n for n in (stride, padding, dilation)]
    return conv(x, *packed, bias, weight.shape[0], kernel, *each, groups, dense_from)


def exact(values: Tensor, like: Tensor) -> bool:
    """Equal, or beyond what a 16-bit float holds, in both."""
    return torch.equal(values, like) and values.dtype == like.dtype


# positions, channels, outputs, kernel, stride, padding, dilation, groups
GEOMETRIES = {
    "1-d": ((17,), 3, 5, (4,), 1, 2, 1, 1),
    "1-d strided and dilated": ((23,), 3, 5, (3,), 2, 3, 3, 1),
    "1x1": ((5, 6), 8, 6, (1, 1), 1, 0, 1, 1),
    "1x1 of one position": ((1, 1), 8, 6, (1, 1), 1, 0, 1, 1),
    "1x1 of one position, padded": ((1, 1), 8, 6, (1, 1), 3, 1, 1, 1),
    "1x1 strided": ((5, 6), 8, 6, (1, 1), 2, 0, 1, 1),
    "3x3 padded": ((7, 9), 4, 6, (3, 3), 1, 1, 1, 1),
    "3x3 strided": ((8, 8), 4, 6, (3, 3), 2, 1, 1, 1),
    "7x7 stem": ((16, 15), 3, 4, (7, 7), 2, 3, 1, 1),
    "uneven": ((9, 20), 2, 3, (2, 5), (3, 2), (0, 4), (1, 2), 1),
    "stride beyond kernel": ((11, 11), 2, 3, (2, 2), 4, 0, 1, 1),
    "dilation and stride share a factor": ((15, 15), 2, 3, (3, 3), 4, 2, 2, 1),
    "patches": ((32, 32), 3, 8, (16, 16), 16, 0, 1, 1),
    "wide line": ((2, 70), 2, 3, (3, 3), 1, 1, 1, 1),
    "one position": ((3, 3), 4, 5, (3, 3), 1, 0, 1, 1),
    "groups": ((6, 7), 6, 9, (3, 3), 1, 1, 1, 3),
    "groups of many rows": ((3, 3), 4, 300, (2, 2), 1, 0, 1, 2),
    "depthwise": ((6, 7), 5, 5, (3, 3), 1, 1, 1, 5),
    "many rows and blocks": ((4, 5), 40, 290, (3, 3), 1, 1, 1, 1),
    "3-d": ((4, 5, 6), 2, 3, (3, 2, 3), 1, 1, 1, 1),
    "3-d with everything": ((7, 6, 9), 4, 6, (2, 2, 3), (2, 1, 2), (1, 0, 2), (1, 2, 1), 2),
    "all padding": ((1, 1), 2, 3, (3, 3), 1, 2, 1, 1),
    "bands": ((70, 60), 30, 5, (3, 3), 1, 1, 1, 1),
}


def conv_case(positions, channels, outputs, kernel, stride, padding, dilation, groups, batch=2):
    x = integers(batch, channels, *positions)
    weight = pruned(outputs, channels // groups, *kernel, density=0.4)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return x, weight, integers(outputs), geometry


class TestProducts:
    """The products; these cases are run again on every narrower instruction set."""

    @pytest.mark.parametrize("batch", BATCHES)
    @pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
    def test_a_linear_layer_is_the_masked_product(self, batch, density):
        x, weight, bias = integers(batch, 300), pruned(290, 300, density=density), integers(290)
        assert exact(run_linear(x, weight, bias), slow_linear(x, weight, bias))

    @pytest.mark.parametrize("batch", [1, 7, 33])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_floating_type_is_computed_at_its_precision(self, dtype, batch):
        x, weight = integers(batch, 300, dtype=dtype), pruned(70, 300, dtype=dtype)
        assert exact(run_linear(x, weight), slow_linear(x, weight))

    @pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16, torch.float16])
    def test_inputs_and_weights_may_be_of_different_types(self, inputs, values):
        for batch in (1, 5):
            x, weight = integers(batch, 30, dtype=inputs), pruned(20, 30, dtype=values)
            bias = integers(20)
            assert exact(run_linear(x, weight, bias), slow_linear(x, weight, bias))

    @pytest.mark.parametrize("batch", [1, 5, 20])
    def test_a_weight_without_survivors_gives_the_bias(self, batch):
        x, bias = integers(batch, 200), integers(40)
        y = run_linear(x, torch.zeros(40, 200), bias)
        assert torch.equal(y, bias.expand(batch, 40))

    @pytest.mark.parametrize("batch", [1, 5, 20])
    def test_rows_and_columns_may_be_empty_or_full(self, batch):
        weight = pruned(150, 260)
        weight[::3] = 0
        weight[1::7] = 1
        weight[:, 100:200] = 0
        weight[:, 5] = -2
        x = integers(batch, 260)
        assert exact(run_linear(x, weight), slow_linear(x, weight))

    @pytest.mark.parametrize("batch", [1, 5])
    @pytest.mark.parametrize("rows", [3, 16, 40])
    @pytest.mark.parametrize("longest", [9, 128])
    def test_rows_may_have_very_different_numbers_of_survivors(self, longest, rows, batch):
        lengths = torch.linspace(0, longest, rows).round()[torch.randperm(rows)]
        order = torch.rand(rows, 200).argsort(1)
        weight = torch.where(order < lengths[:, None], integers(rows, 200) + 4, 0)
        x = integers(batch, 200)
        assert exact(run_linear(x, weight), slow_linear(x, weight))

    @given(
        batch=st.integers(0, 70),
        inputs=st.integers(1, 300),
        outputs=st.integers(1, 300),
        density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
        bias=st.booleans(),
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=40)
    def test_a_linear_layer_of_any_size(self, batch, inputs, outputs, density, bias, dtype):
        x = integers(batch, inputs, dtype=dtype)
        weight = pruned(outputs, inputs, density=density, dtype=dtype)
        b = integers(outputs, dtype=dtype) if bias else None
        assert exact(run_linear(x, weight, b), slow_linear(x, weight, b))

    @pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
    def test_inputs_of_any_dimensions(self, shape):
        x, weight = integers(*shape, 30), pruned(20, 30)
        assert exact(run_linear(x, weight), slow_linear(x, weight))

    @pytest.mark.parametrize("batch", [1, 6, 40])
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_inputs_may_have_any_strides(self, layout, batch, dtype):
        if layout == "transposed":
            x = integers(90, batch, dtype=dtype).t()
        elif layout == "sliced":
            x = integers(2 * batch, 270, dtype=dtype)[::2, ::3]
        elif layout == "expanded":
            x = integers(1, 90, dtype=dtype).expand(batch, 90)
        else:
            x = integers(90 * batch + 1, dtype=dtype)[1:].view(batch, 90)
        weight = pruned(33, 90, dtype=dtype)
        assert exact(run_linear(x, weight), slow_linear(x, weight))

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("name", GEOMETRIES)
    def test_a_convolution_is_the_masked_convolution(self, name, batch):
        x, weight, bias, geometry = conv_case(*GEOMETRIES[name], batch=batch)
        y, expected = run_conv(x, weight, bias, **geometry), slow_conv(x, weight, bias, **geometry)
        assert exact(y, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_convolution_of_every_floating_type(self, dtype):
        x, weight, bias, geometry = conv_case(*GEOMETRIES["3x3 padded"])
        x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
        assert exact(run_conv(x, weight, bias, **geometry), slow_conv(x, weight, bias, **geometry))

    @pytest.mark.parametrize("layout", [torch.channels_last, "sliced", "without a batch", "empty"])
    def test_a_convolution_of_inputs_of_any_layout(self, layout):
        for name in ("3x3 padded", "1x1", "3x3 strided"):
            x, weight, bias, geometry = conv_case(*GEOMETRIES[name])
            if layout == "sliced":
                x = integers(4, *x.shape[1:-1], 2 * x.shape[-1])[::2, ..., ::2]
            elif layout == "without a batch":
                x = x[0]
            elif layout == "empty":
                x = x[:0]
            else:
                x = x.to(memory_format=layout)
            y = run_conv(x, weight, bias, **geometry)
            assert exact(y, slow_conv(x, weight, bias, **geometry))

    @given(data=st.data(), dimensions=st.integers(1, 3), groups=st.integers(1, 3))
    @settings(max_examples=40)
    def test_a_convolution_of_any_geometry(self, data, dimensions, groups):
        def each(low, high):
            return tuple(data.draw(st.integers(low, high)) for _ in range(dimensions))

        kernel, dilation, padding = each(1, 3), each(1, 3), each(0, 3)
        positions = tuple(
            data.draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 9))
            for k, d, p in zip(kernel, dilation, padding, strict=True)
        )
        x, weight, bias, geometry = conv_case(
            positions,
            groups * data.draw(st.integers(1, 3)),
            groups * data.draw(st.integers(1, 3)),
            kernel,
            each(1, 4),
            padding,
            dilation,
            groups,
            batch=data.draw(st.integers(1, 3)),
        )
        dtype = data.draw(st.sampled_from(DTYPES))
        x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
        assert exact(run_conv(x, weight, bias, **geometry), slow_conv(x, weight, bias, **geometry))

    @pytest.mark.parametrize("batch", [1, 40])
    def test_products_in_double_precision_are_not_rounded_to_single(self, batch):
        x = torch.randn(batch, 400, dtype=torch.float64)
        weight = torch.randn(50, 400, dtype=torch.float64) * (torch.rand(50, 400) < 0.3)
        torch.testing.assert_close(run_linear(x, weight), x @ weight.t(), rtol=1e-13, atol=1e-12)

    @pytest.mark.parametrize("batch", [1, 2, 5, 40])
    def test_real_numbers_are_summed_to_rounding(self, batch):
        x, weight = torch.randn(batch, 700), torch.randn(90, 700) * (torch.rand(90, 700) < 0.3)
        expected = x.double() @ weight.double().t()
        torch.testing.assert_close(run_linear(x, weight).double(), expected, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("strange", [torch.inf, torch.nan])
    @pytest.mark.parametrize("batch", [1, 5, 40])
    def test_infinity_and_nan_reach_the_outputs_whose_weights_survive(self, batch, strange):
        x, weight = integers(batch, 300), pruned(80, 300)
        x[0, 130] = strange
        y = run_linear(x, weight)
        # What a masked dense weight would give, were 0 · inf 0 and not NaN.
        assert torch.equal(y[0].isfinite(), weight[:, 130] == 0)
        finite = y[0].isfinite()
        clean = x.nan_to_num(0, 0, 0)
        assert torch.equal(y[0, finite], slow_linear(clean, weight)[0, finite])
        assert torch.equal(y[1:], slow_linear(x[1:], weight))

    def test_weights_that_are_infinite_or_nan_survive(self):
        weight = pruned(20, 40, density=0.1)
        weight[3, 5], weight[4, 6] = torch.inf, torch.nan
        packed = pack(weight, 1)
        assert torch.equal(unpack(*packed, 20, 40, 1).nan_to_num(7), weight.nan_to_num(7))
        for batch in (1, 5):
            y = run_linear(torch.ones(batch, 40), weight)
            assert y[:, 3].isinf().all()
            assert y[:, 4].isnan().all()
            assert int(y.isfinite().sum()) == batch * 18

    @pytest.mark.parametrize("batch", [1, 2, 20, 70])
    def test_the_number_of_threads_does_not_show(self, batch):
        x, weight = torch.randn(batch, 900), torch.randn(600, 900) * (torch.rand(600, 900) < 0.1)
        image, kernel = torch.randn(batch, 9, 12, 12), torch.randn(40, 9, 3, 3).relu()
        geometry = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
        before, results = torch.get_num_threads(), []
        try:
            for number in (1, 2, 3, 7):
                torch.set_num_threads(number)
                results.append((run_linear(x, weight), run_conv(image, kernel, **geometry)))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


# Asked for by its name, AVX-512 does without the byte permutations of some machines.
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_narrower_instruction_sets_compute_the_same(instruction_set):
    check_on(instruction_set, f"{__file__}::TestProducts")


def _refused(packed: list[Tensor], rows: int, row_size: int) -> bool:
    try:
        check(*packed, rows, row_size, 1)
    except ValueError:
        return True
    return False


class TestPacking:
    @given(
        rows=st.integers(1, 300),
        row_size=st.integers(1, 300),
        groups=st.integers(1, 4),
        density=st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]),
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=40)
    def test_a_matrix_survives_packing(self, rows, row_size, groups, density, dtype):
        weight = pruned(rows * groups, row_size, density=density, dtype=dtype)
        packed = pack(weight, groups)
        check(*packed, rows * groups, row_size, groups)
        assert exact(unpack(*packed, rows * groups, row_size, groups), weight)
        values, columns, _, _ = packed
        assert len(values) == len(columns) == torch.count_nonzero(weight)

    def test_negative_zeros_are_zeros(self):
        packed = pack(torch.tensor([[-0.0, 1.0]]), 1)
        assert packed[0].tolist() == [1.0]

    def test_a_weight_of_any_strides(self):
        weight = pruned(60, 90)
        for strided in (weight.t(), weight[::2, ::3], weight[:1].expand(7, 90)):
            packed = pack(strided, 1)
            assert torch.equal(unpack(*packed, *strided.shape, 1), strided)

    @pytest.mark.parametrize(
        ("dtype", "sparsity"),
        [(torch.float32, s) for s in (0.8, 0.9, 0.95, 0.99)]
        + [(torch.bfloat16, s) for s in (0.8, 0.9, 0.95)],
    )
    def test_memory_is_in_proportion_to_the_survivors(self, dtype, sparsity):
        weight = torch.randn(1024, 1024)
        weight[weight.abs() < weight.abs().flatten().kthvalue(round(sparsity * 2**20))[0]] = 0
        packed = pack(weight.to(dtype), 1)
        size = sum(tensor.numel() * tensor.element_size() for tensor in packed)
        assert size <= 1.6 * (1 - sparsity) * weight.numel() * dtype.itemsize

    @given(st.data())
    @settings(max_examples=150)
    def test_damage_is_refused_before_a_kernel_meets_it(self, data):
        torch.manual_seed(0)  # where to damage it depends on its size
        packed = [tensor.clone() for tensor in pack(pruned(40, 150, density=0.1), 1)]
        tensor = packed[data.draw(st.integers(1, 3))].view(-1)
        at = data.draw(st.integers(0, len(tensor) - 1))
        tensor[at] = (int(tensor[at]) + data.draw(st.integers(1, 255))) % 256
        if not _refused(packed, 40, 150):  # another matrix, but one
            weight = unpack(*packed, 40, 150, 1)
            x = integers(3, 150)
            assert torch.equal(linear(x, *packed, None, 40, NEVER), slow_linear(x, weight))

    def test_the_wrong_shape_is_refused(self):
        packed = pack(pruned(40, 150), 1)
        for rows, row_size, groups in ((400, 150, 1), (40, 600, 1), (40, 150, 4), (40, 100, 1)):
            with pytest.raises(ValueError, match=r"not .* matrix of shape"):
                check(*packed, rows, row_size, groups)


SCHEMA_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


class TestRegistration:
    def test_linear(self):
        packed = pack(pruned(20, 30), 1)
        for x in (integers(4, 30), integers(30), integers(2, 3, 30)):
            for dense_from in (NEVER, 0):
                arguments = (x, *packed, integers(20), 20, dense_from)
                torch.library.opcheck(linear, arguments, test_utils=SCHEMA_CHECKS)

    def test_conv(self):
        packed = pack(pruned(6, 4, 3, 3).flatten(1), 1)
        for x in (integers(2, 4, 9, 8), integers(4, 9, 8)):
            arguments = (x, *packed, None, 6, [3, 3], [2, 1], [1, 1], [1, 2], 1, NEVER)
            torch.library.opcheck(conv, arguments, test_utils=SCHEMA_CHECKS)

    def test_packing(self):
        weight = pruned(20, 30)
        packed = pack(weight, 1)
        torch.library.opcheck(pack, (weight, 1), test_utils=SCHEMA_CHECKS[:2])
        torch.library.opcheck(unpack, (*packed, 20, 30, 1), test_utils=SCHEMA_CHECKS)
        torch.library.opcheck(check, (*packed, 20, 30, 1), test_utils=SCHEMA_CHECKS[:2])

    @pytest.mark.parametrize("dim", [0, 1, 2])
    def test_linear_over_a_dimension_of_x(self, dim):
        x, weight = integers(3, 4, 30), pruned(20, 30)
        y = torch.vmap(lambda one: run_linear(one, weight), in_dims=min(dim, 1))(x)
        assert torch.equal(y, slow_linear(x.movedim(min(dim, 1), 0), weight))

    @pytest.mark.parametrize("batched", [True, False])
    def test_conv_over_a_dimension_of_x(self, batched):
        _, weight, bias, geometry = conv_case(*GEOMETRIES["3x3 padded"])
        x = integers(3, 2, 4, 7, 9) if batched else integers(3, 4, 7, 9)
        y = torch.vmap(lambda one: run_conv(one, weight, bias, **geometry))(x)
        expected = torch.stack([slow_conv(one, weight, bias, **geometry) for one in x])
        assert torch.equal(y, expected)

    def test_only_x_may_be_batched(self):
        packed = pack(pruned(20, 30), 1)
        x, biases = integers(4, 30), integers(3, 20)
        with pytest.raises(NotImplementedError, match="over x only"):
            torch.vmap(lambda bias: linear(x, *packed, bias, 20, NEVER))(biases)


class TestDense:
    """From `dense_from` products on, torch's own kernel."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_linear(self, dtype):
        x, weight, bias = (integers(*shape, dtype=dtype) for shape in ((4, 30), (20, 30), (20,)))
        assert torch.equal(run_linear(x, weight, bias, dense_from=4), F.linear(x, weight, bias))
        assert run_linear(x, weight, bias, dense_from=5).dtype == dtype

    def test_conv(self):
        x, weight, bias, geometry = conv_case(*GEOMETRIES["3-d with everything"])
        y = run_conv(x, weight, bias, **geometry, dense_from=0)
        assert torch.equal(y, F.conv3d(x, weight, bias, **geometry))


def test_what_does_not_fit_is_refused():
    packed = pack(pruned(20, 30), 1)
    kernel = pack(pruned(6, 4, 3, 3).flatten(1), 1)
    image, one, zero = integers(2, 4, 9, 8), [1, 1], [0, 0]

    def run(x, bias=None):
        return linear(x, *packed, bias, 20, NEVER)

    def convolve(x=image, size=(3, 3), stride=one, padding=zero, groups=1):
        return conv(x, *kernel, None, 6, size, stride, padding, one, groups, NEVER)

    for error, match, call in [
        (ValueError, "not those of a matrix of shape", lambda: run(integers(4, 200))),
        (ValueError, "has no sparse form", lambda: run(integers(4, 0))),
        (ValueError, "bias has shape", lambda: run(integers(4, 30), integers(3))),
        (ValueError, "at least one dimension", lambda: run(torch.tensor(1.0))),
        (TypeError, "must be float32", lambda: run(integers(4, 30).long())),
        (TypeError, "x is Double", lambda: run(integers(4, 30).double())),
        (ValueError, "has no sparse form", lambda: pack(torch.zeros(0, 3), 1)),
        (ValueError, "must be a matrix", lambda: pack(torch.zeros(3), 1)),
        (ValueError, "groups do not divide", lambda: pack(torch.zeros(3, 3), 2)),
        (TypeError, "must be float32", lambda: pack(torch.zeros(3, 3).int(), 1)),
        (ValueError, "kernel is larger", lambda: convolve(integers(1, 4, 2, 2))),
        (ValueError, "must be positive", lambda: convolve(stride=zero)),
        (ValueError, "need 2 values", lambda: convolve(stride=[1])),
        (ValueError, "as many kernel sizes", lambda: convolve(image[0, 0])),
        (ValueError, "groups do not divide", lambda: convolve(groups=3)),
        (ValueError, "not those of a matrix", lambda: convolve(integers(2, 60, 9, 8))),
    ]:
        with pytest.raises(error, match=match):
            call()


def test_training_is_refused():
    x = integers(4, 30).requires_grad_()
    weight = pruned(20, 30)
    with pytest.raises(RuntimeError, match="sparse layers are for inference"):
        run_linear(x, weight)
    with torch.no_grad():
        assert not run_linear(x, weight).requires_grad
