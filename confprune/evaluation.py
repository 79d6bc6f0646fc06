"""Losses of all candidates under test, example by example: whole, or until every fate is settled.

A candidate is a level of some grid; there is one grid for each way of pruning. What the tests need
of an example are its losses at the candidates, its group, and where its prediction is accepted.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from confprune.batches import (
    batch_length,
    batches,
    check_data,
    example_count,
    generous_batch_size,
    move_batch,
    slice_batch,
)
from confprune.distributed import ALONE, Ranks
from confprune.grid import GridForward, evaluation_mode
from confprune.losses import Loss
from confprune.risk.bounds import upper_bound, upper_bound_from_sums
from confprune.risk.inputs import FloatArray, IntArray, loss_sums
from confprune.risk.looks import LookPlan
from confprune.risk.pvalues import PVALUES
from confprune.risk.sequential import RiskTarget, SequentialResult, SequentialTest
from confprune.risk.testing import Procedure
from confprune.risks import Groups, Target, group_labels

_ROUNDING = 1e-5  # a loss may leave [0, 1] by this much in float arithmetic


@dataclass(frozen=True)
class Evidence:
    """What some examples say of A candidates.

    Attributes
    ----------
    losses : [L, B, A] float32
    accepted : [B, A] bool, or None where every prediction counts
    labels : group of each example, or None
    """

    losses: NDArray[np.float32]
    accepted: NDArray[np.bool_] | None
    labels: NDArray[np.str_] | None

    def of(self, target: Target, losses: Sequence[Loss]) -> tuple[NDArray[np.float32], Any]:
        """The losses [B, A] that a target is about, and which of them count (None: all)."""
        matrix = self.losses[[loss.name for loss in losses].index(target.risk.loss.name)]
        counted = self.accepted
        if target.group is not None and self.labels is not None:
            member = self.labels == target.group
            counted = member if counted is None else counted & member[:, None]
        return matrix, counted


class Evaluation:
    """The losses of candidates on batches of data.

    Parameters
    ----------
    model : torch.nn.Module
    grids : sequence of GridForward
        One for each way of pruning, all with the same measures: the losses, then `accept` if given.
    candidates : sequence of (grid, level)
        C pairs, in the order of testing.
    losses : sequence of Loss
    accept : Loss, optional
    groups : key or callable, optional
    ranks : Ranks
        Who else evaluates: all go through the same data, and each chunk of examples is for one.
        The chunks are those of a single process, because a network's outputs on an example may
        depend in the last bits on how many others are with it.
    """

    def __init__(
        self,
        model: nn.Module,
        grids: Sequence[GridForward],
        candidates: Sequence[tuple[int, int]],
        losses: Sequence[Loss],
        accept: Loss | None = None,
        groups: Groups | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.losses = tuple(losses)
        self._model = model
        self._grids = tuple(grids)
        self._candidates = np.array(candidates, dtype=np.int64).reshape(-1, 2)
        self._accept = accept
        self._groups = groups
        self.ranks = ranks
        self._share = itertools.cycle([rank == ranks.rank for rank in range(ranks.size)])
        self._seen = 0
        self._order: Tensor | None = None
        self._bar = tqdm(disable=True)
        self.selective = accept is not None

    def __len__(self) -> int:
        return len(self._candidates)

    @contextmanager
    def stream(
        self, data: Any, batch_size: int | None, order: Tensor | None, progress: bool
    ) -> Iterator[Iterator[Any]]:
        """The batches of `data` on the model's device; within, the model is in evaluation mode."""
        self._order = order
        check_data(data, batch_size)
        if batch_size is None:
            batch_size = generous_batch_size(data)  # the grids take batches apart
        # No generator may hold the mode: an exception would leave it to the garbage collector.
        with (
            evaluation_mode(self._model),
            progress_bar(data, order, progress, "calibrate") as self._bar,
            closing(moved_batches(self._model, data, batch_size, order)) as stream,
        ):
            yield stream

    def __call__(self, batch: Any, active: IntArray) -> Evidence:
        """Evaluate the candidates at `active` [A] on the next examples.

        What other ranks evaluate is 0 in it, until `completed`.

        Raises
        ------
        ValueError
            If a loss is NaN or outside [0, 1].
        """
        size = batch_length(batch)
        measures = len(self.losses) + (self._accept is not None)
        values = torch.empty(measures, size, len(active), dtype=torch.float32)
        grid_of, level_of = self._candidates[active].T
        grids = np.unique(grid_of)
        for g in grids:
            columns = np.flatnonzero(grid_of == g)
            columns = columns[np.argsort(level_of[columns])]
            levels = level_of[columns].tolist()
            grid = self._grids[g]
            last = g == grids[-1]
            done = self._bar.update if last else None
            part = grid.evaluate(batch, levels, done=done, share=self._share)
            for loss, matrix in zip(self.losses, part, strict=False):
                self._check_values(matrix, loss, levels, grid.levels.sparsities)
            values[:, :, columns] = part
        self._seen += size
        accepted = None if self._accept is None else (values[-1] > 0.5).numpy()
        labels = None
        if self._groups is not None:
            labels = np.array(group_labels(batch, self._groups), dtype=np.str_)
        return Evidence(values[: len(self.losses)].clamp_(0, 1).numpy(), accepted, labels)

    def completed(self, evidence: Evidence) -> Evidence:
        """The evidence with what every rank has evaluated of it."""
        if self.ranks.size == 1:
            return evidence
        accepted = evidence.accepted
        if accepted is not None:
            accepted = self.ranks.sum(accepted.astype(np.uint8)).astype(bool)
        # One number and zeros: their sum is exact in any order.
        return replace(evidence, losses=self.ranks.sum(evidence.losses), accepted=accepted)

    def _check_values(
        self, values: Tensor, loss: Loss, levels: Sequence[int], sparsities: Sequence[float]
    ) -> None:
        """Raise ValueError for the first loss that is NaN or outside [0, 1]."""
        wrong = ~((values >= -_ROUNDING) & (values <= 1 + _ROUNDING))
        if loss.binary:
            wrong |= (values != 0) & (values != 1)
        if not wrong.any():
            return
        row, column = (int(index) for index in wrong.nonzero()[0])
        value, level = float(values[row, column]), levels[column]
        position = self._seen + row
        example = position if self._order is None else int(self._order[position])
        raise ValueError(
            f"loss {loss.name!r} is {value:g} for example {example} at level {level} "
            f"(sparsity {sparsities[level]:g}); losses must be "
            + ("0 or 1" if loss.binary and value == value else "in [0, 1]")
            + ("" if value == value else ": the network's outputs are NaN there, or the loss is")
        )


def evaluate_all(
    evaluation: Evaluation,
    data: Any,
    *,
    batch_size: int | None,
    order: Tensor | None,
    progress: bool,
) -> Evidence:
    """The evidence of all examples on all candidates."""
    active = np.arange(len(evaluation))
    with evaluation.stream(data, batch_size, order, progress) as stream:
        own = [evaluation(batch, active) for batch in stream]
    parts = [evaluation.completed(part) for part in own]
    accepted = [part.accepted for part in parts if part.accepted is not None]
    labels = [part.labels for part in parts if part.labels is not None]
    return Evidence(
        np.concatenate([part.losses for part in parts], axis=1),
        np.concatenate(accepted) if accepted else None,
        np.concatenate(labels) if labels else None,
    )


@dataclass(frozen=True)
class Findings:
    """What a test found of C candidates and R targets.

    Attributes
    ----------
    result : SequentialResult
    bounds : [R, C] float64
        Upper confidence bound of each target's risk at each candidate alone.
    acceptance : [C] float64, or None where every prediction counts
        Share of the examples seen that were accepted.
    """

    result: SequentialResult
    bounds: FloatArray
    acceptance: FloatArray | None


def fixed_test(
    evidence: Evidence,
    losses: Sequence[Loss],
    targets: Sequence[Target],
    delta: float,
    procedure: Procedure,
) -> Findings:
    """Test every candidate once, on all evidence: the fixed-n test of the paper."""
    tests = []
    for target in targets:
        matrix, counted = evidence.of(target, losses)
        if counted is not None and counted.ndim == 1:
            matrix, counted = matrix[counted], None
        if counted is None:
            tests.append(_test_columns(matrix, target, delta))
        else:  # each candidate has examples of its own
            columns = [
                _test_columns(column[mask][:, None], target, delta)
                for column, mask in zip(matrix.T, counted.T, strict=True)
            ]
            tests.append(np.concatenate(columns, axis=1))
    sums, counts, pvalues_by_risk, bounds = np.stack(tests, axis=1)
    n, candidates = evidence.losses.shape[1:]
    pvalues = pvalues_by_risk.max(axis=0)
    needs = {"order": np.arange(candidates)} if procedure.needs else {}
    result = SequentialResult(
        pvalues=pvalues,
        rejected=procedure.test(pvalues, delta, **needs),
        pvalues_by_risk=pvalues_by_risk,
        sums=sums,
        counts=counts.astype(np.int64),
        seen=np.full(candidates, n),
        evaluations=n * candidates,
        saved=0.0,
    )
    rates = None if evidence.accepted is None else evidence.accepted.mean(axis=0)
    return Findings(result, bounds, rates)


def _test_columns(matrix: NDArray[np.float32], target: Target, delta: float) -> FloatArray:
    """Sums, counts, p-values and bounds of losses [m, A], as [4, A]."""
    m, columns = matrix.shape
    if m == 0:  # nothing counted: nothing known
        return np.array([[0.0], [0.0], [1.0], [1.0]]).repeat(columns, axis=1)
    return np.array(
        [
            loss_sums(matrix),
            np.full(columns, m),
            PVALUES[target.pvalue].from_losses(matrix, target.risk.alpha),
            upper_bound(matrix, delta, target.pvalue),
        ]
    )


def early_test(
    evaluation: Evaluation,
    data: Any,
    targets: Sequence[Target],
    plan: LookPlan,
    procedure: Procedure,
    *,
    batch_size: int | None,
    order: Tensor | None,
    progress: bool,
) -> Findings:
    """Test at the looks of a plan, evaluating only what is still in question."""
    test = SequentialTest(
        plan,
        len(evaluation),
        [RiskTarget(target.risk.alpha, target.pvalue) for target in targets],
        procedure=procedure.name,
    )
    accepted = np.zeros(len(evaluation))
    seen, pending = 0, list[Evidence]()
    with evaluation.stream(data, batch_size, order, progress) as stream:
        for batch in stream:
            begin, size = 0, batch_length(batch)
            while begin < size and not test.finished:
                end = min(size, begin + test.next_look - seen)
                pending.append(evaluation(slice_batch(batch, begin, end), test.active))
                seen += end - begin
                begin = end
                if seen == test.next_look or len(pending) == evaluation.ranks.size:
                    accepted += _take_in(test, evaluation, targets, pending)
                    pending.clear()
            if test.finished:
                break
    if not test.finished:
        raise ValueError(
            f"the last look is at {plan.n} examples, but the data ended after {seen}; looks "
            "must end at the number of examples"
        )
    result = test.result()
    bounds = np.array(
        [_bounds_at_looks(result, r, target, plan) for r, target in enumerate(targets)]
    )
    rates = accepted / np.maximum(result.seen, 1) if evaluation.selective else None
    return Findings(result, bounds, rates)


def _take_in(
    test: SequentialTest,
    evaluation: Evaluation,
    targets: Sequence[Target],
    pending: Sequence[Evidence],
) -> FloatArray:
    """Test on evidence that ends at a look at the latest; the acceptances of each candidate."""
    active, accepted = test.active, np.zeros(len(evaluation))
    for own in pending:
        evidence = evaluation.completed(own)
        parts = [evidence.of(target, evaluation.losses) for target in targets]
        if evidence.accepted is not None:
            accepted[active] += evidence.accepted.sum(axis=0)
        test.update([matrix for matrix, _ in parts], [counted for _, counted in parts])
    return accepted


def _bounds_at_looks(
    result: SequentialResult, r: int, target: Target, plan: LookPlan
) -> FloatArray:
    """Upper confidence bounds of one target that hold although the levels chose when to stop.

    At each look a bound at 1 - (what that look spends) holds; all of them together at 1 - delta.
    The exact test rejects whenever such a bound is below alpha, and more; where it rejects, alpha
    itself is a bound. Bound and rejection are two statements of 1 - delta each, of which the
    certificate's promise is the second; both together are proven at 1 - 2 delta.
    """
    name = target.pvalue
    spending = plan.spending
    if PVALUES[name].from_sums is None:  # the wealth process keeps no sums to invert
        name, spending = "convex", (plan.delta / len(plan.sizes),) * len(plan.sizes)
    bounds = np.ones(len(result.seen))
    for size, spent in zip(plan.sizes, spending, strict=True):
        at = np.flatnonzero(result.seen == size)
        if len(at) and spent > 0:
            sums, counts = result.sums[r, at], result.counts[r, at]
            bounds[at] = upper_bound_from_sums(sums, counts, spent, name)
    rejected = result.pvalues_by_risk[r] <= plan.delta
    return np.where(rejected, np.minimum(bounds, target.risk.alpha), bounds)


def progress_bar(data: Any, order: Tensor | None, progress: bool, title: str) -> tqdm[Any]:
    """A bar that counts examples; silent without `progress`."""
    total = example_count(data) if order is None else len(order)
    return tqdm(total=total, desc=title, unit="example", disable=not progress)


def moved_batches(
    model: nn.Module, data: Any, batch_size: int | None, order: Tensor | None = None
) -> Generator[Any, None, None]:
    """Batches on the model's device."""
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    for batch in batches(data, batch_size, order):
        yield move_batch(batch, device)
