"""Evidence that may be looked at several times: one tracker per risk, for all levels.

Looking at data repeatedly and stopping when they please inflates the error; each p-value has its
own way to pay for it.

- `binomial`: the law of the running number of errors is known, so the probability of ever crossing
  the boundary is computed exactly, and what a look may spend is what others have not used (error
  spending, Lan and DeMets).
- other functions of the sums: look l is tested at its share of delta (Bonferroni over looks).
- `betting`: valid at every moment; nothing to pay.

Random counts. A risk may count only some examples: the members of a group, the predictions that a
level accepts. Given which examples count, the losses of those that do are independent with a
common law, whose mean is the risk in question. Everything here uses, at each look, the number of
examples counted so far and nothing about the future; so its error is at most delta given
the pattern of counting, and therefore without it. The pattern may differ between levels, since the
validity of each level's p-value is its own affair.

References
----------
K. Lan, D. DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 70 (1983).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from confprune.risk.betting import TRUNCATION, BettingProcess
from confprune.risk.binomial_tail import binomial_probabilities, binomial_window
from confprune.risk.bounds import critical_sum
from confprune.risk.inputs import FloatArray, IntArray, losses_are_binary
from confprune.risk.pvalues import PVALUES, PValue
from confprune.risk.testing import BoolArray

_BETTING_COST = 1.15
"""What betting needs beyond its first-order boundary; by simulation. Only guides giving up."""

_SMALLEST = 1e-300
"""Standard deviations are at least so large, to be divided by."""


@dataclass(frozen=True, eq=False)
class ErrorSpending:
    """The running number of errors of a level that has not been rejected yet.

    For risk alpha, and by coupling with probability at most this for a larger one. Immutable, so
    that levels with equal counts share it.

    Attributes
    ----------
    alpha : float
        Risk under test.
    count : int
        Examples counted so far.
    start : int
        The number of errors that index 0 stands for.
    probabilities : ndarray [W]
        Probability of not having been rejected and having ``start + i`` errors.
    spent : float
        Probability of having been rejected.
    """

    alpha: float
    count: int = 0
    start: int = 0
    probabilities: FloatArray = field(default_factory=lambda: np.ones(1))
    spent: float = 0.0

    def after(self, count: int) -> ErrorSpending:
        """The same level when `count` examples have been counted."""
        if count == self.count:
            return self
        first, increments = binomial_probabilities(count - self.count, self.alpha)
        probabilities = np.convolve(self.probabilities, increments)
        start = self.start + first
        # Far above the mean there is no mass worth carrying on.
        kept = max(binomial_window(count, self.alpha)[1] + 1 - start, 1)
        return ErrorSpending(self.alpha, count, start, probabilities[:kept], self.spent)

    @functools.cached_property
    def cumulative(self) -> FloatArray:
        """Probability of having been rejected, or having at most ``start + i`` errors [W]."""
        return self.spent + np.cumsum(self.probabilities)

    def pvalue(self, errors: FloatArray) -> FloatArray:
        """Probability of having been rejected before, or having at most `errors` errors now.

        The p-value of the stage-wise ordering: outcomes are the more extreme the earlier a level
        is rejected, and at the same look the fewer its errors.
        """
        last = len(self.cumulative) - 1
        index = np.floor(errors).astype(np.int64) - self.start
        inside = np.minimum(np.maximum(index, 0), last)  # np.clip takes longer
        most = np.where(index < 0, self.spent, self.cumulative[inside])
        return np.where(index >= last, 1.0, np.minimum(most, 1.0))

    def reject(self, allowed: float) -> tuple[float, ErrorSpending]:
        """Reject as many outcomes as keep the probability of rejection at most `allowed`.

        Returns
        -------
        critical : float
            The largest number of errors that is rejected, or -inf.
        remaining : ErrorSpending
            A level that was not rejected.
        """
        rejected = int(np.searchsorted(self.cumulative, allowed, side="right"))
        if rejected == 0:
            return -np.inf, self
        rejected = min(rejected, len(self.cumulative) - 1)  # Something must remain.
        start, left = self.start + rejected, self.probabilities[rejected:]
        spent = float(self.cumulative[rejected - 1])
        return float(start - 1), ErrorSpending(self.alpha, self.count, start, left, spent)


class SumTracker:
    """Evidence from the running sums of the losses of K levels.

    Attributes
    ----------
    sums, counts, pvalues : ndarray [K]
        Sums of the losses that count, how many there were, and p-values valid at all looks.

    Parameters
    ----------
    kind : PValue
        A p-value that depends on sums.
    alpha : float
        Risk under test.
    levels : int
        K.
    n : int
        Number of examples at the last look.
    spending : array_like [L]
        Error spent at each look; their sum is the level of the whole test.
    """

    def __init__(
        self, kind: PValue, alpha: float, levels: int, n: int, spending: ArrayLike
    ) -> None:
        self.sums = np.zeros(levels)
        self.counts = np.zeros(levels, dtype=np.int64)
        self.pvalues = np.ones(levels)
        self._kind = kind
        self._alpha = alpha
        self._n = n
        self._spending = np.asarray(spending, dtype=np.float64)
        self._allowed = np.cumsum(self._spending).tolist()
        self._paths = [_unseen(alpha)] * levels

    def split(
        self, losses: NDArray[Any], counted: BoolArray | None, bounds: IntArray
    ) -> list[tuple[FloatArray, IntArray]]:
        """Sums and counts [A] of losses [m, A], by the parts between `bounds` from 0 to m.

        Of the examples that count, [m, A] or None for all.
        """
        relevant = losses if counted is None else np.where(counted, losses, 0)
        if self._kind.binary_only and not losses_are_binary(relevant):
            raise ValueError(
                f"pvalue={self._kind.name!r} needs losses that are 0 or 1, got values in between; "
                "use pvalue='betting' or 'convex'"
            )
        sums = np.add.reduceat(relevant, bounds[:-1], axis=0, dtype=np.float64)
        if counted is None:
            sizes = bounds[1:] - bounds[:-1]
            counts = np.broadcast_to(sizes[:, None], sums.shape)
        else:
            counts = np.add.reduceat(counted, bounds[:-1], axis=0, dtype=np.int64)
        return list(zip(sums, counts, strict=True))

    def observe(
        self, part: tuple[FloatArray, IntArray], columns: IntArray, levels: IntArray
    ) -> None:
        """Add what `split` made of further losses of `levels` [A], which stand in `columns`."""
        sums, counts = part
        self.add(sums[columns], levels, counts[columns])

    def add(self, sums: FloatArray, levels: IntArray, counts: IntArray | int) -> None:
        """Add the sums [A] of further losses, and how many there were [A]."""
        fractional = sums != np.floor(sums)
        if self._kind.binary_only and fractional.any():
            raise ValueError(
                f"pvalue={self._kind.name!r} needs losses that are 0 or 1, got the sum "
                f"{sums[fractional][0]}; use pvalue='betting' or 'convex'"
            )
        self.sums[levels] += sums
        self.counts[levels] += counts

    def look(self, index: int, levels: IntArray) -> None:
        """Test `levels` with what look `index` may spend."""
        if self._kind.binary_only:
            self._look_exactly(index, levels)
        elif self._spending[index] > 0.0 and self._kind.from_sums is not None:
            pvalues = self._kind.from_sums(self.sums[levels], self.counts[levels], self._alpha)
            pvalues = pvalues * (self._spending.sum() / self._spending[index])
            self.pvalues[levels] = np.minimum(self.pvalues[levels], pvalues)

    def _look_exactly(self, index: int, levels: IntArray) -> None:
        last = index == len(self._spending) - 1
        # Levels with equal counts so far share a path.
        alike: dict[tuple[ErrorSpending, int], list[int]] = {}
        for level, count in zip(levels.tolist(), self.counts[levels].tolist(), strict=True):
            alike.setdefault((self._paths[level], count), []).append(level)
        for (path, count), together in alike.items():
            present, critical, remaining = _at_look(path, count, self._allowed[index])
            members = np.array(together)
            decided = members if last else members[self.sums[members] <= critical]
            if decided.size:
                self.pvalues[decided] = present.pvalue(self.sums[decided])
            for level in together:
                self._paths[level] = remaining

    def beyond_reach(self, levels: IntArray, seen: int, delta: float) -> BoolArray:
        """Which `levels` can never be rejected at level `delta`, whatever follows.

        After `seen` examples in all; the remaining ones may all count, and have no loss.
        """
        most = self.counts[levels] + (self._n - seen)
        return np.asarray(self.sums[levels] > self._critical_sums(most, delta))

    def hope(self, levels: IntArray, seen: int, delta: float) -> FloatArray:
        """The chance of a sum as large as now, were the final sum to be just small enough."""
        counts = self.counts[levels]
        final = np.maximum(np.round(counts * (self._n / seen)).astype(np.int64), counts)
        rate = np.maximum(self._critical_sums(final, delta), 0.0) / np.maximum(final, 1)
        return _bridge(self.sums[levels], rate, rate * (1.0 - rate), counts, final)

    def _critical_sums(self, counts: IntArray, delta: float) -> FloatArray:
        """The largest sums [A] that are rejected after so many examples."""
        name = self._kind.name
        return np.array([_critical_sum(n, self._alpha, delta, name) for n in counts.tolist()])


class BettingTracker:
    """Evidence from betting against each of K levels; see `BettingProcess`.

    Attributes
    ----------
    sums, counts, pvalues : ndarray [K]
        Sums of the losses that count, how many there were, and p-values valid at all looks.

    Parameters
    ----------
    alpha : float
        Risk under test.
    levels : int
        K.
    n : int
        Number of examples at the last look.
    delta : float
        Error level the stakes are tuned for.
    """

    def __init__(self, alpha: float, levels: int, n: int, delta: float) -> None:
        self.sums = np.zeros(levels)
        self.counts = np.zeros(levels, dtype=np.int64)
        self.pvalues = np.ones(levels)
        self._alpha = alpha
        self._n = n
        self._process = BettingProcess(alpha, levels, n, delta)

    def split(
        self, losses: NDArray[Any], counted: BoolArray | None, bounds: IntArray
    ) -> list[tuple[NDArray[Any], BoolArray | None]]:
        """Losses [m, A], and which of them count (None: all), by the parts between `bounds`."""
        parts = np.split(losses, bounds[1:-1])
        masks = [None] * len(parts) if counted is None else np.split(counted, bounds[1:-1])
        return list(zip(parts, masks, strict=True))

    def observe(
        self, part: tuple[NDArray[Any], BoolArray | None], columns: IntArray, levels: IntArray
    ) -> None:
        """Bet on what `split` made of further losses of `levels` [A], which stand in `columns`."""
        losses, counted = part[0][:, columns], None if part[1] is None else part[1][:, columns]
        relevant = losses if counted is None else np.where(counted, losses, 0)
        self.sums[levels] += relevant.sum(axis=0, dtype=np.float64)
        self.counts[levels] += len(losses) if counted is None else counted.sum(axis=0)
        self._process.update(losses, levels, counted)

    def look(self, index: int, levels: IntArray) -> None:
        """Read off the p-values; looking costs nothing."""
        self.pvalues[levels] = self._process.pvalues()[levels]

    def beyond_reach(self, levels: IntArray, seen: int, delta: float) -> BoolArray:
        """None of `levels`: wealth may always recover."""
        return np.zeros(levels.size, dtype=bool)

    def hope(self, levels: IntArray, seen: int, delta: float) -> FloatArray:
        """The chance of a sum as large as now, were the final sum to be just small enough."""
        counts = self.counts[levels]
        final = np.maximum(counts * (self._n / seen), 1.0)
        variance = self._process.variances()[levels]
        # Where the wealth of the plug-in bets reaches 1/delta, to first order.
        needed = _BETTING_COST * np.sqrt(2.0 * math.log(1.0 / delta) * variance / final)
        # With few examples the stakes stand at their cap, and what a loss costs is known exactly.
        gain = math.log1p(TRUNCATION * self._alpha / (1.0 - self._alpha))
        capped = (gain - math.log(1.0 / delta) / final) / (gain - math.log1p(-TRUNCATION))
        rate = np.maximum(self._alpha - needed, capped)
        # No rate would do: but how many will count is itself a guess, from the share so far.
        hope = _bridge(self.sums[levels], np.maximum(rate, 0.0), variance, counts, final)
        return np.where(rate > 0.0, hope, 1.0)


def _bridge(
    sums: FloatArray,
    rate: FloatArray,
    variance: FloatArray,
    counts: IntArray,
    final: FloatArray | IntArray,
) -> FloatArray:
    """Chance of at least `sums` after `counts` examples, if the mean of `final` ones is `rate`.

    Whatever the law of the losses, given their final sum the order is random: the present sum
    is that of a sample without replacement, and here taken as normal.
    """
    remaining = 1.0 - counts / np.maximum(final, 1)
    spread = np.maximum(np.sqrt(variance * counts * remaining), _SMALLEST)
    chance = special.ndtr((counts * rate + 0.5 - sums) / spread)
    chance[sums > rate * final * (1.0 + 1e-9)] = 0.0  # But for rounding of the product.
    return np.asarray(chance)


@functools.lru_cache
def _unseen(alpha: float) -> ErrorSpending:
    """The one from which all paths of this risk start."""
    return ErrorSpending(alpha)


@functools.lru_cache(maxsize=256)
def _at_look(
    path: ErrorSpending, count: int, allowed: float
) -> tuple[ErrorSpending, float, ErrorSpending]:
    """A path at its next look: before it, what it rejects, and after; the same in every test."""
    present = path.after(count)
    critical, remaining = present.reject(allowed)
    return present, critical, remaining


@functools.lru_cache(maxsize=4096)
def _critical_sum(n: int, alpha: float, delta: float, pvalue: str) -> float:
    """What is asked for at every look and level, though it depends on little."""
    return float(critical_sum(n, alpha, delta, pvalue))


Tracker = SumTracker | BettingTracker


def make_tracker(name: str, alpha: float, levels: int, n: int, spending: FloatArray) -> Tracker:
    """The tracker for a p-value.

    Raises
    ------
    ValueError
        If the p-value must not be looked at more than once (`clt`), or is unknown.
    """
    usable = [kind.name for kind in PVALUES.values() if kind.anytime or kind.from_sums is not None]
    if name not in usable:
        raise ValueError(
            f"pvalue={name!r} cannot be used with early looks; choose one of {', '.join(usable)}, "
            "or pass looks=None"
        )
    if PVALUES[name].anytime:
        return BettingTracker(alpha, levels, n, float(spending.sum()))
    return SumTracker(PVALUES[name], alpha, levels, n, spending)
