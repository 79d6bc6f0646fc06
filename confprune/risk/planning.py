"""Planning by simulation: what a calibration set of a given size can be expected to certify.

The answer is only as good as the guess it starts from: a risk curve, or the losses of a pilot
sample, whose own error is not accounted for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from confprune.risk.bounds import required_n
from confprune.risk.inputs import (
    FloatArray,
    check_grid,
    check_losses,
    check_probability,
    losses_are_binary,
)
from confprune.risk.looks import default_looks
from confprune.risk.procedures import Procedure, resolve_procedure
from confprune.risk.pvalues import PValue, resolve_pvalue
from confprune.risk.sequential import RiskTarget, SequentialTest, looks_possible
from confprune.risk.testing import BoolArray

POWER = 0.9
"""Probability with which the wished sparsity is to be certified."""

_LARGEST_N = 10**8


@dataclass(frozen=True)
class Simulation:
    """What to expect of a calibration.

    Attributes
    ----------
    n : int
        Number of examples simulated.
    sparsities : ndarray [K]
        The grid.
    probabilities : ndarray of float64 [K]
        Probability to certify each level.
    expected_sparsity : float
        Mean certified sparsity; 0 where nothing is certified.
    evaluated : float
        Mean share of the n K pairs (example, level) that is evaluated: 1 without early looks.
    wished : float or None
        The sparsity asked for.
    needed_n : int or None
        Number of examples that certify at least `wished` with probability 0.9, to about
        2 %; None if nothing was asked for or no number would do.
    """

    n: int
    sparsities: FloatArray
    probabilities: FloatArray
    expected_sparsity: float
    evaluated: float
    wished: float | None
    needed_n: int | None

    def __repr__(self) -> str:
        reached = self.sparsities[self.probabilities >= POWER]
        safe = f"{reached.max():.3f}" if reached.size else "none"
        lines = [
            f"with {self.n} examples",
            f"  expected certified sparsity     {self.expected_sparsity:.3f}",
            f"  certified with probability {POWER:g}  {safe}",
            f"  losses to evaluate              {self.evaluated:.1%} of examples x levels",
        ]
        if self.wished is not None:
            need = "no number of examples" if self.needed_n is None else f"{self.needed_n} examples"
            lines.append(f"  for sparsity {self.wished:.3f}              {need}")
        return "\n".join(lines)


def simulate(
    sparsities: ArrayLike,
    risks_or_losses: ArrayLike,
    alpha: float,
    delta: float,
    n: int,
    *,
    pvalue: str = "auto",
    procedure: str | Callable[..., BoolArray] = "fixed_sequence",
    looks: str | None = "auto",
    draws: int = 200,
    seed: int = 0,
    wished: float | None = None,
) -> Simulation:
    """Simulate calibrations, to plan one before its examples are labelled.

    Parameters
    ----------
    sparsities : array_like [K]
        The grid, strictly increasing, in [0, 1).
    risks_or_losses : array_like [K] or [m, K]
        A guessed risk for each level, for 0/1 losses that an example which fails at one level has
        at every level of larger risk; or the losses of a pilot sample, which is resampled.
    alpha : float
        Risk allowed, in (0, 1).
    delta : float
        Error level, in (0, 1).
    n : int
        Number of calibration examples.
    pvalue : str
        Any p-value by name. ``"auto"``: `binomial` for 0/1 losses; else `betting` with early looks
        and `convex` without.
    procedure : str, or callable (pvalues [K], delta) -> bool [K]
        A procedure that needs nothing but p-values: ``"fixed_sequence"``, ``"bonferroni"``,
        ``"holm"``, or your own.
    looks : "auto" or None
        As for `confprune.calibrate`: early looks, where the procedure and the p-value allow them,
        or one test on all examples.
    draws : int
        Number of calibrations simulated.
    seed : int
        Seed of the random numbers.
    wished : float, optional
        A sparsity for which to find the number of examples needed.

    Returns
    -------
    Simulation

    Raises
    ------
    ValueError, TypeError
        If shapes do not match, or an argument is out of range or no number.

    Examples
    --------
    >>> sparsities = np.linspace(0, 0.9, 10)
    >>> simulate(sparsities, 0.1 * sparsities**2, 0.05, 0.1, n=1000, wished=0.6, draws=100)
    with 1000 examples
      expected certified sparsity     0.582
      certified with probability 0.9  0.500
      losses to evaluate              25.7% of examples x levels
      for sparsity 0.600              1620 examples
    """
    alpha = check_probability("alpha", alpha)
    delta = check_probability("delta", delta)
    for name, count in (("n", n), ("draws", draws)):
        if not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count!r}")
    if wished is not None and not 0 <= wished < 1:
        raise ValueError(f"wished must be a sparsity in [0, 1), got {wished}")
    if looks not in ("auto", None):
        raise ValueError(f"looks must be 'auto' or None, got {looks!r}")
    grid = np.array(check_grid(sparsities))
    source = _Source(risks_or_losses)
    if source.levels != len(grid):
        raise ValueError(
            f"risks_or_losses must have one column per sparsity, got {source.levels} for "
            f"{len(grid)} sparsities"
        )
    test = resolve_procedure(procedure)
    if test.needs:
        raise ValueError(
            f"procedure={test.name!r} needs {', '.join(test.needs)}, which cannot be simulated; "
            "choose 'fixed_sequence', 'bonferroni' or 'holm'"
        )
    early = looks == "auto" and looks_possible(test, pvalue)
    if pvalue == "auto" and early and not source.binary:
        pvalue = "betting"
    kind = resolve_pvalue(pvalue, source.binary)

    def run(size: int) -> tuple[BoolArray, float]:
        rng = np.random.default_rng(seed)
        if early:
            return _with_looks(source, kind, test, alpha, delta, size, draws, rng)
        return _at_once(source, kind, test, alpha, delta, size, draws, rng), 1.0

    rejected, evaluated = run(n)
    needed = None
    if wished is not None and _reachable(grid, source.risks, alpha, wished, test):
        needed = _smallest_n(
            lambda size: float(np.mean(_certified(grid, run(size)[0]) >= wished)) >= POWER,
            required_n(alpha, delta),
        )
    return Simulation(
        n=n,
        sparsities=grid,
        probabilities=rejected.mean(axis=0),
        expected_sparsity=float(_certified(grid, rejected).mean()),
        evaluated=evaluated,
        wished=wished,
        needed_n=needed,
    )


class _Source:
    """Where simulated losses come from: a risk curve, or a pilot sample."""

    def __init__(self, risks_or_losses: ArrayLike) -> None:
        values = np.asarray(risks_or_losses)
        self.pilot: NDArray[Any] | None = None
        if values.ndim == 1:
            self.risks = check_losses(values[None])[0].astype(np.float64)
            self.binary = True
        else:
            self.pilot = check_losses(values)
            self.risks = self.pilot.mean(axis=0, dtype=np.float64)
            self.binary = losses_are_binary(self.pilot)
        self.levels = len(self.risks)
        # An example fails at the levels whose risk exceeds its threshold: bins between the risks.
        self._order = np.argsort(self.risks, kind="stable")
        self._bins = np.diff(np.concatenate([[0.0], self.risks[self._order], [1.0]]))

    def losses(self, size: int, rng: np.random.Generator) -> NDArray[Any]:
        """Losses [size, K] of new examples."""
        if self.pilot is None:
            return np.asarray(rng.random((size, 1)) < self.risks)
        return np.asarray(self.pilot[rng.integers(len(self.pilot), size=size)])

    def sums(self, size: int, rng: np.random.Generator) -> FloatArray:
        """Sums [K] of the losses of new examples, without drawing them one by one."""
        if self.pilot is None:
            sums = np.empty(self.levels)
            sums[self._order] = rng.multinomial(size, self._bins)[:-1].cumsum()
            return sums
        uniform = np.full(len(self.pilot), 1.0 / len(self.pilot))
        repeats = rng.multinomial(size, uniform).astype(np.float64)
        # Rounding must not lift a sum of ones above its number.
        return np.minimum(repeats @ self.pilot.astype(np.float64), size)


def _at_once(
    source: _Source,
    kind: PValue,
    test: Procedure,
    alpha: float,
    delta: float,
    n: int,
    draws: int,
    rng: np.random.Generator,
) -> BoolArray:
    if kind.from_sums is not None:
        sums = np.stack([source.sums(n, rng) for _ in range(draws)])
        pvalues = kind.from_sums(sums, n, alpha)
    else:
        pvalues = np.stack([kind.from_losses(source.losses(n, rng), alpha) for _ in range(draws)])
    return np.stack([test.test(row, delta) for row in pvalues])


def _with_looks(
    source: _Source,
    kind: PValue,
    test: Procedure,
    alpha: float,
    delta: float,
    n: int,
    draws: int,
    rng: np.random.Generator,
) -> tuple[BoolArray, float]:
    plan = default_looks(n, alpha, delta, kind.name)
    rejected = np.zeros((draws, source.levels), dtype=bool)
    evaluations = 0
    for draw in range(draws):
        run = SequentialTest(
            plan, source.levels, [RiskTarget(alpha, kind.name)], procedure=test.name
        )
        while not run.finished:
            size = run.next_look - run.seen
            if kind.from_sums is not None:
                run.update_sums(size, source.sums(size, rng)[None, run.active])
            else:
                run.update([source.losses(size, rng)[:, run.active]])
        result = run.result()
        rejected[draw] = result.rejected
        evaluations += result.evaluations
    return rejected, evaluations / (draws * n * source.levels)


def _certified(sparsities: FloatArray, rejected: BoolArray) -> FloatArray:
    """The largest rejected sparsity of each draw, or 0."""
    return np.asarray(np.where(rejected, sparsities, 0.0).max(axis=1))


def _reachable(
    sparsities: FloatArray, risks: FloatArray, alpha: float, wished: float, test: Procedure
) -> bool:
    """Whether enough examples would certify the wished sparsity."""
    good = risks < alpha
    if test.chain:
        good = np.logical_and.accumulate(good)
    return bool(np.any(good & (sparsities >= wished)))


def _smallest_n(enough: Callable[[int], bool], start: int) -> int | None:
    """The smallest n that is enough, to about 2 %, by doubling and bisection."""
    low, high = 0, start
    while not enough(high):
        low, high = high, 2 * high
        if high > _LARGEST_N:
            return None
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
