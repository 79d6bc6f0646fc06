"""p-values for the hypothesis that a risk exceeds alpha, for all levels of a grid at once.

Each function takes losses [n, K] (row = example, column = level) and alpha, and returns K numbers,
each super-uniform if the risk of its level is at least alpha. Those that depend on the losses
only through their sums come in a second form, ``<name>_from_sums(sums, n, alpha)``, in which n may
differ between levels. Relative accuracy is 1e-10 or better down to p = 1e-300, for n up to 1e7 and
alpha from 1e-6 to 1 - 1e-6; below 1e-308 a p-value may underflow to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from confprune.risk.betting import BettingProcess
from confprune.risk.inputs import (
    FloatArray,
    check_losses,
    check_probability,
    loss_sums,
    losses_are_binary,
)
from confprune.risk.sum_pvalues import (
    bentkus_from_sums,
    binomial_from_sums,
    convex_from_sums,
    hoeffding_bentkus_from_sums,
    hoeffding_from_sums,
)


def hoeffding(losses: ArrayLike, alpha: float) -> FloatArray:
    """Hoeffding's p-value, ``exp(-n h(min(mean, alpha), alpha))``.

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1].
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    Raises
    ------
    ValueError
        If the losses or alpha are out of range.

    References
    ----------
    W. Hoeffding, "Probability inequalities for sums of bounded random variables", JASA 1963,
    Theorem 1; as a p-value in Learn-then-Test, arXiv 2110.01052, Section 2.

    Examples
    --------
    >>> hoeffding(np.zeros((45, 1)), alpha=0.05).round(4)
    array([0.0994])
    """
    matrix = check_losses(losses)
    return hoeffding_from_sums(loss_sums(matrix), len(matrix), alpha)


def bentkus(losses: ArrayLike, alpha: float) -> FloatArray:
    """Bentkus's p-value, ``min(1, e F(ceil(S)))`` with F the CDF of Binomial(n, alpha).

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1].
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    Notes
    -----
    A sum of floats such as 3.0000000000000004 must not be rounded up to 4. Bentkus's theorem
    allows more than the ceiling: between integers it holds with log F interpolated linearly. Within
    1e-12 (relative) above an integer that interpolation is used, which is valid and continuous.

    References
    ----------
    V. Bentkus, "On Hoeffding's inequalities", Annals of Probability 32 (2004), Theorem 1.1; as a
    p-value in Learn-then-Test, arXiv 2110.01052, Section 2.

    Examples
    --------
    >>> bentkus(np.zeros((65, 1)), alpha=0.05).round(4)
    array([0.0969])
    """
    matrix = check_losses(losses)
    return bentkus_from_sums(loss_sums(matrix), len(matrix), alpha)


def hoeffding_bentkus(losses: ArrayLike, alpha: float) -> FloatArray:
    """The smaller of Hoeffding's and Bentkus's p-values, the standard of Learn-then-Test.

    Valid without correction, because both bound the same tail probability of the sum.

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1].
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    References
    ----------
    Learn-then-Test, arXiv 2110.01052, Proposition 1; S. Bates et al., arXiv 2101.02703.

    Examples
    --------
    >>> losses = np.zeros((100, 2))
    >>> losses[0] = 1.0
    >>> bool((hoeffding_bentkus(losses, 0.05) <= hoeffding(losses, 0.05)).all())
    True
    """
    matrix = check_losses(losses)
    return hoeffding_bentkus_from_sums(loss_sums(matrix), len(matrix), alpha)


def binomial(losses: ArrayLike, alpha: float) -> FloatArray:
    """The exact p-value for 0/1 losses, ``F(S)`` with F the CDF of Binomial(n, alpha).

    Parameters
    ----------
    losses : array_like [n, K]
        Losses, each 0 or 1.
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    Raises
    ------
    ValueError
        If a loss is neither 0 nor 1: for those F(S) is not a valid p-value.

    References
    ----------
    Learn-then-Test, arXiv 2110.01052, Section 2.

    Examples
    --------
    >>> binomial(np.zeros((45, 1)), alpha=0.05).round(4)
    array([0.0994])
    """
    matrix = check_losses(losses)
    if not losses_are_binary(matrix):
        raise ValueError(
            "pvalue='binomial' needs losses that are 0 or 1, got values in between; "
            "use pvalue='convex' (or 'auto')"
        )
    return binomial_from_sums(loss_sums(matrix), len(matrix), alpha)


def convex(losses: ArrayLike, alpha: float) -> FloatArray:
    """The best p-value that bounds the sum through convex functions.

    The minimum over integers a with S < a <= n of ``(sum over k < a of F(k)) / (a - S)``, with F
    the CDF of Binomial(n, alpha). Never larger than Hoeffding's or Bentkus's; between p = 0.001
    and 0.2 mostly 1.2 to 2.5 times smaller than the better of them (n = 100 to 5000).

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1].
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]

    Notes
    -----
    For a > t, ``P(S <= t) <= E(a - S)^+ / (a - t)``, and ``E(a - S)^+ <= E(a - B)^+`` with
    B ~ Binomial(n, alpha): losses in [0, 1] with mean at least alpha are, in convex decreasing
    order, dominated by 0/1 losses with mean alpha. Between integers the hinge expectation is linear
    in a, so the best a is an integer. Both older bounds are proved through mixtures of such
    hinges, hence cannot be better.

    References
    ----------
    I. Pinelis, "Binomial upper bounds on generalized moments and tail probabilities of
    (super)martingales with differences bounded from above", 2006; V. Bentkus, Annals of
    Probability 32 (2004).

    Examples
    --------
    >>> losses = np.full((200, 1), 0.02)
    >>> convex(losses, 0.05).round(4), hoeffding_bentkus(losses, 0.05).round(4)
    (array([0.0383]), array([0.0719]))
    """
    matrix = check_losses(losses)
    return convex_from_sums(loss_sums(matrix), len(matrix), alpha)


def betting(losses: ArrayLike, alpha: float, *, delta: float = 0.1) -> FloatArray:
    """p-value by betting, ``1 / max over t of prod over i <= t of (1 - lambda_i (L_i - alpha))``.

    Adapts to the variance of the losses, so for losses that are seldom near 0 or 1 it rejects
    far more than the bounds on sums. It depends on the order of the examples, which must be
    the order of drawing or random.

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1].
    alpha : float
        Risk under test, in (0, 1).
    delta : float
        Error level the stakes are tuned for. Valid at every level all the same.

    Returns
    -------
    ndarray of float64 [K]

    References
    ----------
    I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by betting",
    arXiv 2010.09686, Section 3.2; Ville's inequality.

    Examples
    --------
    >>> losses = np.random.default_rng(0).uniform(0, 0.08, size=(1000, 1))
    >>> bool((betting(losses, 0.05) < 0.1 * convex(losses, 0.05))[0])
    True
    """
    alpha = check_probability("alpha", alpha)
    matrix = check_losses(losses)
    n, levels = matrix.shape
    process = BettingProcess(alpha, levels, n, check_probability("delta", delta))
    process.update(matrix)
    return process.pvalues()


def clt(losses: ArrayLike, alpha: float) -> FloatArray:
    """Normal approximation, ``Phi(sqrt(n) (mean - alpha) / sd)``. Asymptotic: no guarantee.

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1].
    alpha : float
        Risk under test, in (0, 1).

    Returns
    -------
    ndarray of float64 [K]
        Hoeffding's p-value for levels whose losses are all equal: they say nothing about the
        spread, and the formula would give 0 after two examples.

    Examples
    --------
    >>> losses = np.random.default_rng(0).uniform(0, 0.2, size=(400, 1))
    >>> float(clt(losses, 0.12)[0]) < 0.01
    True
    """
    alpha = check_probability("alpha", alpha)
    matrix = check_losses(losses)
    n = len(matrix)
    sums = loss_sums(matrix)
    spread = standard_deviation(losses)
    constant = spread == 0.0
    score = np.sqrt(n) * (sums / n - alpha) / np.where(constant, 1.0, spread)
    return np.where(constant, hoeffding_from_sums(sums, n, alpha), special.ndtr(score))


def standard_deviation(losses: ArrayLike) -> FloatArray:
    """Sample standard deviation of each level [K]; 0 where all losses are equal, or n = 1.

    Examples
    --------
    >>> standard_deviation([[0.0, 0.3], [1.0, 0.3]]).round(4)
    array([0.7071, 0.    ])
    """
    matrix = np.asarray(losses)
    deviations = np.zeros(matrix.shape[1])
    mean = loss_sums(matrix) / len(matrix)
    for first in range(0, len(matrix), 4096):
        deviations += ((matrix[first : first + 4096] - mean) ** 2).sum(axis=0)
    deviations[matrix.min(axis=0) == matrix.max(axis=0)] = 0.0
    return np.sqrt(deviations / max(len(matrix) - 1, 1))


@dataclass(frozen=True)
class PValue:
    """A kind of p-value, and what calibration must know about it.

    Attributes
    ----------
    name : str
        How users ask for it.
    from_losses : callable
        ``(losses [n, K], alpha) -> [K]``.
    from_sums : callable or None
        ``(sums [K], n, alpha) -> [K]``, where the sums of the losses suffice.
    binary_only : bool
        Valid for losses in {0, 1} only.
    anytime : bool
        Valid at any stopping time; the order of the examples matters.
    asymptotic : bool
        Without finite-sample guarantee.
    """

    name: str
    from_losses: Callable[[ArrayLike, float], FloatArray]
    from_sums: Callable[[ArrayLike, ArrayLike, float], FloatArray] | None = None
    binary_only: bool = False
    anytime: bool = False
    asymptotic: bool = False


PVALUES = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            PValue("hoeffding", hoeffding, hoeffding_from_sums),
            PValue("bentkus", bentkus, bentkus_from_sums),
            PValue("hoeffding_bentkus", hoeffding_bentkus, hoeffding_bentkus_from_sums),
            PValue("binomial", binomial, binomial_from_sums, binary_only=True),
            PValue("convex", convex, convex_from_sums),
            PValue("betting", betting, anytime=True),
            PValue("clt", clt, asymptotic=True),
        )
    }
)
"""All p-values by name."""


def resolve_pvalue(name: str, losses_are_binary: bool) -> PValue:
    """Look up a p-value by name; ``"auto"`` is `binomial` for 0/1 losses, else `convex`.

    Parameters
    ----------
    name : str
        A key of `PVALUES`, or ``"auto"``.
    losses_are_binary : bool
        Whether every loss is 0 or 1.

    Returns
    -------
    PValue

    Raises
    ------
    ValueError
        If the name is unknown, or the p-value needs 0/1 losses and these are not.

    Examples
    --------
    >>> resolve_pvalue("auto", losses_are_binary=False).name
    'convex'
    """
    if name == "auto":
        name = "binomial" if losses_are_binary else "convex"
    if name not in PVALUES:
        raise ValueError(f"unknown pvalue {name!r}; choose 'auto' or one of {', '.join(PVALUES)}")
    if PVALUES[name].binary_only and not losses_are_binary:
        raise ValueError(
            f"pvalue={name!r} needs losses that are 0 or 1, got values in between; "
            "use pvalue='convex' (or 'auto')"
        )
    return PVALUES[name]
