"""What goes wrong in ordinary use is told in words that name the way out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import confprune
from confprune import loss_matrix, prune_levels
from confprune.batches import check_data
from confprune.calling import padding_mask_of

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"alpha": 0.3, "delta": 0.1, "progress": False}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.mark.filterwarnings("error")
def test_two_tensors_in_a_list_are_two_batches_with_a_warning_where_they_seem_not_to_be():
    tokens = torch.arange(60).view(20, 3)
    for data in ([tokens, tokens], [X, torch.arange(len(X))], [X, X[:, 0]]):
        with pytest.warns(UserWarning, match="inputs and targets are a tuple"):
            check_data(data, None)
    for data in ([X, X], [X, X[:7]], [tokens, tokens[:9]], [X], [X, X, X], (tokens, tokens)):
        check_data(data, None)


def test_a_model_for_batches_of_one_size(model):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.shift = model, nn.Parameter(torch.zeros(7, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.shift

    fixed = Fixed()
    levels = prune_levels(fixed, [0.5])
    with pytest.raises(ValueError, match="takes 7 examples at once, but not the first 4"):
        loss_matrix(fixed, [X[:7], X[7:14]], levels, "disagreement", progress=False)
    with pytest.raises(RuntimeError, match="must match"):  # not for any number
        loss_matrix(fixed, [X[:9]], levels, "disagreement", progress=False)


def test_labels_that_are_no_class(model):
    labels = torch.zeros(400, dtype=torch.long)
    labels[123] = -100
    with pytest.raises(ValueError, match=r"for example 123 at level.*or the label is no class"):
        confprune.calibrate(model, (X, labels), loss="error", looks=None, **SETTINGS)


def test_nan_where_a_layer_is_empty():
    class Normed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight / self.weight.norm()).T

    torch.manual_seed(0)
    model = nn.Sequential(Normed(6, 4), nn.Linear(4, 4))
    model[0].weight.data /= 100
    levels = prune_levels(model, [0.1, 0.7])
    message = "All weights of '0.weight' are pruned at that sparsity: a grid that ends before"
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_matrix(model, X, levels, "soft_disagreement", progress=False)


def test_percentages(model):
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 50: 50 % is 0.5"):
        prune_levels(model, [50, 90])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_default_grid_ends_where_a_criterion_does(model, scope):
    certificate = confprune.calibrate(
        *(model, X),
        loss="disagreement",
        criterion="magnitude(min_per_layer=40)",
        scope=scope,
        looks=None,
        **SETTINGS,
    )
    most = {"global": 1 - 80 / 160, "layer": 1 - 40 / 64}[scope]
    assert certificate.sparsities[0] == 0
    assert most - 0.02 < certificate.sparsities[-1] < most + 0.01  # counts are rounded
    with pytest.raises(ValueError, match="cannot be reached"):
        prune_levels(model, [0.9], criterion="magnitude(min_per_layer=40)", scope=scope)


def test_models_with_a_part_in_torchscript(model):
    scripted = torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4))
    mixed = nn.Sequential(model, scripted)
    levels = prune_levels(mixed, [0.0, 0.5])
    assert list(levels.levels) == ["0.0.weight", "0.2.weight"]
    losses = loss_matrix(mixed, X, levels, "soft_disagreement", progress=False)
    expected = levels.prune(mixed, 1)(X).softmax(-1) - mixed(X).softmax(-1)
    torch.testing.assert_close(losses[:, 1], expected.abs().sum(-1) / 2, rtol=0, atol=1e-5)


def test_a_computed_weight_leaves_its_layer_dense(model):
    model = nn.Sequential(model, nn.utils.parametrizations.weight_norm(nn.Linear(4, 64)))
    names = ["0.0.weight", "0.2.weight"]
    pruned = prune_levels(model, [0.9], parameters=names).prune(model, 0)
    small = confprune.sparse.compress(pruned, kernel="sparse", min_sparsity=0)
    assert isinstance(small[0][2], confprune.sparse.SparseLinear) or small[0][2].weight.any()
    torch.testing.assert_close(small(X), pruned(X))


@dataclass
class Output:
    logits: Tensor


class Dressed(nn.Module):
    """Returns its outputs in some dress."""

    def __init__(self, body: nn.Module, dress: Any) -> None:
        super().__init__()
        self.body, self.dress = body, dress

    def forward(self, x: Tensor) -> Any:
        return self.dress(self.body(x))


@pytest.mark.parametrize(
    "dress", [Output, lambda y: {"out": y}, lambda y: {"aux": y[:1], "logits": y}]
)
def test_outputs_in_other_dress(model, dress):
    levels = prune_levels(model, [0.5])
    expected = loss_matrix(model, X, levels, "soft_disagreement", progress=False)
    dressed = Dressed(model, dress)
    levels = prune_levels(dressed, [0.5])
    found = loss_matrix(dressed, X, levels, "soft_disagreement", progress=False)
    torch.testing.assert_close(found, expected)


def test_a_model_that_wants_its_labels():
    class Wanting(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            if labels is None:
                raise ValueError("give labels")
            return super().forward(x)

    wanting = Wanting(6, 4)
    data = {"x": X, "labels": torch.zeros(400, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"give labels: of a batch the model is given .* labels"):
        confprune.calibrate(wanting, data, loss="disagreement", **SETTINGS)


def test_the_padding_of_a_decoder_is_its_own():
    encoder, decoder = torch.tensor([[1, 0]]), torch.tensor([[1, 1]])
    assert torch.equal(padding_mask_of({"attention_mask": encoder}), encoder.bool())
    both = {"attention_mask": encoder, "decoder_attention_mask": decoder}
    assert torch.equal(padding_mask_of(both), decoder.bool())
    assert padding_mask_of({"attention_mask": encoder, "decoder_input_ids": decoder}) is None


def test_how_a_certificate_pruned_is_short_to_read(model):
    certificate = confprune.calibrate(model, X, loss="disagreement", **SETTINGS)
    assert "sha256" not in repr(certificate.pruning)
    assert "criterion='magnitude'" in repr(certificate.pruning)


@pytest.mark.parametrize("given", [lambda m: [(m[0], "weight")], lambda m: [m[0].weight]])
def test_parameters_by_anything_but_names(given):
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"parameters must be names, such as '0.weight', or a pred"):
        prune_levels(model, [0.5], parameters=given(model))


def test_a_path_in_the_place_of_the_model():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        confprune.sparse.save_sparse("small.safetensors", nn.Linear(4, 3))


def test_fine_tuning_keeps_the_zeros_as_the_documentation_has_it():
    import confprune.nn.utils.prune as prune

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(200, 16)
    levels = prune_levels(model, [0.5])
    sparse = levels.prune(model, 0)
    for name in levels.levels:
        layer = sparse.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(layer, "weight", levels.mask(name, 0))
    optimizer = torch.optim.Adam(sparse.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        sparse(x).square().sum().backward()
        optimizer.step()
    for name in levels.levels:
        prune.remove(sparse.get_submodule(name.removesuffix(".weight")), "weight")
        weight = sparse.get_parameter(name)
        assert torch.equal(weight == 0, ~levels.mask(name, 0))
        assert not torch.equal(weight, model.get_parameter(name) * levels.mask(name, 0))
