"""Models that torch.compile wraps are those that they were made of, by the same names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import confprune
from confprune.parameters import named_modules, named_parameters, plain_name

X = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


@pytest.fixture(params=["whole", "part", "both"])
def wrapped(request, model) -> nn.Module:
    """The same network, compiled."""
    if request.param != "whole":
        model = nn.Sequential(model[0], model[1], compiled(model[2]))
    return model if request.param == "part" else compiled(model)


def certified(model: nn.Module) -> confprune.Certificate:
    return confprune.calibrate(model, X, loss="cosine", alpha=0.1, delta=0.1, progress=False)


@pytest.mark.parametrize("name", ["my_orig_mod.weight", "weight", "", "a.b.c"])
def test_other_names_stay(name):
    assert plain_name(name) == name


def test_names(model, wrapped):
    assert list(named_parameters(wrapped)) == [name for name, _ in model.named_parameters()]
    modules = named_modules(wrapped)
    assert set(modules) == set(dict(model.named_modules()))
    assert modules["2"] is model[2]
    for names in (["2.weight"], lambda name, _: name == "2.weight"):
        assert list(confprune.prune_levels(wrapped, [0.5], parameters=names).levels) == ["2.weight"]
    own = next(name for name, p in wrapped.named_parameters() if p is model[2].weight)
    assert list(confprune.prune_levels(wrapped, [0.5], parameters=[own]).levels) == ["2.weight"]


def test_one_certificate_for_both(model, wrapped):
    certificate = certified(model)
    assert certificate.sparsity > 0
    assert certified(wrapped).pruning == certificate.pruning
    pruned, again = certificate.prune(model), certificate.prune(wrapped)
    assert type(again) is type(wrapped)
    torch.testing.assert_close(again(X), pruned(X), rtol=0, atol=0)
    certificate.verify(wrapped, X, progress=False)
    certified(wrapped).verify(model, X, progress=False)


def test_compression(model, wrapped, tmp_path: Path):
    certificate = certified(wrapped)
    pruned = certificate.prune(wrapped)
    small = confprune.sparse.compress(pruned, kernel="sparse", min_sparsity=0)
    assert [type(part) for part in small] == [
        confprune.sparse.SparseLinear,
        nn.ReLU,
        confprune.sparse.SparseLinear,
    ]
    torch.testing.assert_close(small(X), certificate.prune(model)(X))
    path = tmp_path / "small.safetensors"
    for stored in (small, compiled(small)):
        confprune.sparse.save_sparse(stored, path, certificate)
        for structure in (model, wrapped):
            loaded = confprune.sparse.load_sparse(path, structure, kernel="sparse")
            torch.testing.assert_close(loaded(X), small(X), rtol=0, atol=0)
    certificate.verify(small, X, full=wrapped, progress=False)
