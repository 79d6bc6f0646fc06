"""Losses of every image of a pool at every level of a way of pruning, and what tests make of them.

The losses are computed once; calibration and test sets are then drawn from their rows. That gives
what calibrating anew on each split would give, because neither the network nor the scores have seen
the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from benchmarks.paper.data import Examples
from confprune.batches import ordering_size
from confprune.evaluation import Evaluation, evaluate_all
from confprune.grid import GridForward
from confprune.levels import PruneLevels
from confprune.losses import Loss
from confprune.risk.bounds import required_n
from confprune.risk.looks import default_looks
from confprune.risk.pvalues import PVALUES
from confprune.risk.sequential import RiskTarget, SequentialTest
from confprune.risk.testing import fixed_sequence, pareto_order

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """What is kept small, and how small.

    Attributes
    ----------
    name : str
        "labels", "full network" or "selective".
    loss : Loss
    selective : bool
        Whether only accepted predictions count.
    alpha : float
        The limit of most experiments.
    alphas : sequence of float
        The limits of the others.
    """

    name: str
    loss: Loss
    selective: bool
    alpha: float
    alphas: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """The losses of n images at C candidates.

    Attributes
    ----------
    losses : dict from loss name to [n, C] float32
    accepted : [n, C] bool
    groups : [n] str
    sparsities : [C] float64
        Pruned weights over all prunable ones.
    """

    losses: dict[str, NDArray[np.float32]]
    accepted: NDArray[np.bool_]
    groups: NDArray[np.str_]
    sparsities: FloatArray

    def __len__(self) -> int:
        return len(self.groups)

    def risks(self, question: Question, index: IntArray) -> FloatArray:
        """The mean loss of some images at each candidate, [C]."""
        sums, counts = _sums(self, question, index, None)
        return sums / np.maximum(counts, 1)


class Method(NamedTuple):
    """A way to test: the p-value for losses of 0 and 1, for others, and whether to look early."""

    name: str
    binary: str
    general: str
    early: bool


PAPER = Method("paper", "hoeffding_bentkus", "hoeffding_bentkus", False)
ONE_TEST = Method("confprune, one test", "binomial", "convex", False)
EARLY = Method("confprune", "binomial", "betting", True)
METHODS = (PAPER, ONE_TEST, EARLY)
"""The paper's; confprune's without and with early looks, the last being its default."""


def make_table(
    model: nn.Module,
    pool: Examples,
    levels: PruneLevels,
    losses: Sequence[Loss],
    accept: Loss,
    total: int,
    *,
    progress: bool = True,
) -> Table:
    """Evaluate a pool at all levels; `total` is the number of prunable weights."""
    grid = GridForward(model, levels, [*losses, accept])
    candidates = [(0, j) for j in range(len(levels))]
    evaluation = Evaluation(model, [grid], candidates, losses, accept)
    evidence = evaluate_all(
        evaluation, (pool.inputs, pool.targets), batch_size=None, order=None, progress=progress
    )
    assert evidence.accepted is not None
    return Table(
        {loss.name: matrix for loss, matrix in zip(losses, evidence.losses, strict=True)},
        evidence.accepted,
        pool.groups,
        levels.counts.numpy() / total,
    )


def joined(tables: Sequence[Table]) -> Table:
    """The candidates of several ways of pruning in one table."""
    first = tables[0]
    return Table(
        {name: np.concatenate([t.losses[name] for t in tables], axis=1) for name in first.losses},
        np.concatenate([table.accepted for table in tables], axis=1),
        first.groups,
        np.concatenate([table.sparsities for table in tables]),
    )


def columns(table: Table, index: IntArray) -> Table:
    """The candidates at `index`, in that order."""
    return replace(
        table,
        losses={name: matrix[:, index] for name, matrix in table.losses.items()},
        accepted=table.accepted[:, index],
        sparsities=table.sparsities[index],
    )


def certify(
    table: Table,
    question: Question,
    index: IntArray,
    alpha: float,
    delta: float,
    method: Method,
    groups: Sequence[str] | None = None,
) -> int | None:
    """The sparsest candidate that a calibration on some images certifies; None if there is none.

    Parameters
    ----------
    index : [n] int64
        The images, in the order in which they come.
    groups : sequence of str, optional
        Keep the risk on each of them.
    """
    if len(index) < required_n(alpha, delta):
        return None
    binary = question.loss.binary
    pvalue = method.binary if binary else method.general
    every: Sequence[str | None] = groups or [None]
    test = _early if method.early else _at_once
    rejected = np.flatnonzero(test(table, question, index, alpha, delta, pvalue, every))
    return int(rejected[-1]) if len(rejected) else None


def certify_best(
    table: Table, question: Question, index: IntArray, alpha: float, delta: float, method: Method
) -> int | None:
    """The best certified of many candidates, tested along an order that a part has taught."""
    size = ordering_size(len(index))
    ordering, rest = index[:size], index[size:]
    losses = table.losses[question.loss.name][ordering]
    if question.selective:
        losses = np.where(table.accepted[ordering], losses, 0)
    front = pareto_order([losses], [alpha], table.sparsities)
    found = certify(columns(table, front), question, rest, alpha, delta, method)
    return None if found is None else int(front[found])


def _at_once(
    table: Table,
    question: Question,
    index: IntArray,
    alpha: float,
    delta: float,
    pvalue: str,
    groups: Sequence[str | None],
) -> NDArray[np.bool_]:
    from_sums = PVALUES[pvalue].from_sums
    assert from_sums is not None
    worst = np.zeros(len(table.sparsities))
    for group in groups:
        sums, counts = _sums(table, question, index, group)
        values = np.where(counts > 0, from_sums(sums, np.maximum(counts, 1), alpha), 1.0)
        worst = np.maximum(worst, values)
    return fixed_sequence(worst, delta)


def _early(
    table: Table,
    question: Question,
    index: IntArray,
    alpha: float,
    delta: float,
    pvalue: str,
    groups: Sequence[str | None],
) -> NDArray[np.bool_]:
    test = SequentialTest(
        default_looks(len(index), alpha, delta),
        len(table.sparsities),
        [RiskTarget(alpha, pvalue) for _ in groups],
        procedure="fixed_sequence",
    )
    while not test.finished:
        part, active = index[test.seen : test.next_look], test.active
        losses = table.losses[question.loss.name][part][:, active]
        counted = [_counted(table, question, part, active, group) for group in groups]
        test.update([losses] * len(groups), counted)
    return test.result().rejected


def _sums(
    table: Table, question: Question, index: IntArray, group: str | None
) -> tuple[FloatArray, IntArray]:
    """Sums of the losses that count, and how many do, at each candidate."""
    active = np.arange(len(table.sparsities))
    losses = table.losses[question.loss.name][index].astype(np.float64)
    counted = _counted(table, question, index, active, group)
    if counted is None:
        return losses.sum(axis=0), np.full(len(active), len(index))
    counted = np.broadcast_to(counted if counted.ndim == 2 else counted[:, None], losses.shape)
    return np.where(counted, losses, 0).sum(axis=0), counted.sum(axis=0)


def _counted(
    table: Table, question: Question, index: IntArray, active: IntArray, group: str | None
) -> NDArray[np.bool_] | None:
    """Which of the images count at which candidates; None: all at all."""
    member = None if group is None else table.groups[index] == group
    if not question.selective:
        return member
    accepted: NDArray[np.bool_] = table.accepted[index][:, active]
    return accepted if member is None else accepted & member[:, None]


def shuffled(n: int, seed: tuple[int, ...]) -> IntArray:
    """A random order of n images."""
    return np.random.default_rng(seed).permutation(n)
