"""The drop-in for torch.nn.utils.prune against torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from benchmarks.comparisons import FASTER, bars, compare, table
from benchmarks.records import Row
from benchmarks.timing import Contender, interleaved
from confprune.nn.utils import prune as our_prune

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How much faster does code that prunes get by changing one import?"
PEERS: tuple[str, ...] = ()

LAYERS = 10
AMOUNT = 0.5


@dataclass(frozen=True)
class Sizes:
    """Weights in all, and effort in timing."""

    weights: int
    rounds: int
    seconds: float


FULL = Sizes(10_000_000, rounds=9, seconds=6.0)
QUICK = Sizes(1_000_000, rounds=3, seconds=0.5)


def _pairs(model: nn.Sequential) -> list[tuple[nn.Module, str]]:
    return [(layer, "weight") for layer in model]


def _globally(prune: ModuleType, model: nn.Sequential) -> None:
    prune.global_unstructured(_pairs(model), prune.L1Unstructured, amount=AMOUNT)


def _twice(prune: ModuleType, model: nn.Sequential) -> None:
    for _ in range(2):
        _globally(prune, model)


def _each(prune: ModuleType, model: nn.Sequential) -> None:
    for layer, name in _pairs(model):
        prune.l1_unstructured(layer, name, AMOUNT)


CALLS: dict[str, Callable[[ModuleType, nn.Sequential], None]] = {
    "global_unstructured": _globally,
    "global_unstructured, again on what is left": _twice,
    "l1_unstructured of each layer": _each,
}


def measure(sizes: Sizes, seed: int) -> list[Row]:
    """A row for each way of calling it."""
    torch.manual_seed(seed)
    width = int((sizes.weights / LAYERS) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    rows = []
    for name, call in CALLS.items():
        contenders = {
            prune.__name__: Contender(
                lambda model, call=call, prune=prune: call(prune, model),
                prepare=lambda: copy.deepcopy(model),
            )
            for prune in (our_prune, torch_prune)
        }
        times = interleaved(contenders, rounds=sizes.rounds, seconds=sizes.seconds)
        count = sum(layer.weight.numel() for layer in model) / 1e6
        rows.append(
            compare(
                f"{name}, {count:.3g} M weights",
                times[our_prune.__name__],
                torch_prune.__name__,
                times[torch_prune.__name__],
                target=FASTER,
                agrees=_zeros(call, our_prune, model) == _zeros(call, torch_prune, model),
            )
        )
    return rows


def _zeros(call: Callable[..., None], prune: ModuleType, model: nn.Sequential) -> int:
    """How many weights are pruned; which, among equals, is a matter of taste."""
    pruned = copy.deepcopy(model)
    call(prune, pruned)
    return sum(int((layer.weight_mask == 0).sum()) for layer in pruned)


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {"network": f"{LAYERS} square linear layers, float32", "amount": AMOUNT}


def tables(record: Mapping[str, Any]) -> str:
    """One table."""
    return table(record["rows"])


def plot(record: Mapping[str, Any]) -> Figure:
    """Speed-ups over torch."""
    return bars(record["rows"], "The drop-in against torch.nn.utils.prune")
