"""The CUDA kernels of the masked product and of the masked weights, run on the CPU in lockstep."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import FLAGS, check_sanitized, kernels
from torch import Tensor

import confprune.ops  # noqa: F401, the CPU's operators

pytestmark = pytest.mark.usefixtures("one_thread")

ELEMENTS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # by number


class GridLinear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "levels", "level")),
        *((name, ctypes.c_void_p) for name in ("scale", "bias", "y")),
        *((name, ctypes.c_int) for name in ("element", "follow")),
        *((name, ctypes.c_int64) for name in ("num_levels", "batch", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("x_level_stride", "x_stride")),
        *((name, ctypes.c_int64) for name in ("weight_stride", "levels_stride")),
        ("relu", ctypes.c_bool),
    ]


class MaskedWeights(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "levels", "level", "out")),
        ("element", ctypes.c_int),
        ("wide_levels", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("size", "num_levels")),
    ]


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def grid_linear(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    level: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    **device: Any,
) -> Tensor:
    """As the kernel computes it; `x` is [1 or K, N, inputs]."""
    outputs, inputs = weight.shape
    y = x.new_full((len(level), x.shape[1], outputs), 7.25)
    follow = bias if scale is None else scale
    product = GridLinear(
        *(pointer(t) for t in (x, weight, levels, level, scale, bias, y)),
        ELEMENTS.index(x.dtype),
        0 if follow is None else ELEMENTS.index(follow.dtype),
        *(len(level), x.shape[1], inputs, outputs),
        *(x.stride(0) if len(x) > 1 else 0, x.stride(1), weight.stride(0), levels.stride(0)),
        relu,
    )
    kernels(**device).cuda_grid_linear(ctypes.byref(product))
    return y


def reference(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    level: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Masked weights, level by level, in float64."""
    slices = []
    for k, j in enumerate(level.tolist()):
        masked = torch.where(levels.long() > j, weight, 0).double()
        y = x[k if len(x) > 1 else 0].double() @ masked.T
        y = y if scale is None else y * scale.double()
        y = y if bias is None else y + bias.double()
        slices.append(y.relu() if relu else y)
    return torch.stack(slices)


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small ones, whose products and sums are exact in every type."""
    return torch.randint(-2, 3, shape).to(dtype)


def random_case(
    outputs: int, inputs: int, batch: int, num_levels: int, dtype: torch.dtype, shared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = integers(1 if shared else num_levels, batch, inputs, dtype=dtype)
    levels = torch.randint(0, 256, (outputs, inputs)).to(torch.uint8)
    level = torch.randperm(256)[:num_levels].sort().values
    return x, integers(outputs, inputs, dtype=dtype), levels, level


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize(
    ("outputs", "inputs", "batch", "num_levels"),
    [(1, 1, 1, 1), (17, 33, 5, 3), (70, 48, 16, 9), (130, 80, 33, 4), (20, 64, 130, 2)],
)
def test_integers_are_exact(outputs, inputs, batch, num_levels, dtype, shared):
    case = random_case(outputs, inputs, batch, num_levels, dtype, shared)
    assert torch.equal(grid_linear(*case).double(), reference(*case))


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("batch", [1, 8, 9, 16, 30, 64, 100, 129])
def test_any_number_of_tokens(batch, dtype):
    case = random_case(40, 32, batch, 3, dtype, shared=False)
    assert torch.equal(grid_linear(*case).double(), reference(*case))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("num_levels", [2, 7, 33])
def test_any_number_of_levels(num_levels, dtype, shared):
    case = random_case(33, 40, 4, num_levels, dtype, shared)
    assert torch.equal(grid_linear(*case).double(), reference(*case))


@pytest.mark.parametrize("shared_bytes", [99 << 10, 227 << 10])
@pytest.mark.parametrize("multiprocessors", [1, 500])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_tiles_of_all_devices_give_the_same_bits(dtype, multiprocessors, shared_bytes):
    x, weight = torch.randn(4, 40, 96).to(dtype), torch.randn(140, 96).to(dtype)
    levels = torch.randint(0, 8, (140, 96)).to(torch.uint8)
    level = torch.tensor([0, 2, 3, 6])
    found = grid_linear(
        x, weight, levels, level, multiprocessors=multiprocessors, shared_bytes=shared_bytes, seed=1
    )
    assert torch.equal(found, grid_linear(x, weight, levels, level))


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_a_result_depends_neither_on_the_batch_nor_on_other_levels(dtype):
    x, weight = torch.randn(5, 20, 64).to(dtype), torch.randn(30, 64).to(dtype)
    levels = torch.randint(0, 8, (30, 64)).to(torch.uint8)
    level = torch.tensor([0, 2, 3, 5, 7])
    found = grid_linear(x, weight, levels, level)
    for k in range(5):
        one = grid_linear(x[k : k + 1, 3:5].clone(), weight, levels, level[k : k + 1])
        assert torch.equal(one[0], found[k, 3:5])


@pytest.mark.parametrize("follow", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_what_follows_the_product(dtype, follow):
    case = random_case(21, 24, 10, 3, dtype, shared=False)
    scale, bias = integers(21, dtype=follow), integers(21, dtype=follow)
    for extra in [
        {"scale": scale},
        {"bias": bias},
        {"relu": True},
        {"scale": scale, "bias": bias, "relu": True},
    ]:
        assert torch.equal(grid_linear(*case, **extra).double(), reference(*case, **extra))


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_random_numbers_are_near(dtype):
    x, weight = torch.randn(3, 18, 200).to(dtype), torch.randn(50, 200).to(dtype)
    levels = torch.randint(0, 4, (50, 200)).to(torch.uint8)
    level = torch.tensor([0, 1, 2])
    expected = reference(x, weight, levels, level)
    error = (grid_linear(x, weight, levels, level).double() - expected).norm() / expected.norm()
    assert error < {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_the_operator_of_the_cpu_gives_the_same(dtype):
    x, weight = torch.randn(4, 9, 50).to(dtype), torch.randn(24, 50).to(dtype)
    levels = torch.randint(0, 8, (24, 50)).to(torch.uint8)
    level, bias = torch.tensor([0, 2, 3, 6]), torch.randn(24).to(dtype)
    rows = torch.ops.confprune.prefix_rows(weight, levels, 8, 16)
    expected = torch.ops.confprune.grid_linear(x, bias, level, rows, 24, 16, False)
    found = grid_linear(x, weight, levels, level, bias=bias)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_all_pruned_none_pruned_and_levels_beyond_bytes(dtype):
    x, weight = integers(6, 9, 32, dtype=dtype), integers(18, 32, dtype=dtype)
    levels = torch.tensor([0, 1, 254, 255], dtype=torch.uint8).repeat(18, 8)
    level = torch.tensor([-1, 0, 253, 254, 255, 1 << 40])
    found = grid_linear(x, weight, levels, level)
    assert torch.equal(found.double(), reference(x, weight, levels, level))
    assert found[-2:].eq(0).all()
    assert torch.equal(found[0].double(), x[0].double() @ weight.double().T)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_a_zero_times_infinity_is_nan_as_in_the_masked_network(dtype, relu):
    x, weight, levels, level = random_case(20, 32, 12, 3, dtype, shared=False)
    x[0, 3, 5], x[1, 4, 7], x[2, 11, 31] = torch.inf, torch.nan, -torch.inf
    weight[2, 5], levels[2, 5] = torch.inf, 0  # an infinite weight is pruned like any other
    level = torch.tensor([0, 100, 200])
    found = grid_linear(x, weight, levels, level, relu=relu)
    torch.testing.assert_close(
        found.double(),
        reference(x, weight, levels, level, relu=relu),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    assert found.isnan().any(-1).sum() == 3


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_within_larger_tensors(dtype, offset):
    x, weight, levels, level = random_case(19, 48, 6, 3, dtype, shared=False)

    def within(tensor: Tensor) -> Tensor:
        room = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 16)
        room = room[..., offset : offset + tensor.shape[-1]]
        return room.copy_(tensor)

    found = grid_linear(within(x), within(weight), within(levels), level)
    assert torch.equal(found.double(), reference(x, weight, levels, level))


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_empty_products(dtype):
    level = torch.tensor([0, 1])
    for outputs, batch in [(0, 3), (3, 0)]:
        case = random_case(outputs, 8, batch, 2, dtype, shared=True)
        assert grid_linear(*case).shape == (2, batch, outputs)
    x, weight = torch.zeros(1, 3, 0, dtype=dtype), torch.zeros(4, 0, dtype=dtype)
    bias = integers(4, dtype=dtype)
    levels = torch.zeros(4, 0, dtype=torch.uint8)
    assert grid_linear(x, weight, levels, level, bias=bias).eq(bias).all()
    assert grid_linear(x, weight, levels, level[:0]).shape == (0, 3, 4)


@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 10)),
    st.sampled_from(ELEMENTS),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=40)
def test_products_of_any_shape(sizes, dtype, shared, relu, seed):
    torch.manual_seed(seed)
    case = random_case(*sizes, dtype, shared)
    follow = {"bias": integers(sizes[0], dtype=dtype), "relu": relu}
    found = grid_linear(*case, **follow, multiprocessors=1 + seed % 200, seed=seed)
    assert torch.equal(found.double(), reference(*case, **follow))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 4096, 4100])
@pytest.mark.parametrize("offset", [0, 1])
def test_masked_weights(size, offset, dtype, wide):
    weight = torch.randn(size + offset).to(dtype)[offset:]
    high = 1000 if wide else 256
    levels = torch.randint(0, high, (size,)).to(torch.int16 if wide else torch.uint8)
    level = torch.tensor([-1, 0, 17, high - 2, high - 1, 1 << 40])
    if size:
        weight[0] = torch.inf
    out = torch.full((len(level), size), 7.25, dtype=dtype)
    masked = MaskedWeights(
        *(t.data_ptr() for t in (weight, levels, level, out)),
        *(ELEMENTS.index(dtype), wide, size, len(level)),
    )
    kernels().cuda_masked_weights(ctypes.byref(masked))
    assert torch.equal(out, torch.where(levels.long() > level[:, None], weight, 0))


@pytest.mark.skipif(FLAGS in os.environ, reason="runs within itself")
def test_no_access_outside_of_memory():
    """Some of the tests above, again under AddressSanitizer."""
    check_sanitized(__file__, "exact or larger or masked_weights or empty", "address")


@pytest.mark.skipif(FLAGS in os.environ, reason="runs within itself")
def test_no_races():
    """Some of the tests above, again under ThreadSanitizer."""
    check_sanitized(__file__, "exact and 17-33 or larger or 4100", "thread")
