"""Testing while the losses come in: levels leave as soon as their fate is settled.

Rejected levels and hopeless ones leave the active set and cost nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from confprune.risk.inputs import FloatArray, IntArray, check_losses, check_probability
from confprune.risk.looks import LookPlan
from confprune.risk.procedures import Procedure, resolve_procedure
from confprune.risk.pvalues import PVALUES
from confprune.risk.spending import SumTracker, Tracker, make_tracker
from confprune.risk.testing import BoolArray

_LOST = 1 / 30
"""Part of the futility at which a level counts as lost whatever follows it."""


@dataclass(frozen=True)
class RiskTarget:
    """One risk to be kept, with the p-value that tests it.

    Attributes
    ----------
    alpha : float
        Value allowed.
    pvalue : str
        Name of the p-value; not ``"auto"``, since no losses have been seen yet.
    """

    alpha: float
    pvalue: str = "binomial"


@dataclass(frozen=True)
class SequentialResult:
    """What a sequential test has found.

    Attributes
    ----------
    pvalues : ndarray of float64 [K]
        Valid p-values, the looks paid for; of a level that was given up, where it had got to.
    rejected : ndarray of bool [K]
        What the testing procedure makes of them.
    pvalues_by_risk : ndarray of float64 [R, K]
        The same for each risk; a level's p-value is the largest.
    sums, counts : ndarray [R, K]
        Sums of the losses seen, and how many there were.
    seen : ndarray of int [K]
        Examples on which each level was evaluated.
    evaluations : int
        Pairs (example, level) evaluated: the sum of `seen`.
    saved : float
        Share of the full matrix, n K, that was not needed.
    """

    pvalues: FloatArray
    rejected: BoolArray
    pvalues_by_risk: FloatArray
    sums: FloatArray
    counts: IntArray
    seen: IntArray
    evaluations: int
    saved: float


def looks_possible(procedure: Procedure, pvalue: str) -> bool:
    """Whether levels can be tested early, by a procedure and a p-value of this name, or "auto".

    Examples
    --------
    >>> looks_possible(resolve_procedure("holm"), "auto")
    True
    >>> looks_possible(resolve_procedure("holm"), "clt")
    False
    """
    asymptotic = pvalue in PVALUES and PVALUES[pvalue].asymptotic
    return _settles_early(procedure) and not asymptotic


def _settles_early(procedure: Procedure) -> bool:
    """Whether a rejection at some level stands whatever the later p-values are."""
    return procedure.chain or procedure.bonferroni_start


class SequentialTest:
    """Testing K levels on examples that come in order, at the looks of a plan.

    Feed it the losses of the levels in `active` until it is `finished`. The examples must be in the
    order of drawing or in random order.

    Parameters
    ----------
    plan : LookPlan
        Looks and spending.
    levels : int
        K, the number of levels.
    targets : sequence of RiskTarget
        The risks to be kept, all of them: H_j says that some risk of level j exceeds its alpha.
    procedure : str
        ``"fixed_sequence"``, ``"split_fixed_sequence"`` (levels in the learned order),
        ``"bonferroni"`` or ``"holm"``.

    Notes
    -----
    Validity. For each level and risk, the probability that a risk above its alpha is ever rejected
    is at most the sum of the spending, hence at most delta: by exact computation, by the
    union bound over looks, or by Ville's inequality (see `confprune.risk.spending`, also for random
    counts). A level with a risk above its alpha is rejected only if that risk is. So its
    p-value, the largest over its risks, is valid at all looks together; the risks of a level need
    not be rejected at the same look. The testing procedure then does with these p-values what
    it does with any others.

    A level that is given up is never rejected: that can only make an error less likely. In
    fixed-sequence testing all later levels are given up with it, for they cannot be reached any
    more; so a level that is merely doubtful is kept while a later one may be rejected. A
    rejected level needs no further evaluation even if the chain has not reached it yet.
    For `bonferroni` and `holm` the looks are designed for delta / K, the level at which a
    rejection stands whatever the other levels do.

    Examples
    --------
    >>> from confprune.risk.looks import default_looks
    >>> rng = np.random.default_rng(0)
    >>> risks = np.linspace(0, 0.2, 21)
    >>> plan = default_looks(2000, alpha=0.05, delta=0.1)
    >>> test = SequentialTest(plan, levels=21, targets=[RiskTarget(0.05)])
    >>> while not test.finished:
    ...     batch = test.next_look - test.seen
    ...     losses = rng.random((batch, 1)) < risks[test.active]
    ...     test.update([losses])
    >>> result = test.result()
    >>> print(risks[result.rejected].max().round(3), result.saved > 0.5)
    0.04 True
    """

    def __init__(
        self,
        plan: LookPlan,
        levels: int,
        targets: Sequence[RiskTarget],
        *,
        procedure: str = "fixed_sequence",
    ) -> None:
        self._procedure = resolve_procedure(procedure)
        if not _settles_early(self._procedure):
            raise ValueError(
                f"procedure={procedure!r} cannot be used with early looks; "
                "choose 'fixed_sequence', 'bonferroni' or 'holm', or pass looks=None"
            )
        if levels < 1 or not targets:
            raise ValueError(f"need a level and a risk, got {levels} levels, {len(targets)} risks")
        self._plan = plan
        self._delta = plan.delta / (levels if self._procedure.bonferroni_start else 1)
        # Holm may test a level at more than delta / K once others have been rejected.
        self._reachable = plan.delta if procedure == "holm" else self._delta
        spending = np.array(plan.spending) * (self._delta / plan.delta)
        self._kinds = [(t.pvalue, check_probability("alpha", t.alpha)) for t in targets]
        self._spending = spending
        self._trackers = [make_tracker(*kind, levels, plan.n, spending) for kind in self._kinds]
        self._active = np.arange(levels)
        self._end = levels
        self._examples = np.zeros(levels, dtype=np.int64)
        self._seen = 0
        self._look = 0

    @property
    def active(self) -> IntArray:
        """Indices of the levels still in question, increasing."""
        return self._active

    @property
    def seen(self) -> int:
        """Number of examples seen."""
        return self._seen

    @property
    def evaluated(self) -> IntArray:
        """Number of examples each level was active at [K]."""
        return self._examples.copy()

    @property
    def next_look(self) -> int:
        """Number of examples at the next look."""
        return self._plan.sizes[min(self._look, len(self._plan.sizes) - 1)]

    @cached_property
    def first_rejection(self) -> int:
        """Number of examples before which no look can reject a level.

        Not even one without losses. With a risk of alpha that has probability (1 - alpha)^n, and
        no test of some error rejects what is more probable than that.
        """
        sizes = np.array(self._plan.sizes)
        possible = np.ones(len(sizes), dtype=bool)
        for pvalue, alpha in self._kinds:
            room = self._delta if PVALUES[pvalue].anytime else np.cumsum(self._spending)
            possible &= (1.0 - alpha) ** sizes <= room
        return int(sizes[np.argmax(possible)]) if possible.any() else self._plan.n

    @property
    def finished(self) -> bool:
        """Whether every level is settled."""
        return self._active.size == 0

    def update(
        self,
        losses: Sequence[ArrayLike],
        counted: Sequence[ArrayLike | None] | None = None,
    ) -> None:
        """Take in the next examples; what comes after a look is only for levels still active then.

        Parameters
        ----------
        losses : sequence of array_like [m, A]
            For each risk, the losses of the levels that are active now. Where an example does not
            count, any number in [0, 1].
        counted : sequence of (array_like of bool [m] or [m, A], or None), optional
            For each risk, which examples count: members of its group, or predictions accepted
            at each level. None: all.

        Raises
        ------
        ValueError
            If shapes do not match, losses are outside of [0, 1], or the examples go beyond the
            last look.
        """
        if len(losses) != len(self._trackers):
            raise ValueError(f"{len(self._trackers)} risks need as many losses, got {len(losses)}")
        matrices = [check_losses(part) for part in losses]
        asked = self._active
        shape = (len(matrices[0]), asked.size)
        if not self.finished and any(matrix.shape != shape for matrix in matrices):
            raise ValueError(
                f"losses must be [m, {shape[1]}], a column per active level, "
                f"got shapes {[matrix.shape for matrix in matrices]}"
            )
        masks = [None] * len(losses) if counted is None else counted
        expanded = [_expand(mask, shape) for mask in masks]
        self._check_room(shape[0], self._plan.sizes[-1])
        looks = [size - self._seen for size in self._plan.sizes[self._look :]]
        bounds = np.array([0, *(look for look in looks if look < shape[0]), shape[0]])
        parts = [
            tracker.split(matrix, mask, bounds)
            for tracker, matrix, mask in zip(self._trackers, matrices, expanded, strict=True)
        ]
        for size, *of_trackers in zip((bounds[1:] - bounds[:-1]).tolist(), *parts, strict=True):
            if self.finished:
                break
            columns = np.searchsorted(asked, self._active)
            for tracker, part in zip(self._trackers, of_trackers, strict=True):
                tracker.observe(part, columns, self._active)
            self._proceed(size)

    def update_sums(self, examples: int, sums: ArrayLike, counts: ArrayLike | None = None) -> None:
        """Take in the next examples by their sums; for p-values that need no more.

        Parameters
        ----------
        examples : int
            m, the number of further examples.
        sums : array_like [R, A]
            For each risk, the sums of their losses at the active levels.
        counts : array_like of int [R, A], optional
            How many of them count; all by default.

        Raises
        ------
        ValueError
            As `update`; if the examples go beyond the next look; and if a p-value needs the losses
            themselves (`betting`).
        """
        totals = np.asarray(sums, dtype=np.float64)
        shape = (len(self._trackers), self._active.size)
        numbers = np.broadcast_to(examples if counts is None else np.asarray(counts), shape)
        within = totals.shape == shape and (totals >= 0) & (totals <= numbers)
        if not np.all(within) or np.any(numbers > examples):
            raise ValueError(
                f"sums must be [{shape[0]}, {shape[1]}] and lie between 0 and their counts, these "
                f"at most {examples}; got shape {totals.shape}"
            )
        trackers = [t for t in self._trackers if isinstance(t, SumTracker)]
        if len(trackers) < len(self._trackers):
            raise ValueError("pvalue='betting' needs the losses, not only their sums; call update")
        self._check_room(examples, self.next_look)
        for tracker, total, number in zip(trackers, totals, numbers, strict=True):
            tracker.add(total, self._active, number)
        self._proceed(examples)

    def result(self) -> SequentialResult:
        """The findings so far; complete once `finished`."""
        by_risk = np.stack([tracker.pvalues for tracker in self._trackers])
        pvalues = by_risk.max(axis=0)
        full = self._plan.n * len(pvalues)
        evaluations = int(self._examples.sum())
        needs = {"order": np.arange(len(pvalues))} if self._procedure.needs else {}
        return SequentialResult(
            pvalues=pvalues,
            rejected=self._procedure.test(pvalues, self._plan.delta, **needs),
            pvalues_by_risk=by_risk,
            sums=np.stack([tracker.sums for tracker in self._trackers]),
            counts=np.stack([tracker.counts for tracker in self._trackers]),
            seen=self._examples.copy(),
            evaluations=evaluations,
            saved=1.0 - evaluations / full,
        )

    def _check_room(self, examples: int, most: int) -> None:
        """Raise ValueError unless so many further examples are needed, `most` in all."""
        if self.finished:
            raise ValueError("the test is finished; no further examples are needed")
        if examples < 1 or self._seen + examples > most:
            which = "last" if most == self._plan.sizes[-1] else "next"
            raise ValueError(
                f"the {which} look is at {most} examples and {self._seen} have been seen, "
                f"got {examples} more; split the batch at the look"
            )

    def _proceed(self, examples: int) -> None:
        """Count examples whose losses are there, and look if it is time."""
        self._seen += examples
        self._examples[self._active] += examples
        if self._seen < self.next_look:
            return
        pending = np.zeros(self._active.size, dtype=bool)
        doubtful, lost = pending.copy(), pending.copy()
        for tracker in self._trackers:
            # A risk that has been rejected stays so; its further losses do not matter.
            waiting = tracker.pvalues[self._active] > self._delta
            tracker.look(self._look, self._active[waiting])
            waiting = tracker.pvalues[self._active] > self._delta
            hope = self._hope(tracker)
            doubtful |= waiting & (hope <= self._plan.futility)
            lost |= waiting & (hope <= _LOST * self._plan.futility)
            pending |= waiting
        self._look += 1
        if self._procedure.chain:
            if doubtful.any():
                self._shorten_chain(doubtful, lost)
            self._active = self._active[pending & (self._active < self._end)]
        else:
            self._active = self._active[pending & ~doubtful]
        if self._look == len(self._plan.sizes):
            self._active = self._active[:0]

    def _hope(self, tracker: Tracker) -> FloatArray:
        """Chance of what has been seen, were the last look just to reject [A]."""
        if self._plan.futility > 0.0:
            return tracker.hope(self._active, self._seen, self._reachable)
        impossible = tracker.beyond_reach(self._active, self._seen, self._reachable)
        return np.asarray(np.where(impossible, 0.0, 1.0))

    def _shorten_chain(self, doubtful: BoolArray, lost: BoolArray) -> None:
        """Give up the levels from a lost one on, and a doubtful end of the chain.

        Those that are lost are doubtful too. A doubtful level before one that has been or may still
        be rejected is kept: it would take that one with it.
        """
        promising = np.ones(self._end, dtype=bool)
        promising[self._active[doubtful]] = False
        self._end = int(np.flatnonzero(promising)[-1]) + 1 if promising.any() else 0
        if lost.any():
            self._end = min(self._end, int(self._active[lost][0]))


def _expand(mask: ArrayLike | None, shape: tuple[int, ...]) -> BoolArray | None:
    if mask is None:
        return None
    array = np.asarray(mask, dtype=bool)
    if array.shape not in (shape, shape[:1]):
        raise ValueError(f"counted must be [m] or [m, A] = {list(shape)}, got shape {array.shape}")
    return np.broadcast_to(array[:, None] if array.ndim == 1 else array, shape)
