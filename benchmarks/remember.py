"""Values that thousands of draws ask for again and again, computed once per process."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from confprune.risk import bounds, spending, sum_pvalues
from confprune.risk.binomial_tail import build_binomial_tail


@functools.cache
def remember_pure_functions() -> None:
    """Give the tests a memory for critical sums and binomial laws.

    Calibration asks for few of them, and needs none; nothing but the speed changes.
    """
    tail = functools.cache(build_binomial_tail)
    sum_pvalues.binomial_tail = bounds.binomial_tail = tail
    critical_sum = functools.cache(spending.critical_sum)

    def remembered(n: NDArray[np.int64], *arguments: Any) -> NDArray[np.float64]:
        return np.array([critical_sum(int(count), *arguments) for count in n])

    spending.critical_sum = remembered
    spending.binomial_probabilities = functools.cache(spending.binomial_probabilities)
