"""The plain masked network is the one that `PruneLevels.prune` gives; the model stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from level_by_level import GRID
from one_by_one import LOSS, X, check, matrix
from torch import Tensor, nn

import confprune
from confprune import Loss, Reference, loss_matrix, prune_levels

pytestmark = pytest.mark.usefixtures("one_thread")


def twice() -> nn.Module:
    layer = nn.Linear(12, 12)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(12, 5))


def siamese() -> nn.Module:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(12, 8), nn.ReLU())
            self.b = self.a
            self.head = nn.Linear(8, 5)
            self.first = self.a[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) - self.b(x.flip(1)) + self.first(x))

    return Siamese()


def fallen_back() -> nn.Module:
    class Stepped(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum().item() > -1e9 else y * 0

    return Stepped(*twice())


def alias() -> nn.Module:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(12, 16), nn.Linear(16, 5)
            self.kept = [self.layer.weight]

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.linear(x, self.kept[0]).relu())

    return Alias()


def keeps_activations() -> nn.Module:
    class Keeping(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.hidden = self[0](x)
            return self[1](self.hidden.relu())

    return Keeping(nn.Linear(12, 16), nn.Linear(16, 5))


def own_training_mode() -> nn.Module:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self[1].eval()
            return self

    return Frozen(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)).train()


def after_a_run_with_gradients() -> nn.Module:
    model = keeps_activations()
    model(X)
    assert model.hidden.grad_fn is not None
    return model


@pytest.mark.parametrize(
    "make",
    [
        *(twice, siamese, fallen_back, alias, keeps_activations, own_training_mode),
        after_a_run_with_gradients,
    ],
)
@pytest.mark.filterwarnings("ignore:the levels are evaluated one by one")
def test_losses_are_those_of_networks_pruned_one_by_one(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    check(make())


def test_a_module_of_two_names_is_certified_as_it_is_deployed():
    torch.manual_seed(0)
    model = twice()
    before = copy.deepcopy(model)
    x = torch.randn(800, 12)
    certificate = confprune.calibrate(model, x, loss=LOSS, alpha=0.03, delta=0.1, progress=False)
    for same in (model, before):
        certificate.verify(same, x, progress=False)
    assert 0 < certificate.sparsity < 0.9


class Lazy(nn.Module):
    """Keeps what it makes of its weight in the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(12, 16), nn.Linear(16, 5)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.layer.weight * 1
        return self.out(F.linear(x, self.kept).relu())


def test_a_network_that_keeps_what_it_makes_of_its_weights_is_refused():
    model = Lazy()
    with pytest.raises(ValueError, match="depend on its calls before"):
        matrix(model)
    assert model.kept is None


def test_weights_that_change_nothing_are_refused_where_they_are_all():
    model = Lazy()
    model(X)
    model.out.requires_grad_(False)
    levels = prune_levels(model, GRID, parameters=["layer.weight"])
    with pytest.raises(ValueError, match="none of the weights that are pruned"):
        loss_matrix(model, X, levels, LOSS, progress=False)


def test_weights_that_change_nothing_are_noted():
    model = nn.ModuleDict({"used": nn.Linear(12, 5), "idle": nn.Linear(12, 5)})
    certificate = confprune.calibrate(
        model,
        X,
        loss=LOSS,
        alpha=0.5,
        delta=0.1,
        forward=lambda model, x: model["used"](x),
        progress=False,
    )
    assert "'idle.weight' is pruned and changes no output" in str(certificate)


def test_a_forward_that_calls_another_model_is_refused():
    model = twice()
    with pytest.raises(ValueError, match="must call the model that it is given"):
        matrix(model, forward=lambda _, x: model(x))


class Adapter(nn.Linear):
    """Merges its adapter for evaluation, as some do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.change = nn.Parameter(torch.randn(outputs, inputs) * 0.3)
        self.merged = False

    def train(self, mode: bool = True) -> Adapter:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.change * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.merged else self.weight + self.change
        return F.linear(x, weight, self.bias)


def test_evaluation_modes_that_change_weights_come_first():
    torch.manual_seed(0)
    model = nn.Sequential(Adapter(12, 16), nn.ReLU(), Adapter(16, 5))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"model\.eval\(\) changes '0.weight', "):
        matrix(model)
    with pytest.raises(ValueError, match="for evaluation: call"):
        confprune.input_norms(model, X, progress=False)
    assert model.training
    assert torch.equal(model[0].weight, before[0].weight)
    check(model.eval())


class TestLossesThatWriteIntoTheirReference:
    @staticmethod
    def error(outputs: Tensor, reference: Reference) -> Tensor:
        targets = reference.targets
        ignored = targets == -100
        targets[ignored] = 0
        wrong = (outputs.argmax(-1) != targets) & ~ignored
        reference.outputs.zero_()
        return wrong.float().mean(-1)

    @staticmethod
    def pure(outputs: Tensor, reference: Reference) -> Tensor:
        wrong = (outputs.argmax(-1) != reference.targets) & (reference.targets != -100)
        return wrong.float().mean(-1)

    @pytest.mark.parametrize("vmappable", [False, True])
    def test_change_nothing_elsewhere(self, vmappable):
        torch.manual_seed(0)
        model, tokens = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 9)), torch.arange(90) % 9
        tokens = tokens.view(30, 3)
        labels = torch.where(torch.rand(30, 3) < 0.4, -100, tokens)
        data = (tokens, labels.clone())
        levels = prune_levels(model, GRID)
        expected = loss_matrix(model, data, levels, self.pure, progress=False)
        writing = Loss("error", self.error, vmappable=vmappable)
        found = loss_matrix(model, data, levels, writing, progress=False)
        assert torch.equal(found, expected)
        assert torch.equal(data[1], labels)
        both = [confprune.Risk(self.pure, alpha=0.9), confprune.Risk(self.error, alpha=0.9)]
        certificate = confprune.calibrate(model, data, risks=both, delta=0.1, progress=False)
        first, second = certificate.parts
        assert first.risks == second.risks
