"""Values that thousands of draws ask for again and again, computed once per process."""

from __future__ import annotations

import functools

from confprune.risk import bounds, spending, sum_pvalues
from confprune.risk.binomial_tail import build_binomial_tail


@functools.cache
def remember_pure_functions() -> None:
    """Give the tests a memory for binomial laws.

    Calibration asks for few of them, and needs none; nothing but the speed changes.
    """
    tail = functools.cache(build_binomial_tail)
    sum_pvalues.binomial_tail = bounds.binomial_tail = tail
    spending.binomial_probabilities = functools.cache(spending.binomial_probabilities)
