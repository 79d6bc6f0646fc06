"""Linear layers one after the other as one operator, and where the grid forward takes them so."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from level_by_level import DISTANCE, GRID, Functions, grid_losses, slow_losses
from machine import INSTRUCTION_SETS, check_on, threads
from torch import Tensor, nn

from confprune import prune_levels
from confprune.grid import GridForward

grid_mlp = torch.ops.confprune.grid_mlp
grid_linear = torch.ops.confprune.grid_linear
prefix_rows = torch.ops.confprune.prefix_rows


class Layers:
    """Random linear layers with prune levels, as the operators take them."""

    def __init__(self, widths, *, dtype=torch.float32, num_levels=9, block=16, exact=False):
        self.inputs, *self.outputs = widths
        self.weights, self.levels, self.rows, self.blocks = [], [], [], []
        self.biases, self.scales, self.relus = [], [], []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            draw = (
                torch.randint(-2, 3, (outputs, inputs)) if exact else torch.randn(outputs, inputs)
            )
            weight, levels = draw.to(dtype), torch.randint(0, num_levels + 1, (outputs, inputs))
            levels = levels.to(torch.uint8)
            own = inputs if i == 0 else block
            self.rows.append(list(prefix_rows(weight, levels, num_levels, own)))
            self.blocks.append(own)
            self.weights.append(weight)
            self.levels.append(levels)
            values = torch.randint(-2, 3, (2, outputs)).to(dtype)
            self.biases.append(values[0] if i % 3 != 1 else None)
            self.scales.append(values[1] if i % 3 != 2 else None)
            self.relus.append(i % 2 == 0)

    def together(self, x: Tensor, level: Tensor) -> Tensor:
        return grid_mlp(
            x,
            level,
            list(itertools.chain(*self.rows)),
            self.outputs,
            self.blocks,
            self.biases,
            self.scales,
            self.relus,
        )

    def one_by_one(self, x: Tensor, level: Tensor) -> Tensor:
        for rows, outputs, block, bias, scale, relu in zip(
            self.rows, self.outputs, self.blocks, self.biases, self.scales, self.relus, strict=True
        ):
            x = grid_linear(x, bias, level, rows, outputs, block, True, scale, relu)
        return x

    def masked(self, x: Tensor, level: int) -> Tensor:
        """What the plain masked layers give for x [N, in]."""
        for weight, levels, bias, scale, relu in zip(
            self.weights, self.levels, self.biases, self.scales, self.relus, strict=True
        ):
            x = F.linear(x, torch.where(levels > level, weight, 0))
            x = x if scale is None else x * scale
            x = x if bias is None else x + bias
            x = x.relu() if relu else x
        return x


class TestOperator:
    @given(
        widths=st.lists(st.integers(1, 40), min_size=3, max_size=6),
        batch=st.sampled_from([1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 300]),
        level=st.sets(st.integers(0, 8), min_size=1),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        number=st.integers(1, 3),
        seed=st.integers(0, 2**31),
    )
    @settings(max_examples=60, deadline=None)
    def test_the_bits_are_those_of_one_layer_at_a_time(
        self, widths, batch, level, dtype, number, seed
    ):
        torch.manual_seed(seed)
        layers = Layers(widths, dtype=dtype)
        x, wanted = torch.randn(1, batch, widths[0], dtype=dtype), torch.tensor(sorted(level))
        with threads(number):
            found = layers.together(x, wanted)
        expected = layers.one_by_one(x, wanted)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("batch", [1, 40, 200])
    def test_integers_are_exact(self, batch, dtype):
        layers = Layers([30, 25, 20, 7], dtype=dtype, exact=True)
        x = torch.randint(-2, 3, (1, batch, 30)).to(dtype)
        found = layers.together(x, torch.arange(9))
        for level in range(9):
            assert torch.equal(found[level], layers.masked(x[0], level))

    def test_wide_layers_and_many_levels_are_taken_in_groups(self):
        layers = Layers([20, 700, 600, 3], num_levels=50)
        x, level = torch.randn(1, 150, 20), torch.arange(50)
        assert torch.equal(layers.together(x, level), layers.one_by_one(x, level))

    def test_inputs_may_lie_anyhow_in_memory(self):
        layers, level = Layers([12, 9, 4]), torch.tensor([1, 5])
        x = torch.randn(1, 70, 12)
        expected = layers.one_by_one(x, level)
        minor = x.transpose(1, 2).contiguous().transpose(1, 2)
        apart = torch.randn(1, 70, 24)
        apart[:, :, ::2] = x
        for same in (minor, apart[:, :, ::2]):
            assert torch.equal(layers.together(same, level), expected)

    @pytest.mark.parametrize("strange", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("example", [0, 16, 128, 139])
    def test_infinity_and_nan_are_refused_because_pruned_weights_would_hide_them(
        self, example, strange
    ):
        layers, x = Layers([12, 9, 4]), torch.randn(1, 140, 12)
        x[0, example, 7] = strange
        with pytest.raises(RuntimeError, match="infinity or NaN"):
            layers.together(x, torch.tensor([3]))

    def test_layers_that_overflow_are_refused_as_well(self):
        layers, x = Layers([12, 9, 4]), torch.full((1, 5, 12), 1e30)
        layers.scales[0] = torch.full((9,), 1e20)
        with pytest.raises(RuntimeError, match="infinity or NaN"):
            layers.together(x, torch.tensor([0]))

    def test_nothing_gives_nothing(self):
        layers = Layers([12, 9, 4])
        assert layers.together(torch.zeros(1, 0, 12), torch.tensor([1])).shape == (1, 0, 4)
        none = torch.zeros(0, dtype=torch.int64)
        assert layers.together(torch.zeros(1, 3, 12), none).shape == (0, 3, 4)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[:-1])
def test_all_instruction_sets(instruction_set):
    check_on(instruction_set, f"{__file__}::TestOperator")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 12)}, r"takes x \[1, N, in\], got \[2, 3, 12\]"),
        ({"x": torch.zeros(1, 3, 12).half()}, "computes in float32 or float64, got Half"),
        ({"outputs": [9]}, "of two layers or more"),
        ({"relus": [True]}, "of two layers or more"),
        ({"outputs": [8, 4]}, "not made by prefix_rows"),
        ({"level": torch.tensor([9])}, "level 9 is not on the grid of 9"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    layers = Layers([12, 9, 4])
    arguments = {
        "x": torch.zeros(1, 3, 12),
        "level": torch.tensor([1]),
        "rows": list(itertools.chain(*layers.rows)),
        "outputs": layers.outputs,
        "blocks": layers.blocks,
        "biases": layers.biases,
        "scales": layers.scales,
        "relus": layers.relus,
    }
    with pytest.raises(ValueError, match=message):
        grid_mlp(*(arguments | change).values())


@pytest.mark.parametrize("inputs", [1, 11, 13, 4000])
def test_rows_of_one_block_are_for_inputs_of_their_size_alone(inputs):
    layers = Layers([12, 9, 4])
    with pytest.raises(ValueError, match=rf"rows were not made .* shape \[9, {inputs}\]"):
        layers.together(torch.zeros(1, 3, inputs), torch.tensor([1]))
    rows = layers.rows[0]
    arguments = (None, torch.tensor([1]), rows, 9, layers.blocks[0], True)
    for x in (torch.zeros(1, 3, inputs), torch.zeros(1, 3, inputs).expand(1, 3, inputs)):
        with pytest.raises(ValueError, match="rows were not made"):
            grid_linear(x, *arguments)


def test_the_first_layer_has_rows_of_one_block():
    layers = Layers([12, 9, 4])
    layers.rows[0] = list(prefix_rows(layers.weights[0], layers.levels[0], 9, 5))
    layers.blocks[0] = 5
    with pytest.raises(ValueError, match="rows of one block"):
        layers.together(torch.zeros(1, 3, 12), torch.tensor([1]))


def test_the_operator_is_registered_as_torch_wants_it():
    layers = Layers([12, 9, 4])
    arguments = (
        torch.randn(1, 3, 12),
        torch.tensor([1, 4]),
        list(itertools.chain(*layers.rows)),
        *(layers.outputs, layers.blocks, layers.biases, layers.scales, layers.relus),
    )
    torch.library.opcheck(grid_mlp.default, arguments)


class Net(nn.Module):
    """Linear layers that follow each other in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.calls = 0
        self.a, self.b, self.c = nn.Linear(10, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.norm = nn.BatchNorm1d(24)
        for values in (self.norm.running_mean, self.norm.weight, self.norm.bias):
            nn.init.normal_(values)

    def forward(self, x: Tensor) -> Tensor:
        way, self.calls = self.way, self.calls + 1
        y = self.a(x)
        if way == "norm":
            y = self.norm(y)
        if way == "tanh":
            y = torch.tanh(y)
        elif way != "no relu":
            y = F.relu(y, inplace=way == "in place")
        if way == "dropout":
            y = F.dropout(y, 0.5, self.training)
        elif way == "dropout in training":
            y = F.dropout(y, 0.0)
        elif way == "used before":
            y = y + 0 * y.sum()
        elif way == "asked for its shape":
            y = y.view(len(y), y.shape[1])
        elif way == "asked how it lies" and not y.is_contiguous():
            y = y.contiguous()
        elif way == "sequence":
            return self.c(F.relu(self.b(y[:, None]))).squeeze(1)
        elif way == "weight as input":
            y = y + self.b.weight[0]
        z = F.relu(self.b(y))
        if way == "residual":
            z = z + y
        elif way == "used later":
            return self.c(z) + y[:, :4]
        elif way == "returned":
            return torch.cat([z, self.c(z)], 1)
        elif way == "layer twice":
            z = F.relu(self.b(z))
        elif way == "branches":
            return self.c(z) + self.c(y)
        elif way == "changes" and self.calls > 2:
            z = z.clamp(max=100)
        elif way == "goes elsewhere" and self.calls > 2:
            return self.c(y) + self.c(z)
        return self.c(z)


TOGETHER = ["plain", "in place", "no relu", "norm", "dropout", "layer twice"]
APART = [
    *("residual", "used later", "branches", "used before", "sequence", "weight as input"),
    *("asked for its shape", "asked how it lies", "dropout in training", "tanh"),
]


@pytest.mark.parametrize("way", [*TOGETHER, *APART, "returned"])
def test_layers_are_taken_together_where_nothing_else_sees_what_is_between(way):
    torch.manual_seed(0)
    model = Net(way).eval()
    levels = prune_levels(model, GRID)
    x = torch.randn(20, 10)
    expected = slow_losses(model, [x], levels, None)
    found = grid_losses(model, [x], levels)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    forward = GridForward(model, levels, [DISTANCE])
    forward.evaluate(x, [0, 1])  # with its checks
    with Functions() as seen:
        forward._grid_outputs(x, [0, 1])
    operators = {name for name in seen.names if name.startswith("grid_")}
    assert ("grid_mlp" in operators) == (way not in APART)
    assert ("grid_linear" in operators) == (way not in TOGETHER)


def test_a_model_that_changes_is_evaluated_level_by_level():
    model, x = Net("changes").eval(), torch.randn(9, 10)
    levels = prune_levels(model, GRID)
    found = grid_losses(model, [x], levels, fallback="changed from one call")
    torch.testing.assert_close(found, slow_losses(model, [x], levels, None), rtol=0, atol=2e-5)


def test_a_model_that_changes_its_outputs_is_refused():
    model = Net("goes elsewhere").eval()
    with pytest.raises(ValueError, match="depend on its calls before"):
        grid_losses(model, [torch.randn(9, 10)], prune_levels(model, GRID))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_that_round_what_is_between_them_stay_apart(dtype):
    model = Net("plain").eval().to(dtype)
    levels = prune_levels(model, GRID)
    forward = GridForward(model, levels, [DISTANCE])
    x = torch.randn(5, 10, dtype=dtype)
    forward.evaluate(x, [0, 1])
    with Functions() as seen:
        forward._grid_outputs(x, [0, 1])
    assert ("grid_mlp" in seen.names) == (dtype == torch.float64)


def test_what_is_between_layers_takes_no_part_of_the_budget():
    model = nn.Sequential(nn.Linear(10, 2000), nn.ReLU(), nn.Linear(2000, 4)).eval()
    levels = prune_levels(model, np.arange(100) / 100)
    forward = GridForward(model, levels, [DISTANCE])
    assert forward.capacity(torch.randn(5, 10), 100) >= 256
    model[1] = nn.Tanh()
    forward = GridForward(model, levels, [DISTANCE])
    assert forward.capacity(torch.randn(5, 10), 100) == 0


class Larger(nn.Module):
    """Does something else with a batch of more examples than the first check takes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.c = nn.Linear(10, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.norm, self.other = nn.BatchNorm1d(24), nn.BatchNorm1d(24)
        nn.init.normal_(self.other.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        way = self.way if len(x) > 4 else ""
        y = F.relu((self.other if way == "another norm" else self.norm)(self.a(x)))
        y = F.dropout(y, 1.0, training=way == "dropout that is on")
        if way == "input changed":
            x.zero_()
        if way == "another weight":
            return self.c(F.relu(F.linear(y, self.norm.weight.diag())))
        z = self.c(F.relu(self.b(y)))
        if way == "used later":
            return z + y[:, :4]
        if way == "layer used later":
            return z + self.c(y)
        return y if way == "returned" else z


@pytest.mark.parametrize(
    "way",
    [
        *("another norm", "dropout that is on", "another weight"),
        *("used later", "layer used later", "returned"),
    ],
)
def test_a_model_that_treats_batches_differently_is_evaluated_level_by_level(way):
    model, x = Larger(way).eval(), torch.randn(9, 10)
    levels = prune_levels(model, GRID)
    found = grid_losses(model, [x], levels, fallback="changed from one call")
    torch.testing.assert_close(found, slow_losses(model, [x], levels, None), rtol=0, atol=2e-5)


@pytest.mark.parametrize("inference", [False, True])
def test_an_input_that_changes_before_it_is_multiplied_is_noticed(inference):
    x = torch.randn(9, 10)
    for way in ("", "input changed"):
        model = Larger(way).eval()
        levels = prune_levels(model, GRID)
        expected = slow_losses(model, [x], levels, lambda model, batch: model(batch.clone()))
        fallback = "works in place" if way else None
        with torch.inference_mode(inference and not way):
            found = grid_losses(model, [x], levels, fallback=fallback)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_what_sees_a_tensor_behind_the_back_of_torch_functions_sees_that_it_has_no_values():
    class Unseen(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            with torch._C.DisableTorchFunction():
                squashed = torch.tanh(y)
            return self.c(F.relu(self.b(y))) + 1e-6 * squashed[:, :4]

    model, x = Unseen("").eval(), torch.randn(9, 10)
    levels = prune_levels(model, GRID)
    found = grid_losses(model, [x], levels, fallback="NaN in other places")
    torch.testing.assert_close(found, slow_losses(model, [x], levels, None), rtol=0, atol=2e-5)


def test_a_layer_whose_bias_is_pruned_stays_apart():
    model, x = Net("plain").eval(), torch.randn(9, 10)
    levels = prune_levels(model, GRID)
    bias = torch.randint(0, len(GRID) + 1, (24,), dtype=torch.uint8)
    levels = dataclasses.replace(levels, levels={**levels.levels, "b.bias": bias})
    forward = GridForward(model, levels, [DISTANCE])
    forward.evaluate(x, [0, 1])
    with torch.no_grad(), Functions() as seen:
        forward._grid_outputs(x, [0, 1])
    assert forward.fallback is None
    assert "grid_linear" in seen.names
    assert "grid_mlp" not in seen.names


def test_the_plain_network_keeps_within_the_budget_with_what_is_between_layers():
    model = nn.Sequential(nn.Linear(10, 2000), nn.ReLU(), nn.Linear(2000, 4)).eval()
    budget = 4 << 20
    sizes = []
    model[1].register_forward_hook(lambda module, args, y: sizes.append(y.nbytes))
    forward = GridForward(model, prune_levels(model, GRID), [DISTANCE], activation_bytes=budget)
    forward.evaluate(torch.randn(2000, 10), [0])
    assert forward.fallback is None
    assert max(sizes) <= budget
