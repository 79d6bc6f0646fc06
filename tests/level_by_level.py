"""The slow, obvious reference of the grid forward: every level's masked network, run as it is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import confprune
from confprune import Loss, PruneLevels, Reference


def _distance(outputs: Tensor, reference: Reference) -> Tensor:
    """How far outputs are from the full network's; continuous, so nothing hides in an argmax."""
    difference = (outputs - reference.outputs).flatten(1).float()
    return difference.abs().tanh().mean(-1)


DISTANCE = Loss("distance", _distance, vmappable=True)
ANY = ""
"""Takes any reason of a fallback, and none."""
GRID = [0.0, 0.1, 0.35, 0.5, 0.7, 0.9, 0.97]


def plain_outputs(model: nn.Module, batch: Any, forward: Callable[..., Any] | None) -> Tensor:
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, dict):
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return model(batch[0] if isinstance(batch, tuple) else batch)


def slow_losses(
    model: nn.Module,
    batches: Sequence[Any],
    levels: PruneLevels,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """The distance of every example at every level, [n, K]."""
    model = copy.deepcopy(model).eval()
    columns = []
    with torch.no_grad():
        full = [plain_outputs(model, batch, forward) for batch in batches]
        for j in range(len(levels)):
            pruned = levels.prune(model, j)
            outputs = [plain_outputs(pruned, batch, forward) for batch in batches]
            values = [_distance(y, Reference(f)) for y, f in zip(outputs, full, strict=True)]
            columns.append(torch.cat(values))
    return torch.stack(columns, dim=1)


def grid_losses(
    model: nn.Module,
    data: Any,
    levels: PruneLevels,
    *,
    fallback: str | None = None,
    **settings: Any,
) -> Tensor:
    """The same from `loss_matrix`; `fallback` is what its warning must say, None if it must not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = confprune.loss_matrix(model, data, levels, DISTANCE, progress=False, **settings)
    said = [str(w.message) for w in caught if "one by one" in str(w.message)]
    if fallback is None:
        assert not said, said
    elif fallback != ANY:
        assert len(said) == 1, said
        assert fallback in said[0], said
    return losses


class Functions(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
