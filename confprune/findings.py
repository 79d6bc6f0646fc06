"""Tests of all candidates on their losses: on all examples, or until every fate is settled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from confprune.batches import batch_length, slice_batch
from confprune.evaluation import Evaluation, Evidence, Measured
from confprune.losses import Loss
from confprune.risk.bounds import upper_bound, upper_bound_from_sums
from confprune.risk.inputs import FloatArray, loss_sums
from confprune.risk.looks import LookPlan
from confprune.risk.procedures import Procedure
from confprune.risk.pvalues import PVALUES
from confprune.risk.sequential import RiskTarget, SequentialResult, SequentialTest
from confprune.risks import Target


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
    seen, pending = 0, list[Measured]()
    most = math.inf if evaluation.waits else evaluation.ranks.size
    with evaluation.stream(data, batch_size, order, progress) as stream:
        for batch in stream:
            begin, size = 0, batch_length(batch)
            while begin < size and not test.finished:
                end = begin + min(_stride(test, evaluation, batch, seen), plan.n - seen)
                end = min(size, end)
                pending.append(evaluation(slice_batch(batch, begin, end), test.active))
                seen += end - begin
                begin = end
                if seen >= test.next_look or len(pending) == most:
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


def _stride(test: SequentialTest, evaluation: Evaluation, batch: Any, seen: int) -> int:
    """How many examples to evaluate next: up to the look, and past it where that costs little.

    Evaluations of a level beyond the look that settles it are lost. So nothing is evaluated beyond
    the first look that can reject levels, as it does with most of them, and later beyond twice the
    next look.
    """
    to_next = test.next_look - seen
    room = evaluation.capacity(batch, test.active)
    if room <= to_next:
        return to_next
    first = test.first_rejection
    return max(to_next, min(room, (first if seen < first else 2 * test.next_look) - seen))


def _take_in(
    test: SequentialTest,
    evaluation: Evaluation,
    targets: Sequence[Target],
    pending: Sequence[Measured],
) -> FloatArray:
    """Test on evidence of the levels that were active, look by look; how often each accepted."""
    accepted = np.zeros(len(evaluation))
    for own in pending:
        if test.finished:
            break
        evidence, active = evaluation.completed(own), test.active
        if active.size < own.active.size:
            evidence = evidence.at(np.searchsorted(own.active, active))
        parts = [evidence.of(target, evaluation.losses) for target in targets]
        before = test.evaluated[active]
        test.update([matrix for matrix, _ in parts], [counted for _, counted in parts])
        if evidence.accepted is not None:
            running = evidence.accepted.cumsum(axis=0)
            last = test.evaluated[active] - before - 1
            accepted[active] += np.take_along_axis(running, last[None], axis=0)[0]
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
    at_look = np.searchsorted(plan.sizes, result.seen)
    spent = np.array(spending)[at_look]
    bounds = np.ones(len(result.seen))
    known = spent > 0
    sums, counts = result.sums[r, known], result.counts[r, known]
    bounds[known] = upper_bound_from_sums(sums, counts, spent[known], name)
    rejected = result.pvalues_by_risk[r] <= plan.delta
    return np.where(rejected, np.minimum(bounds, target.risk.alpha), bounds)
