"""Networks side by side: the same numbers, and alone wherever two of them might meet."""

from __future__ import annotations

import threading
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from machine import threads
from torch import nn
from torch.overrides import TorchFunctionMode

from confprune import loss_matrix, prune_levels
from confprune.copies import running_copy
from confprune.grid import GridForward
from confprune.grid.workers import Workers
from confprune.losses import BUILT_IN, Loss

GRID = [0.0, 0.3, 0.6, 0.9]
CHUNK = 128 * 30 * 4 * 4  # bytes of 128 examples


class Keeping(nn.Module):
    """Keeps its hidden state, as many modules do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 30), nn.Linear(30, 4)
        self.register_buffer("state", torch.zeros(1))

    def forward(self, x):
        self.hidden = self.first(x).relu()
        self.state = self.hidden.sum(1, keepdim=True)
        return self.second(self.hidden) + 0 * self.state


names: set[str] = set()


@pytest.fixture(autouse=True)
def noted(monkeypatch):
    """Has the names of threads noted, where no network would be seen to do it."""
    evaluate = GridForward._chunk_losses

    def noting(*arguments):
        names.add(threading.current_thread().name)
        return evaluate(*arguments)

    monkeypatch.setattr(GridForward, "_chunk_losses", noting)
    names.clear()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Keeping().eval()


def evaluated(model, number, losses=(BUILT_IN["disagreement"],), forward=None, n=4000):
    """Losses on several threads, in chunks of one tile of lanes."""
    grid = GridForward(
        model, prune_levels(model, GRID), losses, forward=forward, activation_bytes=CHUNK
    )
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    done = []
    with threads(number):
        values = grid.evaluate(x, [0, 1, 2, 3], done=done.append)
    assert sum(done) == n
    return values


def workers():
    return {name for name in names if name.startswith("confprune")}


@pytest.mark.parametrize("number", [2, 3, 6])
def test_any_number_of_threads_gives_the_same_losses(model, number):
    alone = evaluated(model, 1)
    assert not workers()
    assert torch.equal(evaluated(model, number), alone)
    assert 1 < len(workers()) <= 4


@pytest.mark.parametrize("chunks", [8, 9, 10, 11])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_chunks_that_are_left_are_shared_by_levels(model, number, chunks):
    whole = evaluated(model, 1, (BUILT_IN["soft_disagreement"],), n=128 * chunks - 5)
    found = evaluated(model, number, (BUILT_IN["soft_disagreement"],), n=128 * chunks - 5)
    assert torch.equal(found, whole)
    if chunks >= 2 * number:
        assert workers()


def test_the_loss_matrix_is_the_same(model):
    levels, x = prune_levels(model, GRID), torch.randn(2000, 6)
    with threads(1):
        expected = loss_matrix(model, x, levels, "soft_disagreement", activation_bytes=CHUNK)
    with threads(2):
        found = loss_matrix(model, x, levels, "soft_disagreement", activation_bytes=CHUNK)
    assert torch.equal(found, expected)


def test_the_number_of_threads_stays(model):
    with threads(3):
        evaluated(model, 2)
        assert torch.get_num_threads() == 3


def test_few_chunks_are_done_here(model):
    evaluated(model, 2, n=3)
    assert not workers()


def test_networks_with_hooks_run_alone(model):
    found = []
    handle = model.first.register_forward_hook(lambda *_: found.append(1))
    evaluated(model, 2)
    handle.remove()
    assert found
    assert not workers()


def test_a_forward_or_a_loss_of_the_caller_runs_alone(model):
    evaluated(model, 2, forward=lambda model, x: model(x))
    loss = Loss("gap", lambda y, reference: (y - reference.outputs).abs().mean(1).clamp(max=1))
    evaluated(model, 2, losses=[loss])
    assert not workers()


def test_a_network_that_cannot_be_copied_is_refused(model):
    model.lock = threading.Lock()
    for work in (lambda: evaluated(model, 2), lambda: prune_levels(model, GRID).prune(model, 0)):
        with pytest.raises(TypeError, match=r"cannot be copied.*pickle.*deepcopy"):
            work()


STATE: dict[str, object] = {}


class Shared:
    stack: ClassVar[list[torch.Tensor]] = []


def remember(x):
    global LAST
    LAST = x
    return x


LAST = torch.zeros(())


def through_a_variable(x):
    STATE["x"] = x
    return STATE["x"]


def through_a_class(x):
    Shared.stack.append(x)
    return x.relu() + Shared.stack.pop()  # as before, when it is done


def in_place(x):
    Shared.kept[:] = 1
    return x


def by_numpy(x):
    np.random.seed(0)  # noqa: NPY002 (what some do)
    return x + float(np.random.rand())  # noqa: NPY002


GENERATOR = np.random.default_rng(0)


def by_a_generator(x):
    return x + float(GENERATOR.random())


def closed_over():
    count = 0

    def counted(x):
        nonlocal count
        count += 1
        return x

    return counted


counted = closed_over()
Shared.kept = torch.zeros(3)


@pytest.mark.parametrize(
    "step",
    [through_a_variable, through_a_class, in_place, remember, by_numpy, by_a_generator, counted],
)
def test_networks_that_touch_what_copies_share_run_alone(model, step):
    class Touching(Keeping):
        def forward(self, x):
            return super().forward(step(x))

    expected = evaluated(Touching().eval(), 1)
    assert expected.shape == (1, 4000, 4)
    evaluated(Touching().eval(), 2)
    assert not workers()


def test_what_is_only_read_does_not_matter(model):
    class Reading(Keeping):
        def forward(self, x):
            return super().forward(x + len(STATE) + Shared.kept.sum() * 0)

    evaluated(Reading().eval(), 2)
    assert workers()


class Unready:
    """A stand-in for what is not there yet, as frameworks have them: nothing may be asked of it."""

    def __getattribute__(self, name):
        raise RuntimeError(f"{name} outside of a request")


class Unloaded(types.ModuleType):
    def __getattribute__(self, name):
        raise RuntimeError(f"{name} would load it")


def test_what_stands_around_is_left_in_peace(monkeypatch):
    monkeypatch.setitem(globals(), "UNREADY", Unready())
    monkeypatch.setitem(globals(), "UNLOADED", Unloaded("unloaded"))

    class Reading(Keeping):
        def forward(self, x):
            return super().forward(x)

    evaluated(Reading().eval(), 2)
    assert workers()


def test_a_network_that_falls_back_runs_alone():
    class Random(Keeping):
        def forward(self, x):
            torch.manual_seed(0)  # one random projection, the same in every call
            return super().forward(x @ torch.randn(6, 6))

    torch.manual_seed(0)
    model, x = Random().eval(), torch.randn(4000, 6)
    levels = prune_levels(model, GRID)
    with threads(2), pytest.warns(UserWarning, match="one by one"):
        found = loss_matrix(model, x, levels, "soft_disagreement", activation_bytes=CHUNK)
    assert found[:, 0].max() < 1e-5
    assert not workers()


def test_modes_of_the_caller_hold_for_all(model):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        evaluated(model, 2)
    assert not workers()


def test_parameters_are_shared_and_buffers_are_not(model):
    pool = Workers(model, lambda: running_copy(model), most=2)
    with threads(2):
        seen = list(pool.map(lambda network, _: (network.first.weight, network.state), range(8)))
    assert all(weight is model.first.weight for weight, _ in seen)
    assert all(state is not model.state for _, state in seen)


def test_results_come_in_order_and_errors_where_they_were(model):
    def half(network, item):
        if item == 6:
            raise ValueError("six")
        return item / 2

    pool = Workers(model, lambda: running_copy(model), most=4)
    with threads(2):
        assert list(pool.map(half, range(6))) == [0, 0.5, 1, 1.5, 2, 2.5]
        coming = pool.map(half, range(40))
        assert [next(coming) for _ in range(6)] == [0, 0.5, 1, 1.5, 2, 2.5]
        with pytest.raises(ValueError, match="six"):
            next(coming)
        assert list(pool.map(half, range(4))) == [0, 0.5, 1, 1.5]


def test_no_gradients_are_kept(model):
    pool = Workers(model, lambda: running_copy(model), most=2)
    with threads(2), torch.no_grad():
        outputs = list(pool.map(lambda network, _: network(torch.ones(1, 6)), range(8)))
    assert not any(y.requires_grad for y in outputs)
