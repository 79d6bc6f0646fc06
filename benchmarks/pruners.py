"""How thresholds and masks are found without confprune: what users call, as documented.

Those that know one level at a time are timed for one level in the middle of the grid; a row says by
how much that is multiplied.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.timing import Contender

SPARSITY = 0.5
"""Of the one level."""


@dataclass(frozen=True)
class Pruner:
    """A peer of the selection.

    Attributes
    ----------
    name : str
    whole : bool
        Whether it does all levels at once; else it does one.
    contender : callable (weights, ranks) -> Contender
        `weights` is one tensor, `ranks` [K] the number of weights pruned at each level.
    module : str
        The package it is of, which may not be installed.
    """

    name: str
    whole: bool
    contender: Callable[[Tensor, Sequence[int]], Contender]
    module: str = "torch"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def _partition(weights: Tensor, ranks: Sequence[int]) -> Contender:
    places = [rank - 1 for rank in ranks if rank > 0]
    values = weights.numpy()
    return Contender(lambda: np.partition(np.abs(values), places)[places])


def _sort(weights: Tensor, ranks: Sequence[int]) -> Contender:
    places = [rank - 1 for rank in ranks if rank > 0]
    return Contender(lambda: weights.abs().sort().values[places])


def _topk(weights: Tensor, ranks: Sequence[int]) -> Contender:
    count = ranks[len(ranks) // 2]
    return Contender(lambda: torch.topk(weights.abs(), count, largest=False))


def _kthvalue(weights: Tensor, ranks: Sequence[int]) -> Contender:
    count = ranks[len(ranks) // 2]
    return Contender(lambda: torch.kthvalue(weights.abs(), count))


THRESHOLDS = (
    Pruner("numpy.partition", True, _partition, "numpy"),
    Pruner("torch.sort", True, _sort),
    Pruner("torch.kthvalue", False, _kthvalue),
    Pruner("torch.topk", False, _topk),
)


def _global_unstructured(weights: Tensor, ranks: Sequence[int]) -> Contender:
    def run(model: nn.Module) -> None:
        prune.global_unstructured(
            [(layer, "weight") for layer in model if isinstance(layer, nn.Linear)],
            pruning_method=prune.L1Unstructured,
            amount=SPARSITY,
        )

    return _on_copies(weights, run)


def _torch_pruning(weights: Tensor, ranks: Sequence[int]) -> Contender:
    import torch_pruning

    def run(model: Any) -> None:
        torch_pruning.pruner.MagnitudePruner(
            model,
            torch.zeros(1, model[0].in_features),
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            global_pruning=True,
            pruning_ratio=SPARSITY,
            ignored_layers=[model[-1]],
        ).step()

    return _on_copies(weights, run)


def _llm_compressor(weights: Tensor, ranks: Sequence[int]) -> Contender:
    from llmcompressor.core import State
    from llmcompressor.modifiers.pruning.magnitude import MagnitudePruningModifier

    def run(model: nn.Module) -> None:
        modifier = MagnitudePruningModifier(
            targets=["Linear"],
            init_sparsity=SPARSITY,
            final_sparsity=SPARSITY,
            start=0.0,
            end=1.0,
        )
        state = State(model=model)
        modifier.initialize(state)
        modifier.finalize(state)

    return _on_copies(weights, run)


GLOBAL_UNSTRUCTURED = "torch prune.global_unstructured"

MASKS = (
    Pruner(GLOBAL_UNSTRUCTURED, False, _global_unstructured),
    Pruner("Torch-Pruning (channels)", False, _torch_pruning, "torch_pruning"),
    Pruner("llm-compressor (each layer alone)", False, _llm_compressor, "llmcompressor"),
)
"""They change the model: each call has a copy of its own, whose making is not timed."""


def layer_of(weights: Tensor) -> nn.Linear:
    """A layer that holds these weights, without copying them."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weights.view(1, -1) if weights.dim() == 1 else weights)
    return layer


def _on_copies(weights: Tensor, run: Callable[[Any], None]) -> Contender:
    """`run` on a network of two square layers with about these weights, and a small last one."""
    width = int((weights.numel() / 2) ** 0.5)
    halves = weights[: 2 * width * width].view(2, width, width)
    first, second = (nn.Linear(width, width, bias=False, device="meta") for _ in halves)
    first.weight, second.weight = (nn.Parameter(half) for half in halves)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, 10))
    return Contender(run, prepare=lambda: copy.deepcopy(model))
