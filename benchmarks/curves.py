"""Risk curves over a grid of sparsities, and losses drawn from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.float64]

SPARSITIES: FloatArray = np.arange(100) / 100

CURVES: Mapping[str, FloatArray] = MappingProxyType(
    {
        "steep": 0.002 + 0.6 / (1 + np.exp(-(SPARSITIES - 0.9) / 0.02)),
        "shallow": 0.002 + 0.12 * SPARSITIES**3,
        "non-monotone": 0.004 + 0.02 * np.sin(25 * SPARSITIES) ** 2 + 0.25 * SPARSITIES**6,
    }
)
"""Risks [K] by name: what pruning does to most networks, to robust ones, and to odd ones."""

HARD_CURVES: Mapping[str, FloatArray] = MappingProxyType(
    {
        "bump": 0.002 + 0.040 * np.exp(-(((SPARSITIES - 0.5) / 0.06) ** 2)) + 0.3 * SPARSITIES**10,
        "linear": 0.002 + 0.1 * SPARSITIES,
    }
)
"""Curves that early looks find hard: risks stay just below alpha = 0.05, or linger around it."""

LOSS_PARTS: Mapping[str, int] = MappingProxyType({"0/1": 1, "share of 8": 8})
"""Families of losses: an example fails or not, or a share of its 8 parts (tokens, pixels) does."""


class NestedLosses:
    """Losses of examples at all levels: a part that fails fails at every level of larger risk.

    Parameters
    ----------
    risks : ndarray [K]
        Expected loss of each level.
    parts : int
        Parts of an example; its loss is the share of those that fail.
    """

    def __init__(self, risks: FloatArray, parts: int = 1) -> None:
        self.risks = risks
        self.parts = parts
        self._order = np.argsort(risks, kind="stable")
        self._bins = np.diff(np.concatenate([[0.0], risks[self._order], [1.0]]))

    def sums(self, size: int, rng: np.random.Generator) -> FloatArray:
        """Sums [K] of the losses of `size` new examples, without drawing them one by one."""
        sums = np.empty(len(self.risks))
        sums[self._order] = rng.multinomial(size * self.parts, self._bins)[:-1].cumsum()
        return sums / self.parts

    def losses(self, size: int, rng: np.random.Generator) -> FloatArray:
        """Losses [size, K] of `size` new examples."""
        failed = np.zeros((size, len(self.risks)), dtype=np.uint8)
        for _ in range(self.parts):
            failed += rng.random((size, 1)) < self.risks
        return failed / self.parts


def clopper_pearson(events: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval for a probability."""
    tail = (1.0 - level) / 2.0
    low = float(stats.beta.ppf(tail, events, trials - events + 1)) if events else 0.0
    high = (
        float(stats.beta.ppf(1.0 - tail, events + 1, trials - events)) if events < trials else 1.0
    )
    return low, high


def standard_error(values: FloatArray) -> float:
    """Standard error of the mean of independent values, at least two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
