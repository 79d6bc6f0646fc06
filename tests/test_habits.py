"""Models that write, keep, fuse or branch as they run: computed right or refused, not changed."""

from __future__ import annotations

import copy
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from level_by_level import GRID
from one_by_one import LOSS, X, check, matrix
from torch import Tensor, nn

import confprune
from confprune import calibrate, loss_matrix, prune_levels
from confprune.copies import all_same, copied


class Fused(nn.Module):
    """Makes one weight of two for evaluation, where it is told of that."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def train(self, mode: bool = True) -> Fused:
        super().train(mode)
        self.fused = None if mode else (self.first.weight + self.second.weight).detach()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.first(x) + self.second(x)
        return F.linear(x, self.fused, self.first.bias + self.second.bias)


def test_branches_that_are_fused_for_evaluation_come_first():
    model = nn.Sequential(Fused(12, 24), nn.ReLU(), nn.Linear(24, 5)).train()
    with pytest.raises(ValueError, match=r"model\.eval\(\) changes '0.fused', .*call model\.eval"):
        matrix(model)


def test_training_modes_of_ones_own_that_change_no_weight(one_thread):
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self[1].eval()
            return self

    check(Frozen(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).train())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float32], ids=str)
def test_tensors_are_the_same_bit_for_bit(dtype):
    a = torch.tensor([[1.0, torch.nan]]).to(dtype)
    assert all_same([a, a], [a.clone(), a.clone()])
    assert not all_same([a], [a.t()])
    assert not all_same([a], [torch.zeros_like(a)])
    assert not all_same([a], [])


class MaxNorm(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.4)
        return super().forward(x)


class Autoregressive(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones_like(self.weight).tril())

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class Centred(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.bias.data.clamp_(min=0)
        return self.layer(x)


@pytest.mark.parametrize("kind", [MaxNorm, Autoregressive, Centred])
def test_models_that_write_to_their_weights_run_once_before(kind, one_thread):
    torch.manual_seed(0)
    model = nn.Sequential(kind(12, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"changes its parameter '0.* Run it once"):
        matrix(model)
    assert all_same([*model.parameters()], [*before.parameters()])
    with torch.no_grad():
        model(X)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the levels are evaluated one by one")
        check(model)


def test_embeddings_with_a_largest_norm_are_left_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 12, max_norm=1.0), nn.Flatten(), nn.Linear(36, 5)).eval()
    before = copy.deepcopy(model)
    x = torch.randint(0, 30, (500, 3))
    certificate = calibrate(model, x, loss=LOSS, alpha=0.2, delta=0.1, progress=False)
    assert all_same([*model.parameters()], [*before.parameters()])
    assert certificate.verify(before, x, progress=False) <= 0.2


class Cached(nn.Module):
    """Keeps what it makes of its weight, and draws at random."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 5)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.first.weight * 1
        return self.last(F.dropout(F.linear(x, self.kept, self.first.bias).relu(), 0.1, True))


@pytest.mark.filterwarnings("ignore:the network's outputs are random")
def test_random_networks_that_keep_what_they_make_of_their_weights_are_refused():
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="depend on its calls before"):
        matrix(Cached().eval())
    assert not torch.equal(torch.get_rng_state(), state)  # the model drew; no seed was left behind


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(12, 24) for _ in range(3))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        which = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
        hidden = x.new_zeros(len(x), 24)
        for i, expert in enumerate(self.experts):
            chosen = which == i
            if chosen.any():
                hidden[chosen] = expert(x[chosen])
        return self.head(hidden.relu())


@pytest.mark.filterwarnings("ignore:the levels are evaluated one by one")
def test_weights_that_the_first_examples_leave_alone_are_not_called_unused(one_thread):
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(300, 12)
    x = x[x[:, 0].argsort()]  # the first examples take the first expert
    weights = ["experts.2.weight"]
    levels = prune_levels(model, GRID, parameters=weights)
    found = loss_matrix(model, x, levels, LOSS, progress=False)
    assert found[-40:, -1].max() > 0.01
    certificate = calibrate(
        model, x, parameters=weights, loss=LOSS, alpha=0.2, delta=0.1, progress=False
    )
    assert not any("changes no output" in note for note in certificate.notes)


class Keeping(nn.Module):
    """Keeps activations in containers, as models with auxiliary losses do."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 5)
        self.features: dict[str, list[Tensor]] = {}
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        self.features["hidden"] = [hidden]
        if self.late and len(x) > 4 and float(x[:, 0].max()) > 1.5:
            hidden = hidden + 0 * hidden.sum().item()
        return self.last(hidden)


def test_a_late_fallback_of_a_network_that_keeps_activations(one_thread):
    with pytest.warns(UserWarning, match="one by one"):
        check(Keeping(late=True).eval())


def test_what_is_left_of_a_training_step(one_thread):
    torch.manual_seed(0)
    model = Keeping()
    model(X).sum().backward()
    check(model)
    assert not copied(model).features["hidden"][0].requires_grad
    assert model.features["hidden"][0].requires_grad


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def test_inference_mode_of_the_caller():
    model = Counting().eval()
    levels = prune_levels(model, GRID)
    expected = loss_matrix(model, X, levels, LOSS, progress=False)
    with torch.inference_mode():
        assert torch.equal(loss_matrix(model, X, levels, LOSS, progress=False), expected)
    assert model.calls == 0


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 8), nn.ReLU())
        self.head = nn.Linear(8, 5)
        self.features: dict[str, Tensor] = {}
        self.net[1].register_forward_hook(lambda module, args, y: self.features.update(h=y))

    def forward(self, x: Tensor) -> Tensor:
        self.net(x)
        return self.head(self.features["h"])


def test_hooks_that_hold_the_model_are_warned_of():
    model = Hooked().eval()
    levels = prune_levels(model, GRID)
    with pytest.warns(UserWarning, match=r"a hook of 'net.1' holds"), pytest.raises(KeyError):
        loss_matrix(model, X, levels, LOSS, progress=False)


def test_a_model_that_cannot_be_copied_says_so():
    model = nn.Sequential(nn.Linear(12, 5))
    levels = prune_levels(model, GRID)
    model.lock = threading.Lock()
    for work in (
        lambda: confprune.input_norms(model, X, progress=False),
        lambda: loss_matrix(model, X, levels, LOSS, progress=False),
        lambda: levels.prune(model, 0),
    ):
        with pytest.raises(TypeError, match=r"cannot be copied, .*pickle.*deepcopy"):
            work()


STATE: dict[str, Tensor] = {}


class Context:
    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}


CONTEXT = Context()


def through_a_variable(x: Tensor) -> Tensor:
    STATE["x"] = x
    return STATE["x"]


def through_an_object(x: Tensor) -> Tensor:
    CONTEXT.state["positive"] = (x[:, :1] > 0).float()
    return x * CONTEXT.state["positive"]


def through_numpy(x: Tensor) -> Tensor:
    np.random.seed(0)  # noqa: NPY002 (what some do)
    return x + float(np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("step", [through_a_variable, through_an_object, through_numpy])
def test_networks_whose_copies_share_something(step):
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(step(x)).relu())

    check(Sharing().eval())
