"""Testing by betting: a wealth process per level that rarely grows when the risk is too high.

Under the hypothesis that the risk exceeds alpha, a gambler who stakes lambda_i on the next loss
being small has wealth ``prod (1 - lambda_i (L_i - alpha))``, a non-negative supermartingale
whatever the stakes, as long as each depends on earlier losses only. By Ville's inequality it ever
reaches 1 / p with probability at most p. So ``1 / max wealth`` is a p-value at every moment at
once: one may look after each example and stop when satisfied.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from confprune.risk.inputs import FloatArray

_BLOCK = 4096
"""Examples processed at a time, to bound the memory for intermediate values."""

TRUNCATION = 0.9
"""Share of the largest stake that cannot bankrupt the gambler (the c of the literature).

Chosen by simulation: 0.75 wins a little on 0/1 losses with a middling n, but cannot certify a
zero loss with few examples; closer to 1, one early loss is too expensive.
"""


class BettingProcess:
    """The wealth of K gamblers, one per level, fed with examples as they come.

    The stakes are the predictable plug-in of Waudby-Smith and Ramdas [1]_, tuned to a planned
    number of examples: ``lambda_i = min(c / (1 - alpha), sqrt(2 log(1/delta) / (n var_(i-1))))``,
    with the running variance of the losses before i. Apart from the truncation they do not depend
    on alpha, and so each factor, hence the wealth, increases with alpha: the p-value can be
    inverted into a confidence bound.

    Parameters
    ----------
    alpha : float or array_like [K]
        Risk under test, each in (0, 1).
    levels : int
        K, the number of levels.
    n : float
        Planned number of examples, counted or not. It tunes the stakes; any other may follow.
    delta : float
        Error level the stakes are tuned for; the p-value is valid at every level.

    References
    ----------
    .. [1] I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by betting",
       JRSS-B 2024, arXiv 2010.09686, Section 3.2 and Theorem 3.

    Examples
    --------
    >>> process = BettingProcess(alpha=0.05, levels=2, n=100)
    >>> process.update(np.zeros((60, 2)))
    >>> process.update(np.stack([np.zeros(40), np.ones(40)], axis=1))
    >>> process.pvalues().round(4)
    array([0.0106, 0.0676])
    """

    def __init__(self, alpha: ArrayLike, levels: int, n: float, delta: float = 0.1) -> None:
        self._alpha = np.broadcast_to(np.asarray(alpha, dtype=np.float64), (levels,))
        self._cap = TRUNCATION / (1.0 - self._alpha)
        self._log_target = math.log(1.0 / delta)
        self._planned = float(n)
        self._seen = np.zeros(levels, dtype=np.int64)
        self._count = np.zeros(levels, dtype=np.int64)
        self._sum = np.zeros(levels)
        self._deviation = np.zeros(levels)
        self._log_wealth = np.zeros(levels)
        self._log_peak = np.zeros(levels)

    @property
    def count(self) -> NDArray[np.int64]:
        """Examples seen by each level [K]."""
        return self._count

    def pvalues(self) -> FloatArray:
        """``1 / max wealth`` so far [K], at most 1."""
        return np.exp(-self._log_peak)

    def variances(self) -> FloatArray:
        """Running variances of the losses [K], which tune the next stakes."""
        return (0.25 + self._deviation) / (1.0 + self._count)

    def update(
        self,
        losses: ArrayLike,
        levels: ArrayLike | None = None,
        counted: ArrayLike | None = None,
    ) -> None:
        """Bet on the next examples.

        Parameters
        ----------
        losses : array_like [m, A]
            Losses in [0, 1], in the order in which the examples were drawn.
        levels : array_like of int [A], optional
            Which levels the columns belong to; all of them by default.
        counted : array_like of bool [m] or [m, A], optional
            Which examples count (members of a group, accepted predictions). The others are
            passed over: no stake, no change.
        """
        values = np.asarray(losses)
        columns = np.arange(len(self._sum)) if levels is None else np.asarray(levels)
        mask = None
        if counted is not None:
            mask = np.asarray(counted, dtype=bool)
            mask = np.broadcast_to(mask[:, None] if mask.ndim == 1 else mask, values.shape)
        for first in range(0, len(values), _BLOCK):
            rows = slice(first, first + _BLOCK)
            self._bet(
                values[rows].astype(np.float64), columns, None if mask is None else mask[rows]
            )

    def _bet(
        self, losses: FloatArray, columns: NDArray[np.int64], mask: NDArray[np.bool_] | None
    ) -> None:
        alpha = self._alpha[columns]
        seen = self._seen[columns] + np.arange(1, len(losses) + 1)[:, None]
        if mask is None:
            earlier = self._count[columns] + np.arange(len(losses))[:, None]
            steps = earlier + 1
            counted_losses = losses
        else:
            steps = self._count[columns] + np.cumsum(mask, axis=0)
            earlier = steps - mask
            counted_losses = np.where(mask, losses, 0.0)
        # Of the examples planned, so many will count if the share stays what it was before.
        planned = self._planned * (earlier + 1) / seen
        sums = self._sum[columns] + np.cumsum(counted_losses, axis=0)
        means = (0.5 + sums) / (1.0 + steps)
        squares = (losses - means) ** 2
        if mask is not None:
            squares *= mask
        deviations = self._deviation[columns] + np.cumsum(squares, axis=0)
        variances = (0.25 + deviations) / (1.0 + steps)
        # Predictable: the stake on example i uses the variance before it.
        before = np.empty_like(variances)
        before[0] = (0.25 + self._deviation[columns]) / (1.0 + self._count[columns])
        before[1:] = variances[:-1]
        stakes = np.sqrt(2.0 * self._log_target / (planned * before))
        stakes = np.minimum(stakes, self._cap[columns])
        gains = np.log1p(stakes * (alpha - losses))
        if mask is not None:
            gains *= mask
        wealth = self._log_wealth[columns] + np.cumsum(gains, axis=0)

        self._seen[columns] = seen[-1]
        self._count[columns] = steps[-1]
        self._sum[columns] = sums[-1]
        self._deviation[columns] = deviations[-1]
        self._log_wealth[columns] = wealth[-1]
        self._log_peak[columns] = np.maximum(self._log_peak[columns], wealth.max(axis=0))
