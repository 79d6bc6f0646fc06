"""The parts of a certificate: how it prunes, its risks one by one, and its early looks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pruning:
    """How the levels of a certificate prune, and the weights that they were made from.

    Attributes
    ----------
    scope : str
        What competes with what, such as ``"global"``.
    criterion : str
        What a weight's score is, such as ``"magnitude"``.
    parameters : tuple of str
        Names of the prunable parameters, in the model's order.
    fingerprint : dict
        `confprune.fingerprint.fingerprint` of these parameters before pruning.
    total : int
        Number of prunable weights.
    """

    scope: str
    criterion: str
    parameters: tuple[str, ...]
    fingerprint: dict[str, dict[str, Any]]
    total: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        if set(self.parameters) != set(self.fingerprint):
            raise ValueError("pruning: parameters and fingerprint name different parameters")
        total = sum(math.prod(entry["shape"]) for entry in self.fingerprint.values())
        if self.total != total:
            raise ValueError(f"pruning: total is {self.total}, but the shapes add up to {total}")


@dataclass(frozen=True)
class Part:
    """One of several risks that are kept at once: a loss, perhaps on a group of the examples.

    Attributes
    ----------
    loss, pvalue : str
    alpha : float
    group : str or None
        The group whose examples count; None for all.
    counts : tuple of int, length K
        Examples of each level that count.
    risks, pvalues, bounds : tuple of float, length K
        As in `Certificate`; NaN where nothing counted.
    """

    loss: str
    pvalue: str
    alpha: float
    group: str | None
    counts: tuple[int, ...]
    risks: tuple[float, ...]
    pvalues: tuple[float, ...]
    bounds: tuple[float, ...]

    @property
    def name(self) -> str:
        """The loss, and its group if it has one."""
        return self.loss if self.group is None else f"{self.loss}, group {self.group}"


@dataclass(frozen=True)
class Looks:
    """Early looks: when the levels were tested, and what that saved.

    Attributes
    ----------
    sizes : tuple of int
        Numbers of examples at the looks.
    spending : tuple of float
        The part of delta spent at each.
    seen : tuple of int, length K
        Examples on which each level was evaluated.
    evaluations : int
        Pairs (example, level) evaluated.
    saved : float
        Share of all pairs that was not needed.
    order : str
        "permuted" (with the certificate's seed), or "given".
    """

    sizes: tuple[int, ...]
    spending: tuple[float, ...]
    seen: tuple[int, ...]
    evaluations: int
    saved: float
    order: str
