"""Plans for early looks: when to test while the losses come in, and what each look may spend.

Most levels are clear after a few dozen examples. At looks fixed in advance each level is tested at
a part of delta; see `confprune.risk.sequential` for the test itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from confprune.risk.bounds import required_n
from confprune.risk.inputs import check_probability

FUTILITY = 0.03
"""Chance, at each look, of giving up a level that the last look would just have rejected."""

EXACT_FUTILITY = 0.015
"""The same where looks are close, as they are if they are paid for exactly or free."""


@dataclass(frozen=True)
class LookPlan:
    """When to look, and what each look may spend. Fixed before the first loss is seen.

    Parameters
    ----------
    sizes : tuple of int
        Numbers of examples n_1 < ... < n_L at the looks; the last is all of them.
    spending : tuple of float
        delta_1, ..., delta_L: error spent at each look, with sum at most `delta`. A look that
        spends nothing only gives up hopeless levels.
    delta : float
        Error level of the whole test, in (0, 1).
    futility : float
        At each look, a level is given up if its sum would exceed the present one with at
        most this probability even if it came out just small enough in the end. Giving up costs
        a little power and no validity. 0: only levels that cannot be rejected any more.

    Raises
    ------
    ValueError
        If the sizes do not increase, the numbers do not match, or the spending exceeds delta.

    Examples
    --------
    >>> plan = LookPlan((125, 250, 500), (0.01, 0.02, 0.07), delta=0.1)
    >>> plan.n
    500
    >>> LookPlan((125, 250, 500), (0.05, 0.05, 0.05), delta=0.1)
    Traceback (most recent call last):
        ...
    ValueError: looks spend 0.15 in all, more than delta = 0.1; lower the spending
    """

    sizes: tuple[int, ...]
    spending: tuple[float, ...]
    delta: float
    futility: float = FUTILITY

    def __post_init__(self) -> None:
        check_probability("delta", self.delta)
        if not self.sizes or len(self.sizes) != len(self.spending):
            raise ValueError(
                f"looks need one spending per size, got {len(self.sizes)} sizes and "
                f"{len(self.spending)} spendings"
            )
        if self.sizes[0] < 1 or any(
            later <= earlier for earlier, later in zip(self.sizes, self.sizes[1:], strict=False)
        ):
            raise ValueError(f"look sizes must increase from at least 1, got {self.sizes}")
        total = math.fsum(self.spending)
        if not all(spent >= 0.0 for spent in self.spending) or total == 0.0:
            raise ValueError(f"looks must spend something and nothing negative: {self.spending}")
        if total > self.delta * (1.0 + 1e-12):
            raise ValueError(
                f"looks spend {total:.6g} in all, more than delta = {self.delta:.6g}; "
                "lower the spending"
            )
        if not 0.0 <= self.futility < 0.5:
            raise ValueError(f"futility must lie in [0, 0.5), got {self.futility}")

    @property
    def n(self) -> int:
        """Number of examples at the last look."""
        return self.sizes[-1]

    def check_n(self, n: int) -> None:
        """Raise ``ValueError`` unless the last look is at n, the number of examples there are."""
        if self.n != n:
            raise ValueError(
                f"the last look is at {self.n} examples but there are {n}; "
                "looks must end at the number of examples"
            )


def default_looks(n: int, alpha: float, delta: float, pvalue: str = "binomial") -> LookPlan:
    """A plan that saves most of the work at little cost in sparsity.

    Parameters
    ----------
    n : int
        Number of examples.
    alpha : float
        Risk allowed; with several, the smallest.
    delta : float
        Error level, in (0, 1).
    pvalue : str
        The p-value in use: it decides what looking often costs.

    Returns
    -------
    LookPlan
        Sizes grow by a constant factor, from one and a half times or twice the smallest number of
        examples that can certify anything up to n. With fewer examples, one look at n.

    Notes
    -----
    Chosen by simulation on steep, shallow and non-monotone risk curves with n from 1000 to 20000,
    see benchmarks/looks.py. Where looking is paid for exactly (`binomial`) or free (`betting`),
    looks are close, start soon, and most of delta is spent before the last, the more the earlier;
    which hardly hurts, for a level that would pass at the end mostly passes before. Where each
    look is paid in full, they are fewer and cheaper.

    Examples
    --------
    >>> default_looks(1000, alpha=0.05, delta=0.1).sizes[:10]
    (71, 79, 89, 100, 112, 125, 141, 158, 177, 199)
    """
    exact = pvalue in ("binomial", "betting")
    doublings = 1 / 6 if exact else 1 / 2  # from one look to the next
    early, slope = (0.75, -0.25) if exact else (0.3, 0.0)
    smallest = (1.5 if exact else 2.0) * required_n(alpha, delta)
    steps = math.floor(math.log2(n / smallest) / doublings) if n >= smallest else 0
    sizes = sorted({math.ceil(n * 2.0 ** (-doublings * step)) for step in range(steps + 1)})
    weights = [size**slope for size in sizes[:-1]]
    if not weights:
        return LookPlan((n,), (delta,), delta)
    spending = [early * delta * weight / math.fsum(weights) for weight in weights]
    spending.append(delta - math.fsum(spending))
    futility = EXACT_FUTILITY if exact else FUTILITY
    return LookPlan(tuple(sizes), tuple(spending), delta, futility=min(futility, 0.5 / len(sizes)))
