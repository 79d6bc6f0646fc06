"""p-values that depend on the losses only through their sums: formulas and theorems.

Each takes the sums S [K] of losses in [0, 1], the number of examples n (one, or one per level, as
with selective prediction) and alpha. F is the CDF of Binomial(n, alpha). Users meet them in
`confprune.risk.pvalues`, beside the forms that take losses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from confprune.risk.binomial_tail import BinomialTail, binomial_deviance, binomial_tail
from confprune.risk.inputs import FloatArray, check_probability, check_sums


def hoeffding_from_sums(sums: ArrayLike, n: ArrayLike, alpha: float) -> FloatArray:
    """Hoeffding's p-value from sums of losses; see `hoeffding`.

    Parameters
    ----------
    sums : array_like [K]
        Sums of the losses of each level.
    n : int or array_like [K]
        Number of examples; 0 gives p = 1.
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    Examples
    --------
    >>> hoeffding_from_sums([0, 2, 5], 100, 0.05).round(4)
    array([0.0059, 0.2969, 1.    ])
    """
    alpha = check_probability("alpha", alpha)
    totals, counts = check_sums(sums, n)
    trivial = totals >= counts * alpha
    # Also keeps n = 0 out of the logarithms.
    safe_counts = np.where(trivial, 1, counts)
    exponent = binomial_deviance(np.where(trivial, 0.0, totals), safe_counts, alpha)
    return np.where(trivial, 1.0, np.exp(-exponent))


def bentkus_from_sums(sums: ArrayLike, n: ArrayLike, alpha: float) -> FloatArray:
    """Bentkus's p-value from sums of losses; see `bentkus`.

    Parameters
    ----------
    sums : array_like [K]
        Sums of the losses of each level.
    n : int or array_like [K]
        Number of examples; 0 gives p = 1.
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    Examples
    --------
    >>> bentkus_from_sums([0, 0.5, 1], 100, 0.05).round(4)
    array([0.0161, 0.1008, 0.1008])
    """
    return _from_tables(bentkus_tail, sums, n, alpha)


def bentkus_tail(table: BinomialTail, totals: FloatArray) -> FloatArray:
    """``min(1, e F(ceil(totals)))``, continuous just above an integer."""
    lower = np.floor(totals)
    excess = totals - lower
    rounding = excess <= 1e-12 * np.maximum(totals, 1.0)
    at_ceiling = table.below(np.ceil(totals))
    at_floor = table.below(lower)
    with np.errstate(divide="ignore", invalid="ignore"):
        interpolated = at_floor * np.exp(excess * np.log(at_ceiling / at_floor))
    interpolated = np.where(excess == 0.0, at_floor, interpolated)
    # Where F underflows there is nothing to interpolate; the ceiling is the safe side.
    interpolated = np.where(at_floor == 0.0, at_ceiling, interpolated)
    return np.minimum(1.0, np.e * np.where(rounding, interpolated, at_ceiling))


def hoeffding_bentkus_from_sums(sums: ArrayLike, n: ArrayLike, alpha: float) -> FloatArray:
    """Hoeffding-Bentkus p-value from sums of losses; see `hoeffding_bentkus`.

    Parameters
    ----------
    sums : array_like [K]
        Sums of the losses of each level.
    n : int or array_like [K]
        Number of examples; 0 gives p = 1.
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    Examples
    --------
    >>> hoeffding_bentkus_from_sums([0, 1, 2], 100, 0.05).round(4)
    array([0.0059, 0.0843, 0.2969])
    """
    return np.minimum(hoeffding_from_sums(sums, n, alpha), bentkus_from_sums(sums, n, alpha))


def binomial_from_sums(sums: ArrayLike, n: ArrayLike, alpha: float) -> FloatArray:
    """Exact p-value from the numbers of errors; see `binomial`.

    Parameters
    ----------
    sums : array_like [K]
        Numbers of examples with loss 1; integers.
    n : int or array_like [K]
        Number of examples; 0 gives p = 1.
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    Raises
    ------
    ValueError
        If a sum is not an integer.

    Examples
    --------
    >>> binomial_from_sums([0, 1, 2], 100, 0.05).round(4)
    array([0.0059, 0.0371, 0.1183])
    """
    totals = np.asarray(sums, dtype=np.float64)
    fractional = totals != np.floor(totals)
    if fractional.any():
        raise ValueError(
            f"pvalue='binomial' needs losses that are 0 or 1, got the sum {totals[fractional][0]}; "
            "use pvalue='convex' (or 'auto')"
        )
    return _from_tables(BinomialTail.below, totals, n, alpha)


def convex_from_sums(sums: ArrayLike, n: ArrayLike, alpha: float) -> FloatArray:
    """Convex p-value from sums of losses; see `convex`.

    Parameters
    ----------
    sums : array_like [K]
        Sums of the losses of each level.
    n : int or array_like [K]
        Number of examples; 0 gives p = 1.
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    Examples
    --------
    >>> convex_from_sums([0, 1, 2], 100, 0.05).round(4)
    array([0.0059, 0.043 , 0.1613])
    """
    return _from_tables(BinomialTail.hinge_bound, sums, n, alpha)


def _from_tables(
    tail: Callable[[BinomialTail, FloatArray], FloatArray],
    sums: ArrayLike,
    n: ArrayLike,
    alpha: float,
) -> FloatArray:
    """Evaluate `tail` with one binomial table per distinct n."""
    alpha = check_probability("alpha", alpha)
    totals, counts = check_sums(sums, n)
    pvalues = np.ones(totals.shape)
    for count in np.unique(counts[counts > 0]):
        members = counts == count
        pvalues[members] = tail(binomial_tail(int(count), alpha), totals[members])
    return pvalues
