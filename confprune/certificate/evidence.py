"""The parts of a certificate: how it prunes, its risks one by one, and its early looks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ORDERS = ("permuted", "given")
SCORE_SOURCES = ("split", "given")


@dataclass(frozen=True)
class ScoreData:
    """The data that scores were made from, none of which calibrated.

    Where several criteria were candidates, those of another than the certified one, perhaps.

    Attributes
    ----------
    source : {"split", "given"}
        Taken off the calibration data, the first examples in the order of the certificate's seed;
        or a set of its own.
    examples : int or None
        How many; None where a given set did not say.
    """

    source: str
    examples: int | None

    def __post_init__(self) -> None:
        if self.source not in SCORE_SOURCES:
            raise ValueError(
                f"score_data: source is {self.source!r}, not one of {list(SCORE_SOURCES)}"
            )
        if self.examples is None and self.source == "split":
            raise ValueError("score_data: a split has a number of examples")
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"score_data: examples is {self.examples}, fewer than one")

    @property
    def taken(self) -> int:
        """Examples taken off the calibration data."""
        return (self.examples or 0) if self.source == "split" else 0


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
        `confprune.certificate.fingerprint.fingerprint` of these parameters before pruning.
    total : int
        Number of prunable weights.
    network : int or None
        Number of all values in the parameters of the network, shared ones once; None in
        certificates of before.
    pattern : str or None
        What is pruned together; None for single weights.
    inputs_first : dict of str to int
        Parameters whose inputs come first, with their groups.
    statistics : dict
        Fingerprints of what the criterion needed beside the weights, by statistic.
    score_data : ScoreData or None
        The data that statistics were measured on; with several criteria perhaps another's.
    kept : mapping
        The statistics themselves, as long as the certificate is in memory; not in its file.
    """

    scope: str
    criterion: str
    parameters: tuple[str, ...]
    fingerprint: dict[str, dict[str, Any]] = field(repr=False)
    total: int
    pattern: str | None = None
    inputs_first: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict, repr=False)
    score_data: ScoreData | None = None
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    network: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        if set(self.parameters) != set(self.fingerprint):
            raise ValueError("pruning: parameters and fingerprint name different parameters")
        total = sum(math.prod(entry["shape"]) for entry in self.fingerprint.values())
        if self.total != total:
            raise ValueError(f"pruning: total is {self.total}, but the shapes add up to {total}")
        if self.network is not None and self.network < total:
            raise ValueError(f"pruning: network is {self.network}, fewer than the {total} in total")


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "counts", tuple(int(count) for count in self.counts))
        levels = len(self.counts)
        where = f"part {self.name!r}: "
        for name in ("risks", "pvalues", "bounds"):
            values = plain_floats(getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != levels:
                raise ValueError(f"{where}{name} has {len(values)} values for {levels} counts")
            check_unit(where + name, values)
        if not 0 < self.alpha < 1:
            raise ValueError(f"{where}alpha is {self.alpha}, outside (0, 1)")
        if min(self.counts, default=0) < 0:
            raise ValueError(f"{where}counts has the value {min(self.counts)}, below 0")

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
        Numbers of examples at the looks; the last is all of them.
    spending : tuple of float
        The part of delta spent at each.
    seen : tuple of int, length K
        Examples on which each level was tested: the first so many in the order of testing.
    evaluations : int
        Pairs (example, candidate) that the tests needed, those of other ways of pruning included.
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

    def __post_init__(self) -> None:
        for name in ("sizes", "seen"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        object.__setattr__(self, "spending", plain_floats(self.spending))
        object.__setattr__(self, "evaluations", int(self.evaluations))
        object.__setattr__(self, "saved", float(self.saved))
        sizes = self.sizes
        if not sizes or sizes[0] < 1 or any(b <= a for a, b in itertools.pairwise(sizes)):
            raise ValueError(f"looks: sizes must increase from at least 1, got {list(sizes)}")
        if len(self.spending) != len(sizes):
            raise ValueError(
                f"looks: spending has {len(self.spending)} values for {len(sizes)} sizes"
            )
        check_unit("looks: spending", self.spending)
        if not all(0 <= count <= sizes[-1] for count in self.seen):
            raise ValueError(f"looks: seen must lie between 0 and {sizes[-1]}, the last size")
        if self.evaluations < sum(self.seen):
            raise ValueError(
                f"looks: evaluations is {self.evaluations}, fewer than the {sum(self.seen)} seen"
            )
        if not 0 <= self.saved <= 1:
            raise ValueError(f"looks: saved is {self.saved}, outside [0, 1]")
        if self.order not in ORDERS:
            raise ValueError(f"looks: order is {self.order!r}, not one of {list(ORDERS)}")


def closest(parts: Sequence[Part], level: int) -> list[int]:
    """The parts from the closest to its alpha at a level to the furthest.

    That is from the largest p-value to the smallest. Risks that were given up early share the
    p-value 1: how many standard deviations the risk is above alpha tells them apart.

    Examples
    --------
    >>> common = Part("harm", "binomial", 0.1, "common", (900,), (0.04,), (0.001,), (0.05,))
    >>> rare = Part("harm", "binomial", 0.1, "rare", (60,), (0.09,), (0.45,), (0.16,))
    >>> closest([common, rare], level=0)
    [1, 0]
    """

    def closeness(index: int) -> tuple[float, float]:
        part = parts[index]
        pvalue, count, alpha = part.pvalues[level], part.counts[level], part.alpha
        excess = part.risks[level] - alpha if count else 0.0
        return pvalue, excess * math.sqrt(count / (alpha * (1 - alpha)))

    return sorted(range(len(parts)), key=closeness, reverse=True)


def binding_part(parts: Sequence[Part], rejected: Sequence[bool]) -> int:
    """The part that stopped the first tested level beyond the sparsest certified one.

    Where the grid ends before any level fails: the part that came closest at the last one tested.

    Examples
    --------
    >>> common = Part("harm", "binomial", 0.1, "common", (900,), (0.04,), (0.001,), (0.05,))
    >>> rare = Part("harm", "binomial", 0.1, "rare", (60,), (0.09,), (0.45,), (0.16,))
    >>> binding_part([common, rare], rejected=[False])
    1
    """
    tested = [j for j in range(len(rejected)) if not math.isnan(parts[0].pvalues[j])]
    obstacle = first_obstacle(tested, rejected)
    return closest(parts, tested[-1] if obstacle is None else obstacle)[0]


def first_obstacle(tested: Sequence[int], rejected: Sequence[bool]) -> int | None:
    """The first tested level beyond the sparsest rejected one, None if there is none."""
    last = max((j for j in tested if rejected[j]), default=-1)
    return next((j for j in tested if j > last), None)


def plain_floats(values: Iterable[Any]) -> tuple[float, ...]:
    """Values as plain floats, every NaN the same object, so that equal tuples compare equal."""
    return tuple(math.nan if value != value else float(value) for value in values)


def check_unit(name: str, values: Iterable[float]) -> None:
    """Raise ValueError for a value outside [0, 1]; NaN stands for one that was not measured."""
    for value in values:
        if not (0 <= value <= 1 or math.isnan(value)):
            raise ValueError(f"{name} has the value {value}, outside [0, 1]")
