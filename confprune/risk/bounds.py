"""The p-values read the other way: largest sum that is rejected, largest risk that is plausible.

All results lie on the safe side of rounding: a critical sum is itself rejected, and at an upper
bound the p-value has reached delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy.optimize import elementwise

from confprune.risk.betting import BettingProcess
from confprune.risk.binomial_tail import (
    SCALE_BITS,
    BinomialTail,
    binomial_deviance,
    binomial_tail,
    build_binomial_tail,
    probability_of_none,
)
from confprune.risk.inputs import (
    FloatArray,
    IntArray,
    check_losses,
    check_probability,
    check_sums,
    loss_sums,
    losses_are_binary,
)
from confprune.risk.pvalues import resolve_pvalue, standard_deviation
from confprune.risk.sum_pvalues import bentkus_tail, hoeffding_from_sums

_TOLERANCE = 1e-12
"""Relative width at which the search for a bound on the risk ends."""

_MARGIN = 1e-6
"""Relative distance kept from a closed form that is only used to start a search."""

_FAR = 1e3
"""Stands for an infinite logarithm."""


def required_n(alpha: float, delta: float) -> int:
    """The smallest number of examples that can certify anything: even a zero loss needs as many.

    Parameters
    ----------
    alpha : float
        Risk allowed, in (0, 1).
    delta : float
        Error level, in (0, 1).

    Returns
    -------
    int
        The smallest n with ``(1 - alpha) ** n <= delta``.

    Examples
    --------
    >>> required_n(alpha=0.05, delta=0.1)
    45
    >>> required_n(alpha=0.5, delta=0.25)
    2
    """
    alpha = check_probability("alpha", alpha)
    delta = check_probability("delta", delta)
    n = max(1, math.ceil(math.log(delta) / math.log1p(-alpha)))
    # The quotient may be a rounding error off an integer; decide there without rounding.
    while n > 1 and probability_of_none(n - 1, alpha) <= delta:
        n -= 1
    while probability_of_none(n, alpha) > delta:
        n += 1
    return n


def critical_sum(
    n: ArrayLike, alpha: float, delta: float, pvalue: str = "convex"
) -> float | FloatArray:
    """The largest sum of losses whose p-value is at most delta.

    Parameters
    ----------
    n : int or array_like of int
        Numbers of examples.
    alpha : float
        Risk under test, in (0, 1).
    delta : float
        Level of the test, in (0, 1).
    pvalue : str
        One of those that depend on sums: ``"hoeffding"``, ``"bentkus"``, ``"hoeffding_bentkus"``,
        ``"binomial"``, ``"convex"``.

    Returns
    -------
    float or ndarray of float64
        ``-inf`` where not even a zero loss is rejected. An integer for `binomial` and
        `bentkus`; exact to rounding, on the safe side, for the others.

    Raises
    ------
    ValueError
        If the p-value is not a function of the sum.

    Examples
    --------
    >>> critical_sum(100, alpha=0.05, delta=0.1, pvalue="binomial")
    1.0
    >>> critical_sum([44, 100], alpha=0.05, delta=0.1).round(4)
    array([-inf, 1.57])
    """
    alpha = check_probability("alpha", alpha)
    delta = check_probability("delta", delta)
    if pvalue not in _CRITICAL:
        raise ValueError(
            f"pvalue={pvalue!r} has no critical sum; choose one of {', '.join(_CRITICAL)}"
        )
    _, counts = check_sums(0.0, n)
    flat = np.full(counts.size, -np.inf)
    positive = counts.ravel() > 0
    flat[positive] = _CRITICAL[pvalue](counts.ravel()[positive], alpha, delta)
    return flat.reshape(counts.shape) if counts.ndim else float(flat[0])


def _critical_hoeffding(n: IntArray, alpha: float, delta: float) -> FloatArray:
    low, high = np.zeros(n.shape), n * alpha
    hopeless = hoeffding_from_sums(low, n, alpha) > delta
    while True:
        middle = 0.5 * (low + high)
        if np.all((middle == low) | (middle == high)):
            return np.where(hopeless, -np.inf, low)
        rejected = hoeffding_from_sums(middle, n, alpha) <= delta
        low = np.where(rejected, middle, low)
        high = np.where(rejected, high, middle)


def _critical_bentkus(n: IntArray, alpha: float, delta: float) -> FloatArray:
    def largest(table: BinomialTail) -> float:
        return _last_at_most(table, delta, factor=np.e)

    return _per_count(largest, n, alpha)


def _critical_hoeffding_bentkus(n: IntArray, alpha: float, delta: float) -> FloatArray:
    return np.maximum(_critical_hoeffding(n, alpha, delta), _critical_bentkus(n, alpha, delta))


def _critical_binomial(n: IntArray, alpha: float, delta: float) -> FloatArray:
    def largest(table: BinomialTail) -> float:
        return _last_at_most(table, delta, factor=1.0)

    return _per_count(largest, n, alpha)


def _critical_convex(n: IntArray, alpha: float, delta: float) -> FloatArray:
    def largest(table: BinomialTail) -> float:
        # hinge(a) / (a - S) <= delta for some a, solved for S.
        solutions = table.integers() - np.ldexp(table.hinge, -SCALE_BITS) / delta
        candidate = max(float(solutions[1:].max()), 0.0)
        step = np.spacing(candidate)
        while candidate > 0.0 and table.hinge_bound(candidate) > delta:
            candidate, step = max(candidate - step, 0.0), 2.0 * step
        return candidate if table.hinge_bound(candidate) <= delta else -np.inf

    return _per_count(largest, n, alpha)


_CRITICAL: dict[str, Callable[[IntArray, float, float], FloatArray]] = {
    "hoeffding": _critical_hoeffding,
    "bentkus": _critical_bentkus,
    "hoeffding_bentkus": _critical_hoeffding_bentkus,
    "binomial": _critical_binomial,
    "convex": _critical_convex,
}


def _last_at_most(table: BinomialTail, delta: float, factor: float) -> float:
    """The largest k with ``factor * F(k) <= delta``, or -inf."""
    probabilities = factor * table.below(table.integers())
    last = table.start + int(np.searchsorted(probabilities, delta, side="right")) - 1
    return float(last) if last >= 0 else -np.inf


def _per_count(function: Callable[[BinomialTail], float], n: IntArray, alpha: float) -> FloatArray:
    distinct, inverse = np.unique(n, return_inverse=True)
    return np.array([function(binomial_tail(int(count), alpha)) for count in distinct])[inverse]


def upper_bound(losses: ArrayLike, delta: float, pvalue: str = "auto") -> FloatArray:
    """Upper confidence bound on the risk of each level, at confidence 1 - delta, level by level.

    The largest risk that the p-value does not reject: ``sup {alpha : p(losses, alpha) > delta}``.

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1].
    delta : float
        Error level, in (0, 1).
    pvalue : str
        Any p-value by name. With ``"clt"`` the bound is asymptotic.

    Returns
    -------
    ndarray of float64 [K]
        Bounds in (0, 1], each valid for its level; not for all levels at once.

    Notes
    -----
    All p-values fall as alpha rises, so the bound is the one place where they cross delta. For
    `binomial` it is the interval of Clopper and Pearson.

    Examples
    --------
    >>> upper_bound(np.zeros((45, 1)), delta=0.1).round(4)
    array([0.0499])
    """
    delta = check_probability("delta", delta)
    matrix = check_losses(losses)
    needs_binary = pvalue in ("auto", "binomial")
    kind = resolve_pvalue(pvalue, needs_binary and losses_are_binary(matrix))
    n, levels = matrix.shape
    sums = loss_sums(matrix)
    if kind.from_sums is not None:
        return upper_bound_from_sums(sums, n, delta, kind.name)
    if kind.asymptotic:
        spread = standard_deviation(matrix)
        normal = sums / n - special.ndtri(delta) * spread / math.sqrt(n)
        constant = upper_bound_from_sums(sums, n, delta, "hoeffding")
        return np.where(spread == 0.0, constant, np.clip(normal, 0.0, 1.0))

    def log_pvalue(alpha: FloatArray, column: IntArray) -> FloatArray:
        process = BettingProcess(alpha, len(column), n, delta)
        process.update(matrix[:, column])
        with np.errstate(divide="ignore"):  # far from alpha a p-value is too small for a number
            return np.log(process.pvalues())

    return _crossing(log_pvalue, np.full(levels, delta), sums / n, np.ones(levels), tolerance=1e-9)


def upper_bound_from_sums(
    sums: ArrayLike, n: ArrayLike, delta: ArrayLike, pvalue: str = "convex"
) -> FloatArray:
    """Upper confidence bounds on the risk from sums of losses; see `upper_bound`.

    Parameters
    ----------
    sums : array_like [K]
        Sums of the losses of each level.
    n : int or array_like [K]
        Number of examples; 0 gives the bound 1.
    delta : float or array_like [K]
        Error level, in (0, 1).
    pvalue : str
        One of those that depend on sums.

    Returns
    -------
    ndarray of float64 [K]

    Examples
    --------
    >>> upper_bound_from_sums([0, 2], 100, delta=0.1, pvalue="binomial").round(4)
    array([0.0228, 0.0523])
    """
    totals, counts = check_sums(sums, n)
    deltas = np.broadcast_to(np.asarray(delta, dtype=np.float64), totals.shape)
    for value in np.unique(deltas):
        check_probability("delta", value)
    if pvalue not in _BOUNDS:
        raise ValueError(
            f"no bound from sums for pvalue={pvalue!r}; choose one of {', '.join(_BOUNDS)}, "
            "or use upper_bound(losses, ...)"
        )
    bounds = np.ones(totals.shape)
    some = counts > 0
    columns = np.stack([totals[some], counts[some].astype(np.float64), deltas[some]])
    distinct, inverse = np.unique(columns, axis=1, return_inverse=True)
    bounds[some] = _BOUNDS[pvalue](*distinct)[inverse.ravel()]
    return bounds


def _bound_hoeffding(sums: FloatArray, n: FloatArray, delta: FloatArray) -> FloatArray:
    def log_pvalue(alpha: FloatArray, index: IntArray) -> FloatArray:
        return -binomial_deviance(sums[index], n[index], alpha)

    return _crossing(log_pvalue, delta, sums / n, np.ones(sums.shape))


def _bound_binomial(sums: FloatArray, n: FloatArray, delta: FloatArray) -> FloatArray:
    # The closed form is nearly always within rounding of the bound; if so, one table is enough.
    low, high = _bracket(sums, n, delta)
    guess = np.minimum(low / (1.0 - _MARGIN) * (1.0 + _TOLERANCE), 1.0)
    return _bound_by_tables(BinomialTail.up_to, sums, n, delta, low, high, guess)


def _bound_bentkus(sums: FloatArray, n: FloatArray, delta: FloatArray) -> FloatArray:
    low = _bracket(np.floor(sums), n, delta / np.e)[0]
    high = _bracket(np.ceil(sums), n, delta / np.e)[1]
    return _bound_by_tables(bentkus_tail, sums, n, delta, low, high)


def _bound_hoeffding_bentkus(sums: FloatArray, n: FloatArray, delta: FloatArray) -> FloatArray:
    return np.minimum(_bound_hoeffding(sums, n, delta), _bound_bentkus(sums, n, delta))


def _bound_convex(sums: FloatArray, n: FloatArray, delta: FloatArray) -> FloatArray:
    # Between the exact bound for 0/1 losses and the bounds it improves on.
    low = _bracket(np.floor(sums), n, delta)[0]
    high = np.minimum(_bound_hoeffding(sums, n, delta) * (1.0 + _MARGIN), 1.0)
    return _bound_by_tables(BinomialTail.hinge_bound, sums, n, delta, low, high)


_BOUNDS: dict[str, Callable[[FloatArray, FloatArray, FloatArray], FloatArray]] = {
    "hoeffding": _bound_hoeffding,
    "bentkus": _bound_bentkus,
    "hoeffding_bentkus": _bound_hoeffding_bentkus,
    "binomial": _bound_binomial,
    "convex": _bound_convex,
}


def _bracket(sums: FloatArray, n: FloatArray, delta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Risks just below and just above the bound of Clopper and Pearson."""
    inside = sums < n
    quantile = np.ones(sums.shape)
    quantile[inside] = special.betainccinv((sums + 1.0)[inside], (n - sums)[inside], delta[inside])
    return quantile * (1.0 - _MARGIN), np.minimum(quantile * (1.0 + _MARGIN), 1.0)


def _bound_by_tables(
    tail: Callable[[BinomialTail, Any], Any],
    sums: FloatArray,
    n: FloatArray,
    delta: FloatArray,
    low: FloatArray,
    high: FloatArray,
    guess: FloatArray | None = None,
) -> FloatArray:
    floors = np.log(delta) - 40.0

    def log_pvalue(alpha: FloatArray, index: IntArray) -> FloatArray:
        pvalues = [
            tail(build_binomial_tail(int(trials), float(value), floor), total)
            for trials, value, floor, total in zip(
                n[index], alpha, floors[index], sums[index], strict=True
            )
        ]
        return np.log(np.maximum(pvalues, 1e-300))

    return _crossing(log_pvalue, delta, low, high, guess=guess)


def _crossing(
    log_pvalue: Callable[[FloatArray, IntArray], FloatArray],
    delta: FloatArray,
    low: FloatArray,
    high: FloatArray,
    tolerance: float = _TOLERANCE,
    guess: FloatArray | None = None,
) -> FloatArray:
    """The risks at which falling p-values reach delta, from the side where they have.

    `log_pvalue` takes risks and the indices of the levels they belong to. A p-value that is still
    above delta at `high` gives the bound 1. A `guess` is known to be no more than `tolerance` too
    large, and taken where the p-value has reached delta there.
    """
    # A little below delta, so that a rounding error in the p-value cannot lift it above.
    targets = np.log(delta) - 1e-12

    def excess(alpha: FloatArray, position: FloatArray) -> FloatArray:
        index = position.astype(np.int64)
        inside = (alpha > 0.0) & (alpha < 1.0)
        values = np.where(alpha >= 1.0, -_FAR, -targets[index])
        values[inside] = log_pvalue(alpha[inside], index[inside]) - targets[index[inside]]
        return np.asarray(np.clip(values, -_FAR, _FAR))

    bounds = np.ones(low.shape)
    open_levels = np.flatnonzero(low < 1.0)
    if guess is not None:
        good = excess(guess[open_levels], open_levels.astype(np.float64)) <= 0.0
        bounds[open_levels[good]] = guess[open_levels[good]]
        open_levels = open_levels[~good]
    if open_levels.size:
        bracket = low[open_levels], high[open_levels]
        result = elementwise.find_root(
            excess,
            bracket,
            args=(open_levels.astype(np.float64),),
            tolerances={"xrtol": tolerance, "xatol": 0.0, "fatol": 0.0},
        )
        # The root found, if it is on the safe side, else the other end of its narrow bracket.
        reached = np.where(result.f_x <= 0.0, result.x, np.maximum(*result.bracket))
        bounds[open_levels] = np.where(result.success, reached, 1.0)
    return bounds
