"""Selection: thresholds and prune levels of a whole grid, against sorting and other pruners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.comparisons import (
    FASTER,
    Target,
    absent,
    at_least,
    at_most,
    bars,
    compare,
    table,
)
from benchmarks.pruners import GLOBAL_UNSTRUCTURED, MASKS, THRESHOLDS, Pruner, layer_of
from benchmarks.records import Row
from benchmarks.timing import Contender, interleaved
from confprune import prune_levels
from confprune.selection import select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How fast are thresholds and prune levels of a grid, against sorting and other pruners?"
PEERS = ("torch-pruning", "llmcompressor")

READ_ONCE = "reading the weights once"
MEMORY_MIB = 64
"""Allowed beyond the model and a byte a weight."""


@dataclass(frozen=True)
class Sizes:
    """Weights in all, weights the pruners of models are given, levels, and effort in timing."""

    weights: int
    pruned_weights: int
    levels: int
    rounds: int
    seconds: float


FULL = Sizes(50_000_000, 10_000_000, 100, rounds=15, seconds=8.0)
QUICK = Sizes(4_000_000, 400_000, 100, rounds=5, seconds=0.5)


def measure(sizes: Sizes, seed: int) -> list[Row]:
    """Rows of thresholds in float32 and bfloat16, of prune levels, and of the memory of both."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(sizes.weights, generator=generator).mul_(0.02)
    return [
        *_threshold_rows(weights, sizes),
        *_bfloat16_rows(weights.bfloat16(), sizes),
        *_level_rows(weights, sizes),
        *_memory_rows(sizes),
    ]


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {"weights": "one tensor, normal with standard deviation 0.02"}


def _grid(levels: int) -> list[float]:
    return [j / levels for j in range(levels)]


def _ranks(weights: Tensor, levels: int) -> list[int]:
    return [round(s * weights.numel()) for s in _grid(levels)]


def _thresholds(weights: Tensor, ranks: Sequence[int]) -> Tensor:
    return select({"weight": weights}, ranks).thresholds


def _threshold_rows(weights: Tensor, sizes: Sizes) -> list[Row]:
    what = f"thresholds of {sizes.levels} levels, {_count(weights)} float32"
    ranks = _ranks(weights, sizes.levels)
    contenders = {
        "confprune": Contender(lambda: _thresholds(weights, ranks)),
        READ_ONCE: Contender(weights.sum),
        **{peer.name: peer.contender(weights, ranks) for peer in THRESHOLDS},
    }
    sorted_values = torch.from_numpy(contenders[THRESHOLDS[0].name].run())
    agrees = torch.equal(_thresholds(weights, ranks)[1:].float(), sorted_values)
    times = interleaved(contenders, rounds=sizes.rounds, seconds=sizes.seconds)
    ours = times["confprune"]
    once = compare(what, ours, f"{READ_ONCE}: `weight.sum()`", times[READ_ONCE], target=at_most(4))
    targets = {THRESHOLDS[0].name: at_least(80)}
    return [once, *_against(what, ours, times, THRESHOLDS, sizes, 1.0, targets, agrees=agrees)]


def _bfloat16_rows(weights: Tensor, sizes: Sizes) -> list[Row]:
    what = f"thresholds of {sizes.levels} levels, {_count(weights)} bfloat16"
    ranks = _ranks(weights, sizes.levels)
    # Two of them are a float32, whose sum takes what memory takes; torch's own of bfloat16 is slow.
    pairs = weights[: len(weights) // 2 * 2].view(torch.float32)
    times = interleaved(
        {
            "confprune": Contender(lambda: _thresholds(weights, ranks)),
            READ_ONCE: Contender(pairs.sum),
        },
        rounds=sizes.rounds,
        seconds=sizes.seconds,
    )
    peer = f"{READ_ONCE}: `weight.view(torch.float32).sum()`"
    return [compare(what, times["confprune"], peer, times[READ_ONCE], target=at_most(3))]


def _level_rows(weights: Tensor, sizes: Sizes) -> list[Row]:
    what = f"prune levels of {sizes.levels} levels, {_count(weights)} float32"
    part = weights[: sizes.pruned_weights]
    peers = [peer for peer in MASKS if peer.installed]
    layer, grid = layer_of(weights), _grid(sizes.levels)
    contenders = {
        "confprune": Contender(lambda: prune_levels(layer, grid)),
        READ_ONCE: Contender(weights.sum),
        **{peer.name: peer.contender(part, _ranks(part, sizes.levels)) for peer in peers},
    }
    times = interleaved(contenders, rounds=sizes.rounds, seconds=sizes.seconds)
    ours = times["confprune"]
    once = compare(what, ours, f"{READ_ONCE}: `weight.sum()`", times[READ_ONCE], target=at_most(12))
    size = len(weights) / len(part)
    targets = {GLOBAL_UNSTRUCTURED: at_least(1000)}
    return [
        once,
        *_against(what, ours, times, peers, sizes, size, targets, of=f" of {_count(part)}"),
        *(absent(what, peer.name) for peer in MASKS if not peer.installed),
    ]


def _against(
    what: str,
    ours: Sequence[float],
    times: Mapping[str, Sequence[float]],
    peers: Sequence[Pruner],
    sizes: Sizes,
    size: float,
    targets: Mapping[str, Target],
    *,
    of: str = "",
    agrees: bool = True,
) -> list[Row]:
    """A row for each peer, whose work was on a part of the weights, or on one level, or both."""
    return [
        compare(
            what,
            ours,
            peer.name,
            times[peer.name],
            part="" if peer.whole else f"one level{of}",
            scale=size * (1 if peer.whole else sizes.levels),
            target=targets.get(peer.name, FASTER),
            agrees=agrees,
        )
        for peer in peers
    ]


def _memory_rows(sizes: Sizes) -> list[Row]:
    allowed = sizes.weights / 2**20 + MEMORY_MIB
    limit = f"a byte a weight and {MEMORY_MIB} MiB"
    rows = []
    for action in memory.ACTIONS:
        what = f"memory of {action} of {sizes.levels} levels beyond the model"
        if not memory.measurable():
            rows.append(absent(what, limit, "not measurable on this system"))
            continue
        used = memory.peak_bytes(action, sizes.weights, sizes.levels) / 2**20
        rows.append(compare(what, [used], limit, [allowed], unit="MiB", target=at_most(1)))
    return rows


def _count(weights: Tensor) -> str:
    millions = weights.numel() / 1e6
    return f"{millions:g} M" if millions >= 1 else f"{weights.numel():,}"


def tables(record: Mapping[str, Any]) -> str:
    """One table."""
    return table(record["rows"])


def plot(record: Mapping[str, Any]) -> Figure:
    """Speed-ups over the peers."""
    return bars(record["rows"], "Selection: confprune against what else finds thresholds and masks")
