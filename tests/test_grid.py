"""The grid forward: one pass, its cross-check and fallback, memory, and the model's state."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from level_by_level import ANY, DISTANCE, GRID, Functions, grid_losses, slow_losses
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import confprune
from confprune import Loss, Reference, loss_matrix, prune_levels
from confprune.grid import GridForward

pytestmark = pytest.mark.usefixtures("one_thread")


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)
    )


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )


def check(model: nn.Module, data: list[Any], fallback: str | None = None, **settings: Any) -> None:
    levels = prune_levels(model, GRID, parameters=settings.pop("parameters", None))
    expected = slow_losses(model, data, levels, settings.get("forward"))
    found = grid_losses(model, data, levels, fallback=fallback, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_model_runs_once_for_all_levels():
    model = perceptron()
    calls = 0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(batch)

    levels = prune_levels(model, np.linspace(0, 0.99, 100))
    data = torch.randn(200, 10)
    losses = grid_losses(model, data, levels, forward=forward, batch_size=100)
    assert losses.shape == (200, 100)
    assert calls <= 15


@pytest.mark.parametrize("levels", [1, 2, 255, 300])
def test_grids_of_any_size(levels):
    model = perceptron()
    data = torch.randn(6, 10)
    found = prune_levels(model, np.arange(levels) / levels + 0.5 / levels)
    torch.testing.assert_close(
        grid_losses(model, data, found), slow_losses(model, [data], found), rtol=0, atol=2e-5
    )


def wider_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(1)
    )


def test_where_the_grid_makes_the_full_network_it_is_not_run_by_itself():
    model, data = wider_cnn(), torch.randn(40, 1, 9, 9)
    calls = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return model(batch)

    levels = prune_levels(model, GRID)
    grid = GridForward(model, levels, [DISTANCE], forward=forward)
    with torch.no_grad():
        grid.evaluate(data, [3])
        calls.clear()
        grid.evaluate(data, [3])
        assert calls == [40]
        grid.evaluate(data, [0, 3])
        assert calls == [40, 40]


@pytest.mark.parametrize("network", [perceptron, wider_cnn])
def test_outputs_are_let_go_before_others_are_made(network, monkeypatch):
    model = network()
    data = torch.randn(8, 1, 9, 9) if network is wider_cnn else torch.randn(8, 10)
    made: list[weakref.ref[Tensor]] = []
    held = []
    outputs_of = GridForward._grid_outputs

    def noted(self: GridForward, *arguments: Any) -> Tensor:
        held.append(sum(outputs() is not None for outputs in made))
        outputs = outputs_of(self, *arguments)
        made.append(weakref.ref(outputs))
        return outputs

    monkeypatch.setattr(GridForward, "_grid_outputs", noted)
    grid = GridForward(model, prune_levels(model, GRID), [DISTANCE], activation_bytes=1)
    grid.evaluate(data, range(len(GRID)))
    assert len(held) > len(GRID)
    assert held == [0] * len(held)


@pytest.mark.filterwarnings("error")
def test_an_error_of_the_model_comes_without_a_warning_of_a_fallback():
    class Fussy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 7:
                raise RuntimeError("no batches of seven")
            return super().forward(x)

    model = Fussy(*wider_cnn())
    data = [torch.randn(n, 1, 9, 9) for n in (8, 7)]
    with pytest.raises(RuntimeError, match="seven"):
        loss_matrix(model, data, prune_levels(model, GRID), DISTANCE, progress=False)


@pytest.mark.parametrize("activation_bytes", [1, 50_000, 1 << 30])
class TestTheFullNetworkAsALevelOfTheGrid:
    """Where minimal filtering makes its convolutions, the grid gives the full network too."""

    @pytest.mark.parametrize("active", [[0], [6], [0, 1], [2, 5], [0, 1, 2, 3, 4, 5, 6]])
    def test_the_losses_are_those_of_the_plain_network(self, activation_bytes, active):
        model, data = wider_cnn(), torch.randn(9, 1, 9, 9)
        levels = prune_levels(model, GRID)
        settings = {"activation_bytes": activation_bytes}
        grid = GridForward(model, levels, [DISTANCE, DISTANCE], **settings)
        losses = grid.evaluate(data, active)
        assert losses.shape == (2, 9, len(active))
        expected = slow_losses(model, [data], levels)[:, active]
        torch.testing.assert_close(losses[1], expected, rtol=0, atol=2e-5)
        if active[0] == 0:
            assert torch.equal(losses[..., 0], torch.zeros(2, 9))

    def test_a_grid_without_it_runs_it_by_itself(self, activation_bytes):
        model, data = wider_cnn(), torch.randn(9, 1, 9, 9)
        levels = prune_levels(model, GRID[1:])
        found = grid_losses(model, data, levels, activation_bytes=activation_bytes)
        torch.testing.assert_close(found, slow_losses(model, [data], levels), rtol=0, atol=2e-5)

    def test_examples_that_fall_back_have_it_too(self, activation_bytes):
        model, data = wider_cnn(), torch.randn(9, 1, 9, 9)
        data[7] = torch.inf
        levels = prune_levels(model, GRID)
        zero = Loss("zero", lambda outputs, reference: outputs.flatten(1)[:, 0] * 0 == 1)
        for active in ([2, 5], [0, 5]):
            grid = GridForward(model, levels, [zero, DISTANCE], activation_bytes=activation_bytes)
            losses = grid.evaluate(data, active)
            assert grid.fallback is None
            assert torch.equal(losses[0], torch.zeros(9, 2))
            finite = torch.arange(9) != 7
            expected = slow_losses(model, [data[finite]], levels)[:, active]
            torch.testing.assert_close(losses[1][finite], expected, rtol=0, atol=2e-5)

    def test_losses_may_work_in_place_and_on_views(self, activation_bytes):
        def in_place(outputs: Tensor, reference: Reference) -> Tensor:
            difference = outputs.sub_(reference.outputs)
            return difference.flatten(1).abs().tanh().mean(-1)

        def on_views(outputs: Tensor, reference: Reference) -> Tensor:
            flat = reference.outputs.view(len(outputs), -1)
            return (outputs.flatten(1) - flat).abs().tanh().mean(-1)

        model, data = wider_cnn(), torch.randn(9, 1, 9, 9)
        levels = prune_levels(model, GRID)
        expected = slow_losses(model, [data], levels)
        for loss in (in_place, on_views, Loss("in place", in_place, vmappable=True)):
            settings = {"activation_bytes": activation_bytes, "progress": False}
            found = loss_matrix(model, data, levels, loss, **settings)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    @pytest.mark.filterwarnings("ignore:the levels are evaluated one by one")
    def test_ranks_agree_about_chunks_where_one_of_them_falls_back(self, activation_bytes):
        class Unruly(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = wider_cnn()

            def forward(self, x: Tensor) -> Tensor:
                y = self.layers(x)
                return y if x.abs().max() < 50 else y * (float(y.sum()) < torch.inf)

        model, data = Unruly(), torch.randn(90, 1, 9, 9)
        data[40] = 100.0
        levels = prune_levels(model, GRID)
        settings = {"activation_bytes": activation_bytes}
        parts, fallbacks = [], set()
        for turn in (True, False):
            grid = GridForward(model, levels, [DISTANCE], **settings)
            mine = itertools.cycle([turn, not turn])
            for begin in (0, 60):
                parts.append(grid.evaluate(data[begin : begin + 60], [2, 5], share=mine))
            fallbacks.add(grid.fallback)
        assert len(fallbacks) == 2
        together = torch.cat([parts[0] + parts[2], parts[1] + parts[3]], dim=1)
        expected = slow_losses(model, [data], levels)[:, [2, 5]]
        torch.testing.assert_close(together[0], expected, rtol=0, atol=2e-5)

    def test_a_model_that_does_not_lend_itself_runs_it_plainly(self, activation_bytes):
        class Unruly(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = wider_cnn()

            def forward(self, x: Tensor) -> Tensor:
                y = self.layers(x)
                return y if float(y.sum()) < torch.inf else -y

        model, data = Unruly(), torch.randn(9, 1, 9, 9)
        levels = prune_levels(model, GRID)
        found = grid_losses(model, data, levels, fallback=ANY, activation_bytes=activation_bytes)
        torch.testing.assert_close(found, slow_losses(model, [data], levels), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("layer", "made"),
    [
        (nn.Conv2d(16, 16, 3, padding=1), True),
        (nn.Conv2d(16, 32, 3, 2), True),
        (nn.Conv2d(16, 16, 3, dilation=2), False),
        (nn.Conv2d(16, 32, 3, groups=2), False),
        (nn.Conv2d(16, 15, 3), False),
        (nn.Conv2d(16, 16, 5), False),
        (nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 64, 5)), False),
    ],
)
def test_the_grid_makes_the_full_network_where_most_of_it_is_filtered(layer, made):
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), layer)
    grid = GridForward(model, prune_levels(model, GRID), [DISTANCE])
    grid.evaluate(torch.randn(4, 1, 12, 12), [3])
    assert (grid._full == 0) is made


def test_the_loss_of_the_unpruned_network_is_zero():
    model = small_cnn()
    levels = prune_levels(model, [0.0, 0.9])
    losses = grid_losses(model, torch.randn(20, 1, 8, 8), levels)
    assert losses.dtype == torch.float32
    assert losses[:, 0].max() < 1e-5
    assert losses[:, 1].min() > 1e-3


@pytest.mark.parametrize("activation_bytes", [1, 5_000, 100_000, 1 << 30])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_losses_do_not_depend_on_how_levels_and_examples_are_taken(batch_size, activation_bytes):
    for model, data in [
        (perceptron(), torch.randn(20, 10)),
        (small_cnn(), torch.randn(9, 1, 8, 8)),
    ]:
        levels = prune_levels(model, GRID)
        settings = {"activation_bytes": activation_bytes, "batch_size": batch_size}
        expected = slow_losses(model, [data], levels)
        found = grid_losses(model, data, levels, **settings)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        disagreement = loss_matrix(model, data, levels, "disagreement", progress=False, **settings)
        whole = loss_matrix(model, data, levels, "disagreement", progress=False)
        assert torch.equal(disagreement, whole)


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes, in bytes, and how much the operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and not func.is_view:
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return result


def largest_tensor(model: nn.Module, data: Tensor, **settings: Any) -> int:
    levels = prune_levels(model, np.arange(100) / 100, parameters=settings.pop("parameters", None))
    with Largest() as largest:
        loss_matrix(model, data, levels, DISTANCE, progress=False, **settings)
    return largest.bytes


def followed(way: str) -> nn.Module:
    """A network whose layers are followed by steps that can be taken together with them, or not."""

    class Followed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.linear = nn.Linear(6 * 16, 5)
            self.calls = 0
            for values in (self.norm.running_mean, self.norm.weight, self.norm.bias):
                nn.init.normal_(values)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = self.conv(x)
            z = self.norm(y)
            if way == "alone":
                y = F.relu(z)
            elif way == "method":
                y = z.relu()
            elif way == "in place":
                y = F.relu(z, inplace=True)
            elif way == "in place, both":
                y = F.relu(z, inplace=True) + z
            elif way == "norm used twice":
                y = F.relu(z) + z
            elif way == "convolution used twice":
                y = F.relu(z) + y
            elif way == "relu twice":
                y = F.relu(F.relu(z))
            elif way == "relu before":
                y = self.norm(F.relu(y))
            elif way == "training":
                y = F.relu(F.batch_norm(y, None, None, training=True))
            elif way == "shape is asked":
                y = F.relu(z.reshape(z.shape))
            elif way == "changes":
                y = F.relu(z) if self.calls < 3 else torch.clamp(z, min=0)
            elif way == "returned":
                return torch.cat([self.linear(z.flatten(1)), z.flatten(1)], 1)
            return F.relu(self.linear(y.flatten(1)))

    return Followed()


@pytest.mark.parametrize("way", ["alone", "method", "in place"])
def test_normalisation_and_relu_are_done_together_with_their_layer(way):
    model = followed(way).eval()
    levels = prune_levels(model, GRID)
    forward = GridForward(model, levels, [DISTANCE])
    x = torch.randn(4, 1, 4, 4)
    forward.evaluate(x, [0, 1])  # with its checks
    with Functions() as seen:
        forward._grid_outputs(x, [0, 1])
    assert "grid_conv" in seen.names
    assert not {"relu", "relu_", "clamp_min"} & set(seen.names)
    assert seen.names.count("mul") == 1  # the layer's own bias times the scale


@pytest.mark.parametrize(
    "way",
    [
        *("alone", "method", "in place", "in place, both", "norm used twice", "returned"),
        *("convolution used twice", "relu twice", "relu before", "shape is asked"),
    ],
)
def test_what_follows_a_layer_is_as_the_model_says(way):
    check(followed(way), [torch.randn(20, 1, 4, 4)])


def residual(way: str) -> nn.Module:
    """A network with additions that can be done together with a convolution, or not."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 6, 3, padding=1)
            self.first = nn.Conv2d(6, 6, 3, padding=1)
            self.second = nn.Conv2d(6, 6, 3, padding=1)
            self.shortcut = nn.Conv2d(6, 6, 1)
            self.norm = nn.BatchNorm2d(6)
            self.linear = nn.Linear(6 * 16, 5)
            self.calls = 0
            for values in (self.norm.running_mean, self.norm.weight, self.norm.bias):
                nn.init.normal_(values)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = F.relu(self.stem(x))
            y = self.second(F.relu(self.first(x)))
            z = y if way == "no norm" else self.norm(y)
            if way == "identity":
                y = F.relu(z + x)
            elif way == "no norm":
                y = torch.add(x, z).relu()
            elif way == "in place":
                z += x
                y = F.relu(z, inplace=True)
            elif way == "shortcut":
                y = F.relu(z + self.shortcut(x))
            elif way == "shortcut first":
                y = F.relu(self.norm(self.shortcut(x)) + z)
            elif way == "shortcut in place":
                z += self.shortcut(x)
                y = F.relu(z)
            elif way == "twice the input":
                y = F.relu(z + x) + x
            elif way == "itself":
                y = F.relu(z + z)
            elif way == "scaled":
                y = F.relu(torch.add(z, x, alpha=2))
            elif way == "a number":
                y = F.relu(z + 1)
            elif way == "broadcast":
                y = F.relu(z + x[:, :1])
            elif way == "after the relu":
                y = F.relu(z) + x
            elif way == "residual changes":
                y = F.relu(z + x.mul_(2))
            elif way == "residual changed before":
                x.mul_(2)
                y = F.relu(z + x)
            elif way == "residual used before its norm":
                y = F.relu(self.shortcut(x) + z) + 0.5 * y
            elif way == "sum used twice":
                y = z + x
                y = F.relu(y) + y
            elif way == "changes":
                y = F.relu(z + (x if self.calls < 3 else x.clone()))
            return self.linear(y.flatten(1))

    return Block()


@pytest.mark.parametrize("way", ["identity", "no norm", "in place", "shortcut", "shortcut first"])
def test_residuals_are_added_together_with_their_layer(way):
    model = residual(way).eval()
    levels = prune_levels(model, GRID)
    forward = GridForward(model, levels, [DISTANCE])
    x = torch.randn(16, 1, 4, 4)
    forward.evaluate(x, [0, 1])  # with its checks
    with Functions() as seen:
        forward._grid_outputs(x, [0, 1])
    assert not {"relu", "relu_", "clamp_min", "add_"} & set(seen.names)
    assert forward.fallback is None


@pytest.mark.parametrize(
    "way",
    [
        *("identity", "no norm", "in place", "shortcut", "shortcut first", "shortcut in place"),
        *("twice the input", "itself", "scaled", "a number", "broadcast", "after the relu"),
        *("residual changes", "residual changed before", "residual used before its norm"),
        "sum used twice",
    ],
)
def test_residuals_are_added_as_the_model_says(way):
    check(residual(way), [torch.randn(20, 1, 4, 4)])


def test_a_model_that_changes_its_residual_is_evaluated_level_by_level():
    check(residual("changes"), [torch.randn(9, 1, 4, 4)], fallback="changed from one call")


def test_a_model_that_changes_what_follows_a_layer_is_evaluated_level_by_level():
    check(followed("changes"), [torch.randn(9, 1, 4, 4)], fallback="changed from one call")


def test_a_grid_never_holds_copies_of_the_weights():
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 10))
    weights = 4 * 300 * 400
    assert largest_tensor(model, torch.randn(32, 300), activation_bytes=200_000) <= weights


def test_weights_that_must_be_written_out_are_few_at_a_time():
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(200, 200) / 14)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,oi->bo", x, self.weight)

    weight = 4 * 200 * 200
    settings = {"parameters": ["weight"], "activation_bytes": 6 * weight}
    # The cross-check takes three levels at once.
    assert weight < largest_tensor(Einsum(), torch.randn(32, 200), **settings) <= 6 * weight


@pytest.mark.parametrize("activation_bytes", [200_000, 1_000_000, 10_000_000])
def test_activations_keep_within_their_budget(activation_bytes):
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
    model = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(576, 3))
    data = torch.randn(80, 1, 8, 8)
    found = largest_tensor(model, data, activation_bytes=activation_bytes)
    assert activation_bytes / 40 < found <= activation_bytes


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 10)
        self.second = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 0:
            y = -y
        return self.second(y)


def test_data_dependent_control_flow_is_evaluated_level_by_level():
    check(Branching(), [torch.randn(4, 10), torch.randn(3, 10)], fallback="control flow")


def test_a_model_may_fail_the_grid_only_later():
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y * float(y.abs().max() > -1) if len(x) == 3 else y

    check(Later(), [torch.randn(n, 10) for n in (8, 3, 7)], fallback="RuntimeError")


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()


class Hiding(nn.Module):
    """A layer that uses its weight also where torch functions do not see it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if self.way == "data":
            return self.layer(x) + F.linear(x, weight.data)
        if self.way == "numpy":
            return x @ torch.from_numpy(weight.detach().numpy()).t()
        if self.way == "list":
            return x @ torch.tensor(weight.tolist()).t()
        if self.way == "custom function":
            return OwnLinear.apply(x, weight)
        seen = self.layer(x) if self.way == "seen and not" else 0
        with torch._C.DisableTorchFunction():
            return seen + F.linear(x, weight)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("data", "accessing `data` under vmap"),
        ("numpy", "Error"),
        ("list", "RuntimeError"),
        ("custom function", ANY),
        ("seen and not", "differ by"),
        ("not seen", "used 'layer.weight' where it could not be masked"),
    ],
)
def test_a_hidden_use_of_a_weight_is_noticed(way, reason):
    check(Hiding(way), [torch.randn(4, 10)], fallback=reason)


@pytest.mark.parametrize("part", ["all", "inside", "forward"])
def test_what_is_compiled_of_a_model_keeps_its_grid(part):
    body = perceptron()
    forward = None
    if part == "all":
        model = torch.compile(body, backend="eager")
    elif part == "inside":
        model = nn.Sequential(torch.compile(body, backend="eager"))
    else:
        model, forward = body, torch.compile(lambda model, x: model(x), backend="eager")
    check(model, [torch.randn(n, 10) for n in (9, 300, 1, 7)], forward=forward)


@pytest.mark.parametrize("operator", ["aten.linear", "checkpoint", "compiled"])
def test_uncommon_ways_to_a_weight_are_seen(operator):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            if operator == "aten.linear":
                return torch.ops.aten.linear(x, self.layer.weight)
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)

    model = Other()
    if operator == "compiled":
        model = torch.compile(model, backend="eager")
    # Torch's checkpoints are open to vmap from 2.12 on.
    one_by_one = operator == "checkpoint" and torch.__version__ < "2.12"
    check(model, [torch.randn(4, 10)], fallback=ANY if one_by_one else None)


class OwnBias(nn.Module):
    """A layer whose bias is computed from a prunable weight."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.other = nn.Linear(4, 10)
        self.layer = nn.Conv1d(1, 10, 3) if way == "convolution" else nn.Linear(10, 10)
        self.norm = nn.BatchNorm1d(10)
        self.last = nn.Linear(10, 4)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        bias, weight = self.other.weight.sum(1), self.layer.weight
        if self.way == "convolution":
            y = F.conv1d(x[:, None], weight, bias).amax(-1)
        elif self.way == "addmm":
            y = torch.addmm(bias, x, weight.t())
        else:
            y = F.linear(F.linear(x, weight) if self.way == "second" else x, weight, bias)
        return self.last(F.relu(self.norm(y)))


@pytest.mark.parametrize("way", ["first", "second", "addmm", "convolution"])
def test_a_bias_may_depend_on_the_level(way):
    check(OwnBias(way), [torch.randn(9, 10)])


def test_biases_may_be_pruned_too():
    model = small_cnn()
    check(model, [torch.randn(9, 1, 8, 8)], parameters=[n for n, _ in model.named_parameters()])


def test_a_norm_made_of_pruned_weights_is_evaluated_level_by_level():
    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.second.weight.sum(0)
            y = F.batch_norm(self.first(x), torch.zeros(10), torch.ones(10), scale)
            return self.second(F.relu(y))

    check(OwnNorm(), [torch.randn(9, 10)], fallback="changed from one call to the next")


def test_networks_that_want_contiguous_activations_get_them():
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.inner = nn.Linear(4, 6)
            self.head = nn.Linear(6 * 16, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y = y.view(len(x), 4, -1).transpose(1, 2).contiguous().view(-1, 4)
            return self.head(self.inner(y).view(len(x), -1))

    check(Viewing(), [torch.randn(5, 3, 6, 6)])


def test_parameters_that_are_not_used_change_nothing():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(10, 4)
            self.auxiliary = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    check(Unused(), [torch.randn(4, 10)], fallback=ANY)


def test_infinite_and_nan_outputs_are_compared_in_their_places():
    class Spoiling(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 4)
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).masked_fill(torch.arange(4) == 2, self.value)

    first = Loss("first", lambda y, r: (y - r.outputs)[:, 0].abs().tanh(), vmappable=True)
    for value in (torch.nan, torch.inf, -torch.inf):
        model = Spoiling(value)
        levels = prune_levels(model, GRID)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses = loss_matrix(model, torch.randn(4, 10), levels, first, progress=False)
        assert losses.max() > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 5.0])
def test_a_grid_that_computes_something_else_is_not_trusted(value, monkeypatch):
    real = torch.ops.confprune.grid_linear

    def spoilt(x, *args):
        y = real(x, *args)
        return y.masked_fill(torch.arange(y.shape[-1]) == 1, value)

    model = nn.Linear(10, 4)
    data = torch.randn(6, 10)
    levels = prune_levels(model, GRID)
    expected = slow_losses(model, [data], levels)
    monkeypatch.setattr(torch.ops.confprune, "grid_linear", spoilt)
    found = grid_losses(model, data, levels, fallback="outputs")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        {name: (id(t), t._version, t.detach().clone()) for name, t in tensors},
        [module.training for module in model.modules()],
        [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
    )


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    tensors, training, gradients = snapshot(model)
    assert training == before[1]
    assert gradients == before[2]
    assert tensors.keys() == before[0].keys()
    for name, (identity, version, value) in tensors.items():
        assert (identity, version) == before[0][name][:2], name
        assert torch.equal(value, before[0][name][2]), name


class Failing(nn.Module):
    """A convolutional network that raises at one of its calls, or never."""

    def __init__(self, error: BaseException | None, call: int, *, falls_back: bool) -> None:
        super().__init__()
        self.body = small_cnn()
        self.error, self.call, self.calls = error, call, 0
        self.falls_back = falls_back

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.calls += 1
        if self.error is not None and self.calls > self.call:
            raise self.error
        if self.falls_back and y.sum() > 1e9:
            return -y
        return y


@pytest.mark.parametrize("falls_back", [False, True])
@pytest.mark.parametrize("call", [0, 2, 4, 6])
@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.filterwarnings("ignore:the levels are evaluated one by one")
def test_the_model_is_left_as_it_was(error, call, falls_back):
    model = Failing(error, call, falls_back=falls_back).train()
    model.body[1].eval()
    model.body[0].weight.requires_grad_(False)
    levels = prune_levels(model, GRID)
    before = snapshot(model)

    def run() -> None:
        loss_matrix(model, torch.randn(12, 1, 8, 8), levels, DISTANCE, batch_size=5, progress=False)

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    assert_untouched(model, before)
    model.error = None
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.eval()(x), copy.deepcopy(model)(x))


def test_gradients_are_not_recorded():
    model = perceptron()
    x = torch.randn(6, 10, requires_grad=True)
    losses = grid_losses(model, [x], prune_levels(model, GRID))
    assert not losses.requires_grad
    assert torch.is_grad_enabled()


def test_levels_of_another_model_are_refused():
    levels = prune_levels(nn.Linear(10, 4), GRID)
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        loss_matrix(perceptron(), torch.randn(4, 10), levels, DISTANCE, progress=False)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda model, x: model(x).sum(), r"shape \[\] for a batch of 4 .* pass forward="),
        (lambda model, x: model(x).t(), r"shape \[4, 4\]|shape \[3, 4\]"),
    ],
)
def test_outputs_without_a_batch_are_refused(forward, message):
    model = nn.Linear(10, 3)
    with pytest.raises(ValueError, match=message):
        loss_matrix(model, torch.randn(9, 10), prune_levels(model, GRID), DISTANCE, forward=forward)


@pytest.mark.parametrize("output", [(1, 2), {"hidden": 3}, None, "text"])
def test_outputs_that_are_no_tensor_are_refused(output):
    model = nn.Linear(10, 3)
    with pytest.raises(TypeError, match=f"is a {type(output).__name__}, not a tensor .* forward="):
        loss_matrix(
            model,
            torch.randn(9, 10),
            prune_levels(model, GRID),
            DISTANCE,
            forward=lambda model, x: output,
            progress=False,
        )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y, r: y.sum(), r"returned \[\] for 4 examples"),
        (lambda y, r: y, r"returned \[4, 3\] for 4 examples"),
        (lambda y, r: 0.5, "returned float for 4 examples"),
        (lambda y, r: y[:, 0] * 0 + 1.5, "is 1.5 for example 0 at level 0 .*must be in"),
        (lambda y, r: y[:, 0] * 0 - 0.1, "is -0.1 for example 0 at level 0"),
        (lambda y, r: y[:, 0] * torch.nan, r"is nan for example 0 at level 0 \(sparsity 0\)"),
    ],
)
@pytest.mark.parametrize("vmappable", [False, True])
def test_what_is_no_loss_is_refused(loss, message, vmappable):
    model = nn.Linear(10, 3)
    with pytest.raises(ValueError, match="loss 'mine' " + message):
        loss_matrix(
            model,
            torch.randn(9, 10),
            prune_levels(model, GRID),
            Loss("mine", loss, vmappable=vmappable),
            progress=False,
        )


def test_a_loss_that_fails_at_some_level_is_told_with_example_and_level():
    def spoilt(outputs: Tensor, reference: confprune.Reference) -> Tensor:
        losses = (outputs - reference.outputs).abs().sum(-1).clamp(max=1)
        return torch.where(outputs.abs().sum(-1) == 0, torch.nan, losses)

    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.zeros(10, 3)
    x[:, 0] = 1
    x[7] = torch.tensor([0.0, 0.0, 1.0])
    x[:, 2] = 1
    x[7, 2] = 0
    x[7, 1] = 1
    levels = prune_levels(model, [0.0, 0.34, 0.67])
    with pytest.raises(
        ValueError, match=r"'spoilt' is nan for example 7 at level 2 \(sparsity 0.67"
    ):
        loss_matrix(model, x, levels, spoilt, batch_size=3, progress=False)


def test_a_loss_may_leave_its_range_by_rounding_only():
    model = nn.Linear(3, 2)
    levels = prune_levels(model, [0.5])
    loss = Loss("nearly", lambda y, r: torch.full((len(y),), 1 + 1e-6))
    assert loss_matrix(model, torch.randn(5, 3), levels, loss, progress=False).unique() == 1.0


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_must_be_positive(budget):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=f"activation_bytes must be positive, got {budget}"):
        loss_matrix(
            model, torch.randn(5, 3), prune_levels(model, GRID), DISTANCE, activation_bytes=budget
        )


@pytest.mark.filterwarnings("ignore:the levels are evaluated one by one")
def test_random_outputs_are_said_to_be_random():
    class Noisy(nn.Linear):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.5)

    model, x = Noisy(8, 6), torch.randn(9, 8)
    with pytest.warns(UserWarning, match="outputs are random .*dropout that is on in evaluation"):
        loss_matrix(model, x, prune_levels(model, GRID), DISTANCE, progress=False)


@pytest.mark.filterwarnings("ignore:the outputs of an example depend")
def test_the_reason_of_a_fallback_is_kept():
    model = Branching()
    grid = GridForward(model, prune_levels(model, GRID), [DISTANCE])
    with pytest.warns(UserWarning, match="one by one"):
        grid.evaluate(torch.randn(3, 10), range(len(GRID)))
    assert "control flow" in grid.fallback


def test_only_some_levels_may_be_asked_for():
    model = small_cnn().eval()
    x = torch.randn(5, 1, 8, 8)
    levels = prune_levels(model, GRID)
    every = GridForward(model, levels, [DISTANCE]).evaluate(x, range(len(GRID)))
    some = GridForward(model, levels, [DISTANCE]).evaluate(x, [1, 4, 5])
    torch.testing.assert_close(some, every[..., [1, 4, 5]])


def test_several_losses_are_computed_of_one_pass():
    model = perceptron().eval()
    levels = prune_levels(model, GRID)
    x = torch.randn(8, 10)
    losses = [DISTANCE, *(confprune.losses.resolve_loss(n) for n in ("disagreement", "cosine"))]
    together = GridForward(model, levels, losses).evaluate(x, range(len(GRID)))
    for one, values in zip(losses, together, strict=True):
        assert torch.equal(values, loss_matrix(model, x, levels, one, progress=False))


def test_a_progress_bar_is_shown_unless_told_otherwise(capsys):
    model = nn.Linear(3, 2)
    levels = prune_levels(model, [0.5])
    loss_matrix(model, torch.randn(5, 3), levels, DISTANCE, progress=False)
    assert capsys.readouterr() == ("", "")
    loss_matrix(model, torch.randn(5, 3), levels, DISTANCE)
    assert "5/5" in capsys.readouterr().err


def test_an_activation_that_overflows_is_nan_as_in_the_plain_masked_network():
    """A pruned weight times infinity is NaN; an example far behind the first ones shows it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[0].weight.data *= 20
    x = torch.randn(40, 4)
    x[30] = 3e38
    levels = prune_levels(model, [0.0, 0.5])
    grid = GridForward(model, levels, [DISTANCE])
    values = grid.evaluate(x, [0, 1])[0]
    plain = [levels.prune(model, j)(x) for j in range(2)]
    assert [not y[30].isfinite().all() for y in plain] == [True, True]
    assert values[30].isnan().all()
    assert values[torch.arange(40) != 30].isfinite().all()
    assert grid.fallback is None


def test_a_weight_that_the_model_never_uses_does_not_slow_it_down():
    class WithSpareHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare = nn.Linear(6, 4), nn.Linear(6, 9)

        def forward(self, x):
            return self.body(x)

    model = WithSpareHead()
    levels = prune_levels(model, GRID)
    grid = GridForward(model, levels, [DISTANCE])
    x = torch.randn(7, 6)
    values = grid.evaluate(x, range(len(GRID)))[0]
    assert grid.fallback is None
    plain = torch.stack(
        [DISTANCE(levels.prune(model, j)(x), Reference(model(x))) for j in range(len(GRID))], 1
    )
    torch.testing.assert_close(values, plain.detach())


def test_a_model_that_mixes_the_examples_of_a_batch_is_pointed_out():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False)).eval()
    grid = GridForward(model, prune_levels(model, GRID), [DISTANCE])
    with pytest.warns(UserWarning, match="depend on the other examples"):
        grid.evaluate(torch.randn(9, 6), [0, 1])
    assert any("independent losses" in note for note in grid.notes)


def test_a_model_that_works_on_its_input_in_place_sees_copies():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(x.mul_(2))

    model, x = InPlace(), torch.randn(9, 6)
    before = x.clone()
    levels = prune_levels(model, GRID)
    values = GridForward(model, levels, [DISTANCE]).evaluate(x, range(len(GRID)))[0]
    assert torch.equal(x, before)
    full = Reference(model(x.clone()))
    plain = [DISTANCE(levels.prune(model, j)(x.clone()), full) for j in range(len(GRID))]
    torch.testing.assert_close(values, torch.stack(plain, 1).detach())


def test_large_weights_that_are_not_written_out_do_not_split_the_grid():
    """Only what is materialised counts against the memory of a chunk of levels."""
    model = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 4))
    grid = GridForward(
        model, prune_levels(model, GRID), [DISTANCE], activation_bytes=200 * 600 * 4 * 4
    )
    grid.evaluate(torch.randn(4, 600), [0])
    assert grid._footprint.levels_at_once(4, grid._budget) >= len(GRID)


def test_capacity_fills_the_lanes_with_few_activations_or_is_nothing():
    model = nn.Sequential(nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 4))
    examples, one_level = torch.randn(4, 600), 4 * 600 * 4  # four activations of 600 numbers

    def capacities(budget):
        grid = GridForward(model, prune_levels(model, GRID), [DISTANCE], activation_bytes=budget)
        found = [grid.capacity(examples, levels) for levels in (1, 2, 3)]
        assert all(
            list(grid._footprint.example_chunks(n, levels, budget)) == [(0, n)]
            for levels, n in enumerate(found, start=1)
            if n
        )
        return found

    assert capacities(300 * one_level) == [256, 128, 0]
    assert capacities(64 << 20) == capacities(64 << 30) == [6912, 3456, 2304]
