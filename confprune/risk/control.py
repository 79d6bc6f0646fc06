"""Control of monotone losses: in expectation, or with high probability for a monotone risk.

Two other promises than that of multiple testing. Both need the loss of an example to grow with the
sparsity; where it does not, it is replaced by the largest loss at any denser level, which is never
smaller, so the promise holds for the loss itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from confprune.risk.bounds import upper_bound
from confprune.risk.inputs import FloatArray, check_losses, check_probability, loss_sums


@dataclass(frozen=True)
class MonotoneControl:
    """The level chosen by a monotone method.

    Attributes
    ----------
    level : int or None
        The sparsest level that may be used, or None if there is none.
    bounds : ndarray of float64 [K]
        What was compared with alpha at each level; increasing.
    """

    level: int | None
    bounds: FloatArray


def monotonise(losses: ArrayLike) -> NDArray[Any]:
    """Replace each loss by the largest of the same example at this or any denser level.

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1], levels from dense to sparse.

    Returns
    -------
    ndarray [n, K]
        Non-decreasing along each row.

    Examples
    --------
    >>> monotonise([[0.0, 0.4, 0.1, 0.5]])
    array([[0. , 0.4, 0.4, 0.5]])
    """
    return np.asarray(np.maximum.accumulate(check_losses(losses), axis=1))


def conformal_risk_control(losses: ArrayLike, alpha: float) -> MonotoneControl:
    """The sparsest level whose expected loss on a new example is at most alpha.

    The expectation is over the calibration set as well: no promise about this calibration set,
    unlike with multiple testing, but nothing is lost to an error level delta.

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1], levels from dense to sparse.
    alpha : float
        Expected loss allowed, in (0, 1).

    Returns
    -------
    MonotoneControl
        Bounds are ``(S_j + 1) / (n + 1)`` with S_j the sum of the monotonised losses. If no level
        qualifies, the network must be kept as it is; the promise takes that for a loss of at most
        alpha, which is so for losses against the full network.

    References
    ----------
    A. Angelopoulos et al., "Conformal risk control", arXiv 2208.02814, Theorem 1 and, for
    losses that are not monotone, Section 2.3.

    Examples
    --------
    >>> losses = np.zeros((99, 3))
    >>> losses[:4, 1], losses[:5, 2] = 1.0, 1.0
    >>> conformal_risk_control(losses, alpha=0.05).level
    1
    """
    alpha = check_probability("alpha", alpha)
    monotone = monotonise(losses)
    bounds = (loss_sums(monotone) + 1.0) / (len(monotone) + 1.0)
    return MonotoneControl(_last_within(bounds, alpha), bounds)


def rcps(losses: ArrayLike, alpha: float, delta: float, pvalue: str = "auto") -> MonotoneControl:
    """Risk-controlling selection: the level before the confidence bound first exceeds alpha.

    With probability at least 1 - delta over the calibration set, the monotonised risk of the
    chosen level, and of every denser one, is at most alpha.

    Parameters
    ----------
    losses : array_like [n, K]
        Losses in [0, 1], levels from dense to sparse.
    alpha : float
        Risk allowed, in (0, 1).
    delta : float
        Error level, in (0, 1).
    pvalue : str
        The p-value whose inversion gives the bounds; see `confprune.risk.bounds.upper_bound`.

    Returns
    -------
    MonotoneControl
        Bounds are upper confidence bounds on the monotonised risk, level by level. No correction
        for their number is needed: the risk is monotone, so an error is an error of the bound at
        the first level whose risk exceeds alpha.

    References
    ----------
    S. Bates et al., "Distribution-free, risk-controlling prediction sets", arXiv 2101.02703,
    Theorem 1.

    Examples
    --------
    >>> losses = np.zeros((200, 3))
    >>> losses[:2, 1], losses[:9, 2] = 1.0, 1.0
    >>> rcps(losses, alpha=0.05, delta=0.1).level
    1
    """
    alpha = check_probability("alpha", alpha)
    bounds = upper_bound(monotonise(losses), delta, pvalue)
    return MonotoneControl(_last_within(bounds, alpha), bounds)


def _last_within(bounds: FloatArray, alpha: float) -> int | None:
    within = int(np.count_nonzero(np.logical_and.accumulate(bounds <= alpha)))
    return within - 1 if within else None
