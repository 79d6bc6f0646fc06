"""The lower tail of Binomial(n, alpha), tabulated around its mean to full double precision.

Three p-values rest on it: the distribution function F itself (``binomial``, ``bentkus``) and its
running sum, the expected hinge G(a) = E(a - B)^+ = sum over k < a of F(k) (``convex``). One table
serves all levels of a grid, because they share n and alpha.

The probabilities are built up from the most likely number by their ratios, and divided by their
sum: that keeps full relative accuracy far in the tail, where differences of log-gamma functions
lose all digits. They are stored multiplied by a power of two, so that neither values of 1e-320 nor
their sums leave the range in which doubles are accurate.
"""

from __future__ import annotations

import decimal
import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

FloatArray = NDArray[np.float64]

SCALE_BITS = 866
"""Tables hold probability * 2**SCALE_BITS: about 1e260, so 1e-320 and 1e7 both fit."""

UNDERFLOW = -800.0
"""Log-probability below which a table ends: smaller than the smallest double."""

UPPER = 45.0
"""Minus the log of the mass neglected above a table: far below the rounding of 1."""

LOWER = 120.0
"""Minus the log of the mass neglected below, where only sums of probabilities matter."""


def poisson_deviance(x: ArrayLike, mean: ArrayLike) -> FloatArray:
    """``x log(x / mean) + mean - x``, accurate also where x and mean nearly agree.

    Parameters
    ----------
    x : array_like
        Non-negative values.
    mean : array_like
        Positive values, broadcast against `x`.

    Returns
    -------
    ndarray
        Non-negative deviances.
    """
    x = np.asarray(x, dtype=np.float64)
    mean = np.asarray(mean, dtype=np.float64)
    difference = x - mean
    ratio = difference / (x + mean)
    # x log(x / mean) = 2 x atanh(ratio); near 0 the series leaves out the terms that cancel.
    square = ratio * ratio
    series = np.zeros_like(square)
    for power in range(21, 1, -2):
        series = series * square + 1.0 / power
    near = ratio * difference + 2.0 * x * ratio * square * series
    far = special.xlogy(x, x / mean) - difference
    return np.asarray(np.where(np.abs(ratio) < 0.1, near, far))


def binomial_deviance(sums: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> FloatArray:
    """``n h(sums / n, alpha)``, h being the relative entropy of two coins.

    The two halves are deviances of successes and failures; each is non-negative, so nothing
    cancels between them, also when alpha is within 1e-6 of 0 or 1.
    """
    sums = np.asarray(sums, dtype=np.float64)
    n = np.asarray(n, dtype=np.float64)
    alpha = np.asarray(alpha, dtype=np.float64)
    return poisson_deviance(sums, n * alpha) + poisson_deviance(n - sums, n * (1.0 - alpha))


def probability_of_none(n: int, alpha: float) -> decimal.Decimal:
    """``(1 - alpha) ** n`` to 40 digits: the smallest p-value n examples can give.

    Decimal arithmetic keeps exact what is exact, so that alpha = 0.5, delta = 0.25 needs two
    examples, not three.
    """
    with decimal.localcontext() as context:
        context.prec = 60
        context.Emin = decimal.MIN_EMIN
        return +((1 - decimal.Decimal(alpha)) ** n)


@dataclass(frozen=True)
class BinomialTail:
    """Distribution function and expected hinge of Binomial(n, alpha) on a window.

    Attributes
    ----------
    n : int
        Number of trials.
    alpha : float
        Success probability.
    start : int
        The integer that index 0 of the tables stands for.
    cdf : ndarray [W]
        ``P(B <= start + i) * 2**SCALE_BITS``.
    """

    n: int
    alpha: float
    start: int
    cdf: FloatArray

    @property
    def stop(self) -> int:
        """The last integer in the window."""
        return self.start + len(self.cdf) - 1

    def integers(self) -> FloatArray:
        """The integers of the window [W]."""
        return np.arange(self.start, self.stop + 1, dtype=np.float64)

    @functools.cached_property
    def hinge(self) -> FloatArray:
        """``E(start + i - B)^+ * 2**SCALE_BITS`` [W]."""
        hinge = np.concatenate([[0.0], np.cumsum(self.cdf[:-1])])
        hinge.setflags(write=False)
        return hinge

    @functools.cached_property
    def tangents(self) -> FloatArray:
        """For each a in the window, the sum S at which a and a + 1 give the same bound.

        ``hinge(a) / (a - S)`` is quasi-convex in a, because the hinge is convex; it stops
        falling at the first a with ``S <= a - hinge(a) / cdf(a)``. One binary search per level
        in this increasing table therefore replaces a scan over a.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            values = self.integers() - self.hinge / self.cdf
        # An empty cell of the table (underflow) has no mass below it.
        values[~np.isfinite(values)] = -np.inf
        return np.maximum.accumulate(values)

    def below(self, counts: ArrayLike) -> FloatArray:
        """``P(B <= counts)`` for integers `counts`; 0 where it underflows."""
        index = np.asarray(counts, dtype=np.int64) - self.start
        inside = np.minimum(np.maximum(index, 0), len(self.cdf) - 1)  # np.clip takes longer
        probability = np.minimum(np.ldexp(self.cdf[inside], -SCALE_BITS), 1.0)
        probability = np.where(index < 0, 0.0, probability)
        return np.where(index >= len(self.cdf) - 1, 1.0, probability)

    def up_to(self, count: float) -> float:
        """``P(B <= count)`` for one integer, in less time than `below` takes."""
        index = int(count) - self.start
        if index < 0:
            return 0.0
        if index >= len(self.cdf) - 1:
            return 1.0
        return min(math.ldexp(float(self.cdf[index]), -SCALE_BITS), 1.0)

    def hinge_bound(self, sums: ArrayLike) -> FloatArray:
        """The smallest of 1 and ``E(a - B)^+ / (a - sums)`` over integers a in (sums, n]."""
        sums = np.asarray(sums, dtype=np.float64)
        # hinge(a) >= a - n alpha for every a, so the bound is trivial from the mean on.
        trivial = sums >= self.n * self.alpha
        below_mean = np.where(trivial, 0.0, sums)
        index = 1 + np.searchsorted(self.tangents[1:], below_mean)
        index = np.minimum(index, len(self.cdf) - 1)
        bound = self.hinge[index] / (self.start + index - below_mean)
        return np.where(trivial, 1.0, np.minimum(np.ldexp(bound, -SCALE_BITS), 1.0))


@functools.lru_cache(maxsize=32)
def binomial_tail(n: int, alpha: float) -> BinomialTail:
    """The table for (n, alpha) down to the smallest double, kept for the next call."""
    return build_binomial_tail(n, alpha)


def build_binomial_tail(n: int, alpha: float, floor: float = UNDERFLOW) -> BinomialTail:
    """Tabulate the lower tail of Binomial(n, alpha).

    Parameters
    ----------
    n : int
        Number of trials, at least 1.
    alpha : float
        Success probability in (0, 1).
    floor : float
        Natural logarithm of the tail mass that may be neglected at the lower end.

    Returns
    -------
    BinomialTail
        Its window is at most a few dozen standard deviations wide, whatever n.
    """
    start, stop = binomial_window(n, alpha, -floor)
    scaled = _scaled_probabilities(start, stop, n, alpha)
    if start == 0:
        scaled[0] = float(probability_of_none(n, alpha) * (1 << SCALE_BITS))
    cdf = np.cumsum(scaled)
    cdf.setflags(write=False)
    return BinomialTail(n, alpha, start, cdf)


def binomial_probabilities(n: int, alpha: float) -> tuple[int, FloatArray]:
    """The probabilities of Binomial(n, alpha) on a window.

    Parameters
    ----------
    n : int
        Number of trials, at least 1.
    alpha : float
        Success probability in (0, 1).

    Returns
    -------
    start : int
        The integer that index 0 stands for.
    probabilities : ndarray [W]

    Examples
    --------
    >>> start, probabilities = binomial_probabilities(2, 0.5)
    >>> start, probabilities.round(12)
    (0, array([0.25, 0.5 , 0.25]))
    """
    start, stop = binomial_window(n, alpha)
    return start, np.ldexp(_scaled_probabilities(start, stop, n, alpha), -SCALE_BITS)


def binomial_window(n: int, alpha: float, lower: float = LOWER) -> tuple[int, int]:
    """The first and the last integer of a window that holds nearly all of the mass.

    Less than exp(-lower) lies below it and exp(-UPPER) above, by Chernoff's and Bernstein's
    inequalities; the second is the sharper one for large alpha.
    """
    mean = n * alpha
    variance = mean * (1.0 - alpha)
    below = min(math.sqrt(2.0 * mean * lower), _bernstein_radius(variance, lower))
    above = _bernstein_radius(variance, UPPER)
    start = max(0, math.floor(mean - below) - 1)
    stop = min(n, math.ceil(mean + above) + 1)
    return start, stop


def _bernstein_radius(variance: float, exponent: float) -> float:
    return exponent / 3.0 + math.sqrt(exponent * exponent / 9.0 + 2.0 * variance * exponent)


def _scaled_probabilities(start: int, stop: int, n: int, alpha: float) -> FloatArray:
    """P(B = k) * 2**SCALE_BITS for k from `start` to `stop`, which hold nearly all of the mass.

    A step adds a few roundings and cancels nothing; ten million trials take 80,000 steps at most.
    """
    mode = min(max(math.floor((n + 1) * alpha), start), stop)
    odds = alpha / (1.0 - alpha)
    below, above = np.arange(mode, start, -1.0), np.arange(float(mode), stop)
    weights = np.empty(stop - start + 1)
    falling, rising = weights[mode - start :: -1], weights[mode - start :]
    rising[0] = math.ldexp(1.0, SCALE_BITS)
    falling[1:] = below / ((n + 1.0 - below) * odds)
    rising[1:] = (n - above) / (above + 1.0) * odds
    for ratios in (falling, rising):
        np.multiply.accumulate(ratios, out=ratios)
    weights /= math.ldexp(weights.sum(), -SCALE_BITS)
    return weights
