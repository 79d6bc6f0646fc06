"""Grid products by masked weights written out, against the operators' own references."""

from __future__ import annotations

import pytest
import torch
from elements import INTEGERS
from test_ops import (
    DTYPES,
    GEOMETRIES,
    conv_case,
    integers,
    linear_case,
    random_levels,
    slow_conv,
    slow_linear,
)

from confprune.grid import materialised, on_cuda
from confprune.grid.materialised import grid_conv, grid_linear


def run_linear(x, bias, level, weight, levels, **settings):
    return grid_linear(x, weight, levels, level, bias, **settings)


@pytest.fixture(params=[1, 1 << 30], ids=["a level at a time", "all levels at once"])
def budget(request):
    return request.param


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_is_the_masked_product_at_each_level(dtype, bias, shared, budget):
    case = linear_case(bias=bias, shared=shared, dtype=dtype)
    y = run_linear(*case, budget=budget)
    assert torch.equal(y, slow_linear(*case))
    assert y.is_contiguous()


@pytest.mark.parametrize("bias", [False, True])
def test_one_input_for_many_outputs(bias, budget):
    case = linear_case(outputs=300, shared=True, bias=bias)
    assert torch.equal(run_linear(*case, budget=budget), slow_linear(*case))


@pytest.mark.parametrize("num_levels", [255, 300])
@pytest.mark.parametrize("outputs", [21, 300])
def test_transposed_weights_stay_as_they_lie(outputs, num_levels):
    x, bias, level, weight, levels = linear_case(outputs=outputs, num_levels=num_levels)
    column_major = (weight.t().contiguous().t(), levels.t().contiguous().t())
    assert torch.equal(
        run_linear(x, bias, level, *column_major), slow_linear(x, bias, level, weight, levels)
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_linear_layer_with_what_follows(scaled, relu, bias, shared, budget):
    x, b, level, weight, levels = case = linear_case(shared=shared, bias=bias)
    scale = integers(21) if scaled else None
    y = grid_linear(x, weight, levels, level, b, scale, relu, budget=budget)
    expected = slow_linear(x, None, *case[2:]) * (1 if scale is None else scale)
    expected = expected if b is None else expected + b
    assert torch.equal(y, expected.relu() if relu else expected)


@pytest.fixture(params=[0, 1 << 30], ids=["level by level", "levels as groups"])
def small(request, monkeypatch):
    monkeypatch.setattr(materialised, "_SMALL", request.param)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_convolution_is_the_masked_convolution_at_each_level(name, shared, budget):
    (x, bias, level, weight, levels), geometry = conv_case(*GEOMETRIES[name], shared=shared)
    y = grid_conv(x, weight, levels, level, bias, budget=budget, **geometry)
    assert torch.equal(y, slow_conv(x, bias, level, weight, levels, **geometry))
    assert y.is_contiguous()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("residuals", [0, 1, None], ids=["none", "one", "one a level"])
def test_a_convolution_with_what_follows(residuals, scaled, relu, bias, shared):
    case, geometry = conv_case((6, 7), 4, 6, groups=2, padding=1, shared=shared, bias=bias)
    x, b, level, weight, levels = case
    scale = integers(6) if scaled else None
    expected = slow_conv(x, None, *case[2:], **geometry)
    residual = None
    if residuals != 0:
        residual = integers(residuals or len(level), *expected.shape[1:])
    y = grid_conv(x, weight, levels, level, b, scale, relu, residual, **geometry)
    expected = expected if scale is None else expected * scale[:, None, None]
    expected = expected if b is None else expected + b[:, None, None]
    expected = expected if residual is None else expected + residual
    assert torch.equal(y, expected.relu() if relu else expected)


def test_infinite_activations_are_nan_as_in_the_masked_network(budget):
    x, bias, level, weight, levels = linear_case()
    x[:, 2, 3] = torch.inf
    y, expected = run_linear(x, bias, level, weight, levels, budget=budget), []
    for k, j in enumerate(level.tolist()):
        masked = torch.where(levels > j, weight, 0)
        expected.append(torch.nn.functional.linear(x[k], masked, bias))
    torch.testing.assert_close(y, torch.stack(expected), equal_nan=True, rtol=0, atol=0)


def test_nothing_to_multiply(budget):
    x, bias, level, weight, levels = linear_case(batch=0)
    assert run_linear(x, bias, level, weight, levels, budget=budget).shape == (4, 0, 21)
    empty = run_linear(x[:1], bias, level[:0], weight, levels, budget=budget)
    assert empty.shape == (0, 0, 21)


class TestOnCuda:
    """What is registered for CUDA, as far as it runs anywhere."""

    @pytest.fixture(autouse=True)
    def written_out(self, monkeypatch):
        for dtype in DTYPES:
            monkeypatch.setitem(on_cuda.FUSED_VECTORS, dtype, 0)

    @pytest.mark.parametrize("batch_minor", [False, True])
    def test_a_linear_layer_by_the_operators_arguments(self, batch_minor):
        x, bias, level, weight, levels = case = linear_case()
        bias = torch.nn.Parameter(bias)
        y = on_cuda.grid_linear(x, bias, level, [weight, levels], 21, 0, batch_minor)
        assert torch.equal(y, slow_linear(*case))
        assert y.mT.is_contiguous() if batch_minor else y.is_contiguous()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layers_one_after_the_other(self, dtype):
        first, second = linear_case(dtype=dtype, shared=True), linear_case(inputs=21, dtype=dtype)
        x, bias, level, weight, levels = first
        _, other_bias, _, other_weight, other_levels = second
        scale = torch.full((21,), 2, dtype=dtype)
        y = on_cuda.grid_mlp(
            x,
            level,
            [weight, levels, other_weight, other_levels],
            [21, 21],
            [0, 0],
            [bias, other_bias],
            [None, scale],
            [True, False],
        )
        middle = on_cuda.grid_linear(x, bias, level, [weight, levels], 21, 0, False, None, True)
        rows = [other_weight, other_levels]
        expected = on_cuda.grid_linear(middle, other_bias, level, rows, 21, 0, True, scale)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        assert torch.equal(middle, slow_linear(*first).relu())

    def test_layers_are_of_two_tensors_and_two_or_more(self):
        x, bias, level, weight, levels = linear_case(shared=True)
        for count, rows in ((1, [weight, levels]), (2, [weight, levels]), (2, [weight] * 8)):
            every = [21] * count, [0] * count, [bias] * count, [None] * count, [False] * count
            with pytest.raises(ValueError, match=r"rows=\[weight, levels\].* two layers or more"):
                on_cuda.grid_mlp(x, level, rows, *every)

    def test_a_convolution_by_the_operators_arguments(self):
        tensors, geometry = conv_case((5, 6), padding=1)
        x, bias, level, weight, levels = tensors
        y = on_cuda.grid_conv(x, bias, level, [weight, levels], 6, 0, [3, 3], **geometry)
        assert torch.equal(y, slow_conv(*tensors, **geometry))

    def test_prefix_rows_are_of_the_cpu(self):
        x, bias, level, weight, _ = linear_case()
        with pytest.raises(ValueError, match="the weight and its prune levels, got 4 tensors"):
            on_cuda.grid_linear(x, bias, level, [weight] * 4, 21, 0, False)

    def test_an_argument_on_another_device_is_named(self):
        x, bias, level, weight, levels = linear_case()
        with pytest.raises(ValueError, match="levels is on meta but x is on cpu"):
            on_cuda.grid_linear(x, bias, level, [weight, levels.to("meta")], 21, 0, False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"levels": torch.zeros(2, 3).byte()}, ValueError, r"weight has shape \[3, 2\] but levels"),
        ({"levels": torch.zeros(3, 2).int()}, TypeError, "levels must be uint8 or int16, got Int"),
        ({"level": torch.tensor([0, 1]).int()}, TypeError, "level must be a contiguous int64"),
        ({"weight": torch.zeros(3, 2).int()}, TypeError, "weight must be float32"),
    ],
)
def test_masked_weights_of_wrong_arguments_are_refused(changes, error, message):
    arguments = {
        "weight": torch.zeros(3, 2),
        "levels": torch.zeros(3, 2).byte(),
        "level": torch.tensor([0]),
    }
    with pytest.raises(error, match=message):
        torch.ops.confprune.masked_weights(**(arguments | changes))


@pytest.mark.parametrize("num_levels", [7, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_weights_are_the_weight_where_it_survives(dtype, num_levels):
    weight, levels = torch.randn(4, 3, 2).to(dtype), random_levels((4, 3, 2), num_levels)
    level = torch.tensor([0, 2, num_levels - 1])
    masked = torch.ops.confprune.masked_weights(weight, levels, level)
    expected = [torch.where(levels > j, weight, 0) for j in level.tolist()]
    assert torch.equal(masked, torch.stack(expected))
    torch.library.opcheck(torch.ops.confprune.masked_weights.default, (weight, levels, level))


@pytest.mark.parametrize("num_levels", [7, 255, 300])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (70_001,), (31, 5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_weights_are_chosen_and_not_computed(dtype, shape, num_levels):
    # Every other row of a transposed tensor, with all that a float can be.
    weight = torch.randn(*shape, 2).to(dtype)[..., 0].movedim(0, -1) if shape else torch.ones(())
    weight, levels = weight.to(dtype), random_levels(tuple(weight.shape), num_levels)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-40]).to(dtype)
    if weight.numel() > 1:
        weight[torch.rand(weight.shape) < 0.5] = special[torch.randint(5, (1,))].item()
    level = torch.tensor([-5, -1, 0, 3, num_levels, 1 << 40])
    masked = torch.ops.confprune.masked_weights(weight, levels, level)
    for own, j in zip(masked, level.tolist(), strict=True):
        expected = torch.where(levels.long() > j, weight, 0)
        assert torch.equal(own.view(INTEGERS[dtype]), expected.contiguous().view(INTEGERS[dtype]))
