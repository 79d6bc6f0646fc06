"""Networks pruned one by one, none of which has run before: what a loss matrix is held to."""

from __future__ import annotations

import torch
from level_by_level import GRID
from torch import Tensor, nn

import confprune
from confprune import Reference, loss_matrix, prune_levels
from confprune.copies import copied

X = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
LOSS = "soft_disagreement"


def honest(model: nn.Module, levels: confprune.PruneLevels) -> Tensor:
    """The losses of networks pruned one by one, none of which has run before."""
    loss = confprune.losses.BUILT_IN[LOSS]
    with torch.no_grad():
        full = copied(model).eval()(X)
        pruned = [levels.prune(model, j).eval()(X) for j in range(len(levels))]
        return torch.stack([loss(outputs, Reference(full)) for outputs in pruned], dim=1)


def check(model: nn.Module) -> None:
    levels = prune_levels(model, GRID)
    expected = honest(model, levels)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = {id(module): dict(vars(module)) for module in model.modules()}
    found = loss_matrix(model, X, levels, LOSS, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert expected[:, -1].max() > 1e-3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for module in model.modules():
        assert vars(module).keys() == kept[id(module)].keys()


def matrix(model: nn.Module, **settings: object) -> Tensor:
    levels = prune_levels(model, GRID)
    return loss_matrix(model, X, levels, LOSS, progress=False, **settings)
