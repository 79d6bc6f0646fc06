"""Grid products by masked weights written out, against the operators' own references."""

from __future__ import annotations

import pytest
import torch
from test_ops import DTYPES, GEOMETRIES, conv_case, integers, linear_case, slow_conv, slow_linear

from confprune.grid import materialised
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
def test_a_convolution_with_what_follows(scaled, relu, bias, shared):
    case, geometry = conv_case((6, 7), 4, 6, groups=2, padding=1, shared=shared, bias=bias)
    x, b, level, weight, levels = case
    scale = integers(6) if scaled else None
    y = grid_conv(x, weight, levels, level, b, scale, relu, **geometry)
    expected = slow_conv(x, None, *case[2:], **geometry)
    expected = expected if scale is None else expected * scale[:, None, None]
    expected = expected if b is None else expected + b[:, None, None]
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
