"""torch.ops.confprune: each operator against a slow reference, its registration and its errors.

The data of most cases are small integers, whose sums are exact in every order of additions, so that
kernel and reference must agree bit for bit.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import INSTRUCTION_SETS, check_on, threads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

grid_linear = torch.ops.confprune.grid_linear
grid_conv = torch.ops.confprune.grid_conv
prefix_rows = torch.ops.confprune.prefix_rows

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def integers(*shape: int, dtype: torch.dtype = torch.float32, most: int = 3) -> Tensor:
    return torch.randint(-most, most + 1, shape).to(dtype)


def random_levels(shape: tuple[int, ...], num_levels: int) -> Tensor:
    dtype = torch.uint8 if num_levels <= 255 else torch.int16
    return torch.randint(0, num_levels + 1, shape).to(dtype)


def computed(tensor: Tensor) -> Tensor:
    """As the kernels compute with it: 16-bit floats in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def slow_linear(x: Tensor, bias: Tensor | None, level: Tensor, weight: Tensor, levels: Tensor):
    """y[k] = x[k or 0] (W * mask k)^T + b, level by level."""
    outputs = []
    for k, j in enumerate(level.tolist()):
        masked = torch.where(levels > j, weight, 0)
        own = x[0 if len(x) == 1 else k]
        b = None if bias is None else computed(bias)
        outputs.append(F.linear(computed(own), computed(masked), b).to(x.dtype))
    return torch.stack(outputs)


def slow_conv(x, bias, level, weight, levels, **geometry):
    """The same for convolutions, in double precision, where all of torch's kernels are exact."""
    convolution = CONVOLUTIONS[weight.ndim - 2]
    outputs = []
    for k, j in enumerate(level.tolist()):
        masked = torch.where(levels > j, weight, 0).double()
        own = x[0 if len(x) == 1 else k].double()
        b = None if bias is None else bias.double()
        outputs.append(convolution(own, masked, b, **geometry).to(x.dtype))
    return torch.stack(outputs)


def linear_case(
    *,
    batch: int = 5,
    inputs: int = 40,
    outputs: int = 21,
    num_levels: int = 7,
    level: tuple[int, ...] = (0, 2, 3, 6),
    shared: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    random: bool = False,
):
    """x, bias, level, weight and prune levels of a linear layer."""
    draw = (lambda *shape, dtype: torch.randn(*shape).to(dtype)) if random else integers
    x = draw(1 if shared else len(level), batch, inputs, dtype=dtype)
    weight = draw(outputs, inputs, dtype=dtype)
    b = draw(outputs, dtype=dtype) if bias else None
    return x, b, torch.tensor(level), weight, random_levels(weight.shape, num_levels)


def run_linear(x, bias, level, weight, levels, *, block=16, batch_minor=False, num_levels=7):
    rows = prefix_rows(weight, levels, num_levels, block)
    return grid_linear(x, bias, level, rows, weight.shape[0], block, batch_minor)


def run_conv(
    x, bias, level, weight, levels, *, stride, padding, dilation, groups, block=16, num_levels=7
):
    rows = prefix_rows(weight.flatten(1), levels.flatten(1), num_levels, block)
    shape, kernel = weight.shape[0], list(weight.shape[2:])
    return grid_conv(x, bias, level, rows, shape, block, kernel, stride, padding, dilation, groups)


def conv_case(
    positions: tuple[int, ...],
    channels: int = 4,
    outputs: int = 6,
    kernel: tuple[int, ...] | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    batch: int = 3,
    shared: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    random: bool = False,
):
    """The tensors of a convolution, and its geometry."""
    dimensions = len(positions)
    kernel = kernel or (3,) * dimensions
    level = torch.tensor([0, 2, 3, 6])
    draw = (lambda *shape, dtype: torch.randn(*shape).to(dtype)) if random else integers
    x = draw(1 if shared else len(level), batch, channels, *positions, dtype=dtype)
    weight = draw(outputs, channels // groups, *kernel, dtype=dtype)
    b = draw(outputs, dtype=dtype) if bias else None
    each = {
        name: [value] * dimensions if isinstance(value, int) else list(value)
        for name, value in [("stride", stride), ("padding", padding), ("dilation", dilation)]
    }
    return (x, b, level, weight, random_levels(weight.shape, 7)), each | {"groups": groups}


def check_conv(tensors, geometry, *, filtered: bool = False, **settings):
    y = run_conv(*tensors, **geometry, **settings)
    check(y, slow_conv(*tensors, **geometry), filtered=filtered)


def check(y: Tensor, expected: Tensor, *, filtered: bool) -> None:
    """Integers are multiplied exactly, but for minimal filtering, which rounds."""
    assert y.shape == expected.shape
    if filtered and y.dtype != torch.float64:
        rounding = max(4e-6, torch.finfo(y.dtype).eps)
        assert (y - expected).abs().max() <= rounding * expected.abs().max()
    else:
        assert torch.equal(y, expected)


def check_residual(
    positions, channels, batch, batch_last, own, relu, rest=(), *, shared=False, dtype=torch.float32
):
    """Adding a residual is the same, to the last bit, as adding it to what is written."""
    (x, bias, level, weight, levels), geometry = conv_case(
        positions, channels, *(rest or (19, None, 1, 1)), batch=batch, shared=shared, dtype=dtype
    )
    rows = prefix_rows(weight.flatten(1), levels.flatten(1), 7, 16)
    outputs, kernel = weight.shape[0], list(weight.shape[2:])
    arguments = (x, bias, level, rows, outputs, 16, kernel, *geometry.values())
    scale = torch.rand(outputs) + 0.5
    plain = grid_conv(*arguments, scale)
    residual = torch.randn(plain.shape if own else (1, *plain.shape[1:])).to(dtype)
    if batch_last:
        residual = residual.movedim(1, -1).contiguous().movedim(-1, 1)
    expected = plain + residual
    y = grid_conv(*arguments, scale, relu, residual)
    assert torch.equal(y, expected.relu() if relu else expected)


# Geometries that real networks have, and the corners of the kernel's packing.
GEOMETRIES = {
    "1-d": ((17,), 3, 5, (4,), 1, 2),
    "1-d strided and dilated": ((23,), 3, 5, (3,), 2, 3, 3),
    "1x1": ((5, 6), 8, 6, (1, 1)),
    "1x1 strided": ((5, 6), 8, 6, (1, 1), 2),
    "3x3 padded": ((7, 9), 4, 6, (3, 3), 1, 1),
    "3x3 strided": ((8, 8), 4, 6, (3, 3), 2, 1),
    "7x7 stem": ((16, 15), 3, 4, (7, 7), 2, 3),
    "uneven": ((9, 20), 2, 3, (2, 5), (3, 2), (0, 4), (1, 2)),
    "stride beyond kernel": ((11, 11), 2, 3, (2, 2), 4, 0),
    "dilation and stride share a factor": ((15, 15), 2, 3, (3, 3), 4, 2, 2),
    "patches": ((32, 32), 3, 8, (16, 16), 16),
    "wide line": ((2, 70), 2, 3, (3, 3), 1, 1),
    "one position": ((3, 3), 4, 5, (3, 3)),
    "groups": ((6, 7), 6, 9, (3, 3), 1, 1, 1, 3),
    "depthwise": ((6, 7), 5, 5, (3, 3), 1, 1, 1, 5),
    "depthwise, two outputs a channel": ((6, 7), 4, 8, (3, 3), 2, 1, 1, 4),
    "3-d": ((4, 5, 6), 2, 3, (3, 2, 3), 1, 1),
    "3-d with everything": ((7, 6, 9), 4, 6, (2, 2, 3), (2, 1, 2), (1, 0, 2), (1, 2, 1), 2),
    "all padding": ((1, 1), 2, 3, (3, 3), 1, 2),
}  # fmt: skip


class TestProducts:
    """The grid product; these cases are run again on every narrower instruction set."""

    @pytest.mark.parametrize("batch_minor", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("batch", [1, 5, 16, 17, 64, 100])
    def test_a_linear_layer_is_the_masked_product_at_each_level(self, batch, shared, batch_minor):
        case = linear_case(batch=batch, shared=shared)
        y = run_linear(*case, batch_minor=batch_minor)
        assert torch.equal(y, slow_linear(*case))
        assert y.transpose(1, 2).is_contiguous() if batch_minor else y.is_contiguous()

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_floating_type_is_computed_at_its_precision(self, dtype, shared, bias):
        case = linear_case(batch=19, inputs=300, shared=shared, bias=bias, dtype=dtype)
        y = run_linear(*case)
        assert y.dtype == dtype
        assert torch.equal(y, slow_linear(*case))

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("block", [1, 2, 39, 40, 41, 128, 32767])
    def test_blocks_of_any_size_give_the_same(self, block, shared):
        case = linear_case(shared=shared)
        assert torch.equal(run_linear(*case, block=block), slow_linear(*case))

    @pytest.mark.parametrize("num_levels", [1, 255, 256, 1000])
    def test_grids_of_any_size(self, num_levels):
        last = num_levels - 1
        level = tuple(sorted({0, last // 3, last}))
        case = linear_case(num_levels=num_levels, level=level)
        assert torch.equal(run_linear(*case, num_levels=num_levels), slow_linear(*case))

    @given(
        batch=st.integers(0, 70),
        inputs=st.integers(1, 60),
        outputs=st.integers(1, 40),
        block=st.integers(1, 70),
        shared=st.booleans(),
        batch_minor=st.booleans(),
        level=st.sets(st.integers(0, 6), min_size=1).map(lambda s: tuple(sorted(s))),
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=80)
    def test_a_linear_layer_of_any_size(
        self, batch, inputs, outputs, block, shared, batch_minor, level, dtype
    ):
        case = linear_case(
            batch=batch, inputs=inputs, outputs=outputs, shared=shared, level=level, dtype=dtype
        )
        y = run_linear(*case, block=block, batch_minor=batch_minor)
        assert torch.equal(y, slow_linear(*case))

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("name", GEOMETRIES)
    def test_a_convolution_is_the_masked_convolution_at_each_level(self, name, shared):
        tensors, geometry = conv_case(*GEOMETRIES[name], shared=shared)
        check_conv(tensors, geometry)

    @pytest.mark.parametrize("batch", [1, 5, 16, 17, 64, 100])
    def test_a_convolution_of_any_batch(self, batch):
        tensors, geometry = conv_case((5, 5), 3, 4, padding=1, batch=batch)
        check_conv(tensors, geometry)

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_convolution_of_every_floating_type(self, dtype, shared):
        tensors, geometry = conv_case((6, 5), 3, 18, padding=1, dtype=dtype, shared=shared)
        check_conv(tensors, geometry)

    @pytest.mark.parametrize("block", [1, 5, 128, 32767])
    def test_a_convolution_in_blocks(self, block):
        tensors, geometry = conv_case((6, 5), 3, 4, padding=1, bias=False)
        check_conv(tensors, geometry, block=block)

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("batch", [1, 5, 16, 35])
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize(
        ("positions", "padding"),
        [((13, 11), 1), ((10, 12), 2), ((14, 45), 0), ((10, 10), 1), ((8, 15), 3), ((28, 16), 1)],
    )
    def test_a_convolution_by_minimal_filtering(self, positions, padding, stride, batch, shared):
        tensors, geometry = conv_case(
            positions, 17, 19, stride=stride, padding=padding, batch=batch, shared=shared
        )
        check_conv(tensors, geometry, filtered=True)

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("batch_last", [False, True])
    @pytest.mark.parametrize("batch", [3, 16, 32])
    @pytest.mark.parametrize("channels", [5, 20])  # those of 20 are filtered minimally
    @pytest.mark.parametrize(("positions", "stride"), [((9, 8), 1), ((15, 14), 2)])
    def test_a_residual_is_added_before_the_relu(
        self, positions, stride, channels, batch, batch_last, own, relu
    ):
        rest = (19, None, stride, 1)
        for dtype in DTYPES:
            check_residual(positions, channels, batch, batch_last, own, relu, rest, dtype=dtype)

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("name", GEOMETRIES)
    def test_a_residual_is_added_to_any_convolution(self, name, shared):
        positions, *rest = GEOMETRIES[name]
        check_residual(positions, *rest[:1], 16, True, True, True, rest[1:], shared=shared)

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_minimal_filtering_of_every_floating_type(self, dtype, stride):
        tensors, geometry = conv_case((11, 14), 16, 24, stride=stride, padding=1, dtype=dtype)
        check_conv(tensors, geometry, filtered=True)

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("side", [12, 14])  # tiles of 4, and of 3 and 4
    def test_minimal_filtering_loses_little_precision(self, side, stride):
        tensors, geometry = conv_case(
            (side * stride,) * 2, 64, 64, stride=stride, padding=1, batch=2, random=True
        )
        check_conv(tensors, geometry, filtered=True)

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("batch", [2, 40])
    def test_examples_are_filtered_alike_in_any_batch(self, batch, stride):
        (x, *others), geometry = conv_case(
            (13, 27), 18, 20, stride=stride, padding=1, batch=batch, random=True
        )
        y = run_conv(x, *others, **geometry)
        for number in (1, 3):
            with threads(number):
                assert torch.equal(run_conv(x[:, :1], *others, **geometry), y[:, :1])
                assert torch.equal(run_conv(x, *others, **geometry), y)

    @pytest.mark.parametrize(("positions", "stride", "padding"), [((6, 7), 1, 0), ((13, 7), 2, 1)])
    def test_filtering_notices_an_input_that_is_not_finite_wherever_it_is(
        self, positions, stride, padding
    ):
        (x, *others), geometry = conv_case(
            positions, 16, 16, stride=stride, padding=padding, batch=1
        )
        for position in itertools.product(*map(range, positions)):
            hidden = x.clone()
            hidden[1, 0, 3][position] = math.inf
            with pytest.raises(RuntimeError, match="infinity"):
                run_conv(hidden, *others, **geometry)

    @pytest.mark.parametrize("batch_minor", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("scaled", [False, True])
    def test_a_linear_layer_with_what_follows(self, scaled, relu, shared, batch_minor):
        x, bias, level, weight, levels = case = linear_case(batch=33, shared=shared)
        scale = integers(21) if scaled else None
        rows = prefix_rows(weight, levels, 7, 16)
        y = grid_linear(x, bias, level, rows, 21, 16, batch_minor, scale, relu)
        expected = slow_linear(x, None, *case[2:]) * (scale if scaled else 1) + bias
        assert torch.equal(y, expected.relu() if relu else expected)

    @pytest.mark.parametrize("channels", [3, 18])
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("scaled", [False, True])
    def test_a_convolution_with_what_follows(self, scaled, relu, channels):
        case, geometry = conv_case((10, 11), channels, channels, padding=1, batch=17)
        x, bias, level, weight, levels = case
        scale = integers(channels) if scaled else None
        rows = prefix_rows(weight.flatten(1), levels.flatten(1), 7, 16)
        settings = [geometry[name] for name in ("stride", "padding", "dilation", "groups")]
        y = grid_conv(x, bias, level, rows, channels, 16, [3, 3], *settings, scale, relu)
        expected = slow_conv(x, None, *case[2:], **geometry)
        expected = expected * (scale if scaled else torch.ones(channels))[:, None, None]
        expected = expected + bias[:, None, None]
        check(y, expected.relu() if relu else expected, filtered=channels > 16)

    @given(data=st.data(), dimensions=st.integers(1, 3), groups=st.integers(1, 3))
    @settings(max_examples=80)
    def test_a_convolution_of_any_geometry(self, data, dimensions, groups):
        def each(low, high):
            return tuple(data.draw(st.integers(low, high)) for _ in range(dimensions))

        kernel, dilation, padding = each(1, 3), each(1, 3), each(0, 3)
        positions = tuple(
            data.draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 9))
            for k, d, p in zip(kernel, dilation, padding, strict=True)
        )
        tensors, geometry = conv_case(
            positions,
            groups * data.draw(st.integers(1, 3)),
            groups * data.draw(st.integers(1, 3)),
            kernel,
            each(1, 4),
            padding,
            dilation,
            groups,
            batch=data.draw(st.sampled_from([1, 2, 17])),
            shared=data.draw(st.booleans()),
            dtype=data.draw(st.sampled_from(DTYPES)),
        )
        check_conv(tensors, geometry)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_all_values_of_16_bit_floats_are_read_and_rounded_as_torch_does(self, dtype):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        every = every[every.isfinite()]
        for factor in [1.0, 1 / 3, -1.171875, 2.0**-12, 1.5 * 2.0**-9, 1.9 * 2.0**7]:
            weight = torch.tensor([[factor]], dtype=dtype)
            never = torch.ones(1, 1, dtype=torch.uint8)
            rows = prefix_rows(weight, never, 1, 1)
            for batch_minor in (False, True):
                y = grid_linear(
                    every.reshape(1, -1, 1), None, torch.tensor([0]), rows, 1, 1, batch_minor
                )
                expected = (every.float() * weight.float().item()).to(dtype)
                torch.testing.assert_close(
                    y.flatten(), expected, rtol=0, atol=0, equal_nan=True, msg=f"times {factor}"
                )

    @pytest.mark.parametrize("strange", [torch.inf, -torch.inf, torch.nan])
    def test_infinity_and_nan_are_refused_because_pruned_weights_would_hide_them(self, strange):
        weight = torch.ones(3, 5)
        rows = prefix_rows(weight, torch.zeros(3, 5, dtype=torch.uint8), 1, 5)
        x = torch.ones(1, 9, 5)
        x[0, 7, 2] = strange
        with pytest.raises(RuntimeError, match="infinity or NaN"):
            grid_linear(x, None, torch.tensor([0]), rows, 3, 5, True)

    def test_small_half_numbers_are_read_exactly_where_denormals_are_flushed(self):
        every = torch.arange(1 << 15, dtype=torch.int16).view(torch.float16)[:0x7C00]
        expected = every.clone()
        one = torch.ones(1, 1, dtype=torch.float16)
        rows = prefix_rows(one, torch.ones(1, 1, dtype=torch.uint8), 1, 1)
        if not torch.set_flush_denormal(True):
            pytest.skip("this machine cannot flush denormals")
        try:
            x = every.reshape(1, -1, 1)
            y = grid_linear(x, None, torch.tensor([0]), rows, 1, 1, True)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(y.flatten(), expected)

    def test_products_in_double_precision_are_not_rounded_to_single(self):
        case = linear_case(inputs=200, dtype=torch.float64, random=True)
        torch.testing.assert_close(run_linear(*case), slow_linear(*case), rtol=1e-13, atol=1e-12)

    @pytest.mark.parametrize("shared", [False, True])
    def test_real_numbers_are_summed_to_rounding(self, shared):
        case = linear_case(batch=33, inputs=500, outputs=50, shared=shared, random=True)
        expected = slow_linear(*(t.double() if t.is_floating_point() else t for t in case))
        y = run_linear(*case, block=128)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[:-1])
def test_narrower_instruction_sets_compute_the_same(instruction_set):
    check_on(instruction_set, f"{__file__}::TestProducts")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "batch last", "offset"])
def test_inputs_may_have_any_strides(layout):
    x, bias, level, weight, levels = linear_case(batch=6, inputs=10)
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        x = integers(4, 12, 30)[:, ::2, ::3]
    elif layout == "expanded":
        x = integers(4, 1, 10).expand(4, 6, 10)
    elif layout == "batch last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        x = integers(4 * 60 + 1)[1:].reshape(4, 6, 10)
    for block in (4, 16):
        y = run_linear(x, bias, level, weight, levels, block=block)
        assert torch.equal(y, slow_linear(x, bias, level, weight, levels))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_images_may_be_channels_last_flipped_or_batch_last(memory_format):
    tensors, geometry = conv_case((5, 6), 3, 4, padding=1, shared=True)
    image = tensors[0][0].contiguous(memory_format=memory_format)
    for x in (image, image[:, :, ::2], image.movedim(0, -1).contiguous().movedim(-1, 0)):
        check_conv((x.unsqueeze(0), *tensors[1:]), geometry)


def test_weights_and_levels_may_have_any_strides():
    x, bias, level, weight, levels = linear_case()
    column_major = (weight.t().contiguous().t(), levels.t().contiguous().t())
    y = run_linear(x, bias, level, *column_major)
    assert torch.equal(y, slow_linear(x, bias, level, weight, levels))


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("shared", [False, True])
def test_products_do_not_depend_on_the_number_of_threads(shared, batch):
    linear = linear_case(batch=batch, inputs=300, outputs=70, shared=shared, random=True)
    conv, geometry = conv_case((9, 9), 8, 40, padding=1, shared=shared, batch=batch, random=True)
    results = []
    for number in (1, 2, 4):
        with threads(number):
            results.append((run_linear(*linear), run_conv(*conv, **geometry)))
    for y_linear, y_conv in results[1:]:
        assert torch.equal(y_linear, results[0][0])
        assert torch.equal(y_conv, results[0][1])


@pytest.mark.parametrize("shared", [False, True])
def test_products_do_not_depend_on_how_the_batch_is_split(shared):
    x, *linear = linear_case(batch=70, inputs=300, outputs=33, shared=shared, random=True)
    (image, *conv), geometry = conv_case((7, 6), 5, 20, shared=shared, batch=70, random=True)
    y, z = run_linear(x, *linear), run_conv(image, *conv, **geometry)
    for step in (1, 3, 16, 33):
        parts = [run_linear(part, *linear) for part in x.split(step, dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), y)
        parts = [run_conv(part, *conv, **geometry) for part in image.split(step, dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), z)


@pytest.mark.parametrize("shared", [False, True])
def test_a_level_does_not_depend_on_which_others_are_asked_for(shared):
    x, bias, level, *matrix = linear_case(inputs=300, shared=shared, random=True)
    y = run_linear(x, bias, level, *matrix)
    for chosen in ([1], [0, 3], [2, 3]):
        own = x if shared else x[chosen]
        assert torch.equal(run_linear(own, bias, level[chosen], *matrix), y[chosen])


def test_an_empty_batch_gives_no_outputs():
    assert run_linear(*linear_case(batch=0)).shape == (4, 0, 21)
    tensors, geometry = conv_case((5, 5), batch=0)
    assert run_conv(*tensors, **geometry).shape == (4, 0, 6, 3, 3)


@pytest.mark.parametrize("shared", [False, True])
def test_inputs_too_large_to_be_packed_together_are_packed_a_few_at_a_time(shared):
    (x, *tensors), geometry = conv_case(
        (1 << 22,), 1, 1, (1 << 16,), 1 << 16, batch=1, shared=shared
    )
    y = run_conv(x.expand(-1, 20, -1, -1), *tensors, **geometry, block=1 << 14)
    expected = slow_conv(x, *tensors, **geometry)
    assert torch.equal(y, expected.expand(-1, 20, -1, -1))


@pytest.mark.parametrize("block", [1, 7, 30, 31, 100])
@pytest.mark.parametrize("num_levels", [1, 9, 255, 256, 1000])
def test_prefix_rows_hold_every_masked_matrix(num_levels, block):
    weight = torch.randn(13, 30)
    levels = random_levels(weight.shape, num_levels)
    values, columns, starts, counts = prefix_rows(weight, levels, num_levels, block)
    blocks = -(-30 // block)
    assert counts.shape == (num_levels, 13 * blocks)
    assert len(values) == len(columns) == starts[-2] == (levels > 0).sum()
    assert starts[-1] == 30
    for j in {0, num_levels // 2, num_levels - 1}:
        dense = torch.zeros(13, 30)
        for cell in range(13 * blocks):
            row, first = cell % 13, cell // 13 * block
            begin = int(starts[cell])
            alive = slice(begin, begin + int(counts[j, cell]))
            dense[row, first + columns[alive].long()] = values[alive]
        assert torch.equal(dense, torch.where(levels > j, weight, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefix_rows_keep_every_type_exactly(dtype):
    weight = torch.randn(3, 5).to(dtype)
    never = torch.full((3, 5), 4, dtype=torch.uint8)
    values, columns, *_ = prefix_rows(weight, never, 4, 5)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(values.reshape(3, 5), weight.to(values.dtype))
    assert columns.tolist() == [*range(5)] * 3


def test_prefix_rows_do_not_depend_on_the_number_of_threads():
    weight = torch.randn(300, 500)
    levels = random_levels(weight.shape, 100)
    results = []
    for number in (1, 2, 4):
        with threads(number):
            results.append(prefix_rows(weight, levels, 100, 128))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("batch_minor", [False, True])
@pytest.mark.parametrize("x_dim", [None, 0, 2])
def test_a_vmapped_linear_layer_is_the_loop_over_levels(x_dim, batch_minor):
    x, bias, level, weight, levels = linear_case(shared=x_dim is None, random=True)
    rows = prefix_rows(weight, levels, 7, 16)

    def layer(level, x):
        return grid_linear(x, bias, level.reshape(1), rows, 21, 16, batch_minor)

    if x_dim is None:
        y = torch.vmap(layer, (0, None))(level, x)
        loop = [layer(j, x) for j in level]
    else:
        y = torch.vmap(layer, (0, x_dim))(level, x.unsqueeze(1).movedim(0, x_dim))
        loop = [layer(j, own.unsqueeze(0)) for j, own in zip(level, x, strict=True)]
    torch.testing.assert_close(y, torch.stack(loop), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual_dim", [None, 0, 2])
def test_a_vmapped_residual_is_that_of_each_level(residual_dim):
    (x, bias, level, weight, levels), geometry = conv_case((5, 6), padding=1)
    rows = prefix_rows(weight.flatten(1), levels.flatten(1), 7, 16)
    settings = (rows, 6, 16, [3, 3], *geometry.values(), None, True)
    residual = torch.randn(1 if residual_dim is None else 4, 3, 6, 5, 6)
    expected = grid_conv(x, bias, level, *settings, residual)
    own = residual if residual_dim is None else residual.unsqueeze(1).movedim(0, residual_dim)
    y = torch.vmap(
        lambda level, x, residual: grid_conv(x, bias, level.reshape(1), *settings, residual),
        (0, 0, residual_dim),
    )(level, x.unsqueeze(1), own)
    assert torch.equal(y.squeeze(1), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_a_vmapped_convolution_is_the_loop_over_levels(shared):
    (x, bias, level, weight, levels), geometry = conv_case((5, 6), padding=1, shared=shared)

    def layer(level, x):
        return run_conv(x, bias, level.reshape(1), weight, levels, **geometry)

    rows = prefix_rows(weight.flatten(1), levels.flatten(1), 7, 16)

    def vmapped(level, x):
        sizes = [geometry[name] for name in ("stride", "padding", "dilation", "groups")]
        return grid_conv(x, bias, level.reshape(1), rows, 6, 16, [3, 3], *sizes)

    own = x if shared else x.unsqueeze(1)
    y = torch.vmap(vmapped, (0, None if shared else 0))(level, own)
    loop = [layer(j, x if shared else x[k : k + 1]) for k, j in enumerate(level)]
    assert torch.equal(y, torch.stack(loop))


def test_vmap_over_anything_but_the_level_is_refused():
    x, bias, level, weight, levels = linear_case()
    rows = prefix_rows(weight, levels, 7, 16)
    with pytest.raises(NotImplementedError, match="over x and level only"):
        torch.vmap(lambda b: grid_linear(x, b, level, rows, 21, 16, False))(bias.expand(4, -1))
    with pytest.raises(NotImplementedError, match="over x and level only"):
        torch.vmap(lambda own: grid_linear(own, bias, level[:1], rows, 21, 16, False))(
            x.unsqueeze(1)
        )
    with pytest.raises(NotImplementedError, match="one level a call"):
        torch.vmap(lambda j: grid_linear(x[:1], bias, j, rows, 21, 16, False))(level.reshape(2, 2))


def registered_calls():
    """One call of every operator: name and arguments."""
    scores = torch.randn(50)
    nothing = torch.zeros(0, dtype=torch.int64)
    counts = torch.zeros(1 << 15, dtype=torch.int64)
    yield "magnitude_histogram", (scores, torch.float32, nothing, 16, 15, counts)
    top = scores.abs().view(torch.int32).long() >> 16
    prefixes = top.unique()[3:5]
    brackets = (prefixes << 16, (prefixes << 16) + 9999, 1000, torch.zeros(2, dtype=torch.int64))
    yield "magnitude_collect", (scores, torch.float32, prefixes, 16, *brackets)
    key = scores.abs().median().view(torch.int32).reshape(1).long()
    cut = (torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([True]))
    cut = (key, *cut, torch.zeros(1, dtype=torch.int64))
    yield "assign_levels", ([scores, scores[:0], scores[3:5]], torch.float32, *cut)
    x, bias, level, weight, levels = linear_case()
    yield "prefix_rows", (weight, levels, 7, 16)
    rows = list(prefix_rows(weight, levels, 7, 16))
    yield "grid_linear", (x, bias, level, rows, 21, 16, False)
    yield "grid_linear", (x[:1], None, level, rows, 21, 16, True)
    for positions in [(7,), (5, 6), (4, 5, 3)]:
        (x, bias, level, weight, levels), geometry = conv_case(positions, padding=1)
        rows = list(prefix_rows(weight.flatten(1), levels.flatten(1), 7, 16))
        sizes = [geometry[name] for name in ("stride", "padding", "dilation", "groups")]
        arguments = (x, bias, level, rows, 6, 16, [3] * len(positions), *sizes)
        yield "grid_conv", arguments
        residual = torch.randn(1, 3, 6, *positions)
        yield "grid_conv", (*arguments, torch.ones(6), True, residual)


CALLS = list(registered_calls())


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_operators_are_registered_as_torch_wants_them(name, arguments):
    torch.library.opcheck(getattr(torch.ops.confprune, name).default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_traced_shapes_strides_and_types_are_the_real_ones(dtype):
    x, bias, level, weight, levels = linear_case(dtype=dtype)
    (image, b, _, kernel, kernel_levels), geometry = conv_case((6, 5), padding=1, dtype=dtype)

    def everything(x, bias, level, weight, levels, image, b, kernel, kernel_levels):
        return (
            run_linear(x, bias, level, weight, levels),
            run_linear(x, bias, level, weight, levels, batch_minor=True),
            run_conv(image, b, level, kernel, kernel_levels, **geometry),
        )

    arguments = (x, bias, level, weight, levels, image, b, kernel, kernel_levels)
    with FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()) as mode:
        traced = everything(*(mode.from_tensor(a, static_shapes=True) for a in arguments))
    for fake, real in zip(traced, everything(*arguments), strict=True):
        assert fake.shape == real.shape
        assert fake.stride() == real.stride()
        assert fake.dtype == real.dtype


def test_compiled_functions_may_call_the_operators():
    x, bias, level, weight, levels = linear_case()
    rows = list(prefix_rows(weight, levels, 7, 16))

    def network(x):
        return grid_linear(x.relu(), bias, level, rows, 21, 16, False).sum(-1)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), network(x))


def linear_arguments(**changes):
    x, bias, level, weight, levels = linear_case()
    rows = list(prefix_rows(weight, levels, 7, 16))
    arguments = {
        "x": x,
        "bias": bias,
        "level": level,
        "rows": rows,
        "outputs": 21,
        "block": 16,
        "batch_minor": False,
    }
    return arguments | changes


ROWS = linear_arguments()["rows"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(5, 40)}, ValueError, r"x \[1 or K, N, in\], got \[5, 40\]"),
        ({"x": torch.zeros(2, 5, 40)}, ValueError, "x has 2 inputs for 4 levels"),
        ({"x": torch.zeros(4, 5, 60)}, ValueError, r"rows were not made .* \[21, 60\]"),
        ({"x": torch.zeros(4, 5, 0)}, ValueError, "no columns"),
        ({"x": torch.zeros(4, 5, 40).double()}, ValueError, "from a Double matrix"),
        ({"x": torch.zeros(4, 5, 40).long()}, TypeError, "x must be float32, .* got Long"),
        ({"bias": torch.zeros(20)}, ValueError, r"bias has shape \[20\] for 21 outputs"),
        ({"bias": torch.zeros(21, 1)}, ValueError, "bias has shape"),
        ({"level": torch.tensor([0, 1, 2, 3]).int()}, TypeError, "level must be .* int64"),
        ({"level": torch.arange(8)[::2]}, TypeError, "level must be a contiguous"),
        ({"level": torch.tensor([0, 2, 2, 3])}, ValueError, "strictly increasing"),
        ({"level": torch.tensor([0, 2, 3, 7])}, ValueError, "level 7 is not on the grid of 7"),
        ({"level": torch.tensor([-1, 2, 3, 6])}, ValueError, "level -1 is not on the grid"),
        ({"rows": ROWS[:3]}, ValueError, "the four tensors of prefix_rows"),
        ({"rows": [ROWS[0].double(), *ROWS[1:]]}, ValueError, "rows were not made"),
        ({"x": torch.zeros(4, 5, 29)}, ValueError, r"rows were not made .* \[21, 29\]"),
        ({"rows": [ROWS[0], ROWS[1].int(), *ROWS[2:]]}, ValueError, "rows were not made"),
        ({"rows": [ROWS[0][:-1], *ROWS[1:]]}, ValueError, "rows were not made"),
        ({"rows": [*ROWS[:3], ROWS[3].t().contiguous().t()]}, ValueError, "rows were not made"),
        ({"block": 0}, ValueError, "with block 0"),
        ({"block": 8}, ValueError, "with block 8"),
        ({"outputs": 20}, ValueError, "shape .20, 40."),
    ],
)
def test_a_linear_layer_with_wrong_arguments_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        grid_linear(**linear_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4, 3, 4, 5)}, r"grid_conv takes x \[1 or K, N, channels"),
        ({"kernel": [3, 3, 3]}, "as many kernel sizes as positions"),
        ({"kernel": [3, 6]}, "kernel is larger than the padded input in dimension 1"),
        ({"kernel": [3, 2]}, "rows were not made by prefix_rows"),
        ({"kernel": [3, 0]}, "must be positive"),
        ({"stride": [1]}, "need 2 values each"),
        ({"stride": [1, 0]}, "must be positive"),
        ({"dilation": [1, 0]}, "must be positive"),
        ({"padding": [0, -1]}, "padding must not be negative"),
        ({"groups": 0}, "0 groups do not divide"),
        ({"groups": 4}, "4 groups do not divide 4 channels and 6 outputs"),
        ({"x": torch.zeros(4, 3, 0, 5, 5)}, "no columns"),
        ({"x": torch.zeros(4, 3, 4, 0, 5), "padding": [2, 0]}, "no positions in dimension 0"),
        ({"residual": torch.zeros(4, 3, 6, 5, 5)}, r"residual is Float of shape \[4, 3, 6, 5, 5\]"),
        ({"residual": torch.zeros(2, 3, 6, 3, 3)}, r"for outputs Float of shape \[4, 3, 6, 3, 3\]"),
        ({"residual": torch.zeros(4, 3, 6, 3, 3).double()}, "residual is Double"),
    ],
)
def test_a_convolution_with_wrong_arguments_is_refused(changes, message):
    (x, bias, level, weight, levels), geometry = conv_case((5, 5))
    rows = list(prefix_rows(weight.flatten(1), levels.flatten(1), 7, 16))
    arguments = {"x": x, "bias": bias, "level": level, "rows": rows, "outputs": 6, "block": 16}
    with pytest.raises(ValueError, match=message):
        grid_conv(**(arguments | {"kernel": [3, 3]} | geometry | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(2, 3, 1)}, ValueError, "weight must be a matrix, got 3"),
        ({"weight": torch.zeros(2, 3).int()}, TypeError, "weight must be float32"),
        ({"levels": torch.zeros(3, 2, dtype=torch.uint8)}, ValueError, r"levels has \[3, 2\]"),
        ({"levels": torch.zeros(2, 3).long()}, TypeError, "levels must be uint8 or int16"),
        ({"levels": torch.full((2, 3), 6).byte()}, ValueError, "prune level 6 .* 5 levels"),
        ({"levels": torch.full((2, 3), -1).short()}, ValueError, "prune level -1 .* 5 levels"),
        ({"num_levels": 0}, ValueError, r"num_levels must be in \[1, 32767\]"),
        ({"num_levels": 32768}, ValueError, "num_levels must be in"),
        ({"block": 0}, ValueError, r"block must be in \[1, 32767\]"),
        ({"block": 32768}, ValueError, "block must be in"),
    ],
)
def test_prefix_rows_of_wrong_arguments_are_refused(changes, error, message):
    levels = torch.zeros(2, 3, dtype=torch.uint8)
    arguments = {"weight": torch.zeros(2, 3), "levels": levels, "num_levels": 5, "block": 2}
    with pytest.raises(error, match=message):
        prefix_rows(**(arguments | changes))


def longs(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": torch.zeros(3).int()}, ValueError, "cannot hold the magnitudes of Int"),
        ({"scores": torch.zeros(3).double()}, ValueError, "cannot hold the magnitudes of Double"),
        ({"key": torch.float16}, ValueError, "key type Half cannot hold"),
        ({"scores": torch.zeros([1] * 9)}, ValueError, "9 dimensions; at most 8"),
        ({"shift": 17}, ValueError, "leave the 31 bits of a key"),
        ({"shift": -1}, ValueError, "leave the 31 bits of a key"),
        ({"digit_bits": 0}, ValueError, "leave the 31 bits"),
        ({"shift": 15}, ValueError, "only the first digit of a key has no prefixes"),
        ({"prefixes": longs(1).int()}, TypeError, "prefixes must be a contiguous int64"),
        (
            {"prefixes": longs(1)},
            ValueError,
            "prefixes must be increasing numbers of 0 bits, got 1",
        ),
        ({"counts": torch.zeros(7).long()}, ValueError, "counts holds 7 cells, not 32768"),
        ({"counts": torch.zeros(1 << 15)}, TypeError, "counts must be a contiguous int64"),
    ],
)
def test_a_histogram_of_wrong_arguments_is_refused(changes, error, message):
    arguments = {
        "scores": torch.zeros(3),
        "key": torch.float32,
        "prefixes": longs(),
        "shift": 16,
        "digit_bits": 15,
        "counts": torch.zeros(1 << 15, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        torch.ops.confprune.magnitude_histogram(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": torch.zeros(3).int()}, ValueError, "cannot hold the magnitudes of Int"),
        ({"shift": 31}, ValueError, "shift 31 leaves the 31 bits of a key"),
        ({"prefixes": longs(1 << 15)}, ValueError, "increasing numbers of 15 bits, got 32768"),
        (
            {"prefixes": longs(2, 1)} | dict.fromkeys(("low", "high", "below"), longs(0, 0)),
            ValueError,
            "increasing numbers of 15 bits, got 1",
        ),
        ({"prefixes": longs(-1)}, ValueError, "increasing numbers of 15 bits, got -1"),
        ({"prefixes": longs(1).int()}, TypeError, "prefixes must be a contiguous int64"),
        ({"low": longs(0, 1)}, ValueError, "disagree in size"),
        ({"below": longs()}, ValueError, "disagree in size"),
    ],
)
def test_collecting_with_wrong_arguments_is_refused(changes, error, message):
    arguments = {
        "scores": torch.zeros(3),
        "key": torch.float32,
        "prefixes": longs(1),
        "shift": 16,
        "low": longs(0),
        "high": longs(0),
        "limit": 10,
        "below": longs(0),
    }
    with pytest.raises(error, match=message):
        torch.ops.confprune.magnitude_collect(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": [torch.zeros(3), torch.zeros(3).int()]}, ValueError, "cannot hold"),
        ({"thresholds": longs(1, 2)}, ValueError, "disagree in size"),
        ({"first_level": longs(0)}, ValueError, "disagree in size"),
        ({"first_level": longs(0, 3)}, ValueError, "first_level"),
        ({"first_level": longs(-1, 2)}, ValueError, "first_level"),
        ({"first_level": longs(2, 0)}, ValueError, "first_level"),
        ({"thresholds": longs(-5)}, ValueError, "thresholds must be increasing keys"),
        ({"thresholds": longs(1 << 31)}, ValueError, "increasing keys of 31 bits, got 2147483648"),
        ({"straddled": longs(1)}, TypeError, "straddled must be a contiguous bool"),
        ({"ties": torch.zeros(32768).long()}, ValueError, "at most 32767 levels"),
        ({"ties": longs()}, ValueError, "thresholds holds 1 keys for 0 levels"),
        ({"ranks": torch.zeros(1)}, TypeError, "ranks must be a contiguous int64"),
    ],
)
def test_assigning_levels_with_wrong_arguments_is_refused(changes, error, message):
    arguments = {
        "scores": [torch.zeros(3)],
        "key": torch.float32,
        "thresholds": longs(5),
        "first_level": longs(0, 2),
        "ties": longs(1, 2),
        "straddled": torch.tensor([True]),
        "ranks": longs(0),
    }
    with pytest.raises(error, match=message):
        torch.ops.confprune.assign_levels(**(arguments | changes))
