"""What is asked of a calibration: its settings, and whether they fit together and the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from confprune.batches import (
    check_independent,
    example_count,
    order_length,
    ordering_size,
    permutable,
)
from confprune.certificate.evidence import ScoreData
from confprune.losses import Loss
from confprune.risk.bounds import required_n
from confprune.risk.inputs import check_probability
from confprune.risk.looks import LookPlan, default_looks
from confprune.risk.procedures import Procedure
from confprune.risk.pvalues import PVALUES
from confprune.risk.sequential import looks_possible
from confprune.risks import Groups, Risk, Target, resolve_targets

GUARANTEES = ("risk", "expectation", "monotone")
ORDERS = ("random", "given")


@dataclass(frozen=True)
class Question:
    """What is to be certified, and how. The fields are the arguments of `confprune.calibrate`.

    But for `score_data`: what the certificate says of the data that scores are made from.
    """

    risks: tuple[Risk, ...]
    delta: float
    groups: Groups | None
    accept: Loss | None
    pvalue: str
    procedure: Procedure
    looks: LookPlan | str | None
    order: str
    guarantee: str
    seed: int
    score_data: ScoreData | None = None

    @property
    def scored(self) -> int:
        """Examples taken off the data for scores: the first so many in the random order."""
        return 0 if self.score_data is None else self.score_data.taken

    @property
    def alpha(self) -> float:
        """The smallest risk allowed."""
        return min(risk.alpha for risk in self.risks)

    @property
    def measures(self) -> list[Loss]:
        """What is computed of the outputs: the losses, then the acceptance if asked for."""
        losses = [risk.loss for risk in self.risks]
        return losses if self.accept is None else [*losses, self.accept]

    def check(self, data: Any, ways: int) -> None:
        """Raise ValueError for settings that contradict each other or the data."""
        for name, value, valid in (
            ("guarantee", self.guarantee, GUARANTEES),
            ("order", self.order, ORDERS),
        ):
            if value not in valid:
                raise ValueError(f"{name} {value!r} is unknown; choose from {list(valid)}")
        if not (self.looks is None or self.looks == "auto" or isinstance(self.looks, LookPlan)):
            raise ValueError(f"looks must be 'auto', a LookPlan or None, got {self.looks!r}")
        if self.guarantee != "expectation":
            check_probability("delta", self.delta)
        needs = self.procedure.needs
        if needs not in ((), ("order",)):
            raise ValueError(needs_more(self.procedure))
        targets = resolve_targets(self.risks, None, self.pvalue, early=False)
        if self.guarantee != "risk":
            self._check_plain(ways)
        if isinstance(self.looks, LookPlan):
            self._check_plan(self.looks, data, ways)
        check_independent(data)
        self._check_order(data, targets, ways)
        count = self._count(data)
        if count is not None:
            self.check_enough(count)

    def check_procedure(self, candidates: int) -> None:
        """Raise for a procedure of the caller's own that does not do, before the work."""
        if self.guarantee == "risk" and not self.procedure.needs:
            self.procedure.test(np.ones(candidates), self.delta)

    def check_enough(self, n: int, group: str | None = None) -> None:
        """Raise ValueError where `n` examples cannot certify even a zero loss."""
        if self.guarantee != "expectation":
            check_enough(n, self.alpha, self.delta, group)

    def check_groups(self, labels: Iterable[str]) -> list[str]:
        """The groups among these labels, each of them large enough."""
        sizes = Counter(labels)
        for group, size in sorted(sizes.items()):
            self.check_enough(size, group)
        return sorted(sizes)

    def _check_plain(self, ways: int) -> None:
        extras = {
            "risks": len(self.risks) > 1,
            "groups": self.groups is not None,
            "accept": self.accept is not None,
            "looks": isinstance(self.looks, LookPlan),
            "several scopes or criteria": ways > 1,
        }
        for name, given in extras.items():
            if given:
                raise ValueError(
                    f"guarantee={self.guarantee!r} is for one risk on all examples; leave out "
                    f"{name}, or use guarantee='risk'"
                )

    def _check_plan(self, plan: LookPlan, data: Any, ways: int) -> None:
        if not looks_possible(self.procedure, self.pvalue):
            raise ValueError(
                f"looks cannot be taken with procedure {self.procedure.name!r} and pvalue "
                f"{self.pvalue!r}: pass looks=None, or a procedure and a p-value by name that "
                "can be tested early"
            )
        if abs(plan.delta - self.delta) > 1e-12:
            raise ValueError(
                f"looks were planned for delta={plan.delta:g}, but delta={self.delta:g}; plan them "
                "for the same"
            )
        count = self._count(data)
        if count is not None:
            plan.check_n(count - (ordering_size(count) if ways > 1 else 0))

    def _count(self, data: Any) -> int | None:
        """The number of examples that calibrate, where it is known."""
        count = order_length(data) if permutable(data) else example_count(data)
        return None if count is None else count - self.scored

    def _check_order(self, data: Any, targets: Sequence[Target], ways: int) -> None:
        """Refuse to take the order of the data for random unless the caller says so."""
        if permutable(data) or self.order == "given":
            return
        anytime = any(PVALUES[target.pvalue].anytime for target in targets)
        for setting, given in (
            ("looks=", isinstance(self.looks, LookPlan)),
            (f"pvalue={self.pvalue!r}", anytime),
            ("more than one scope or criterion", ways > 1),
        ):
            if given:
                raise ValueError(
                    f"{setting} needs the examples in random order, and this data cannot be "
                    "permuted; give a map-style Dataset or tensors, or order='given' if the order "
                    "is random already"
                )

    def looks_early(self, n: int | None, *, random: bool) -> bool:
        """Whether to look early at n examples (None: not known) in random order."""
        if self.looks != "auto":
            return self.looks is not None
        return n is not None and random and looks_possible(self.procedure, self.pvalue)

    def plan(self, n: int | None, targets: Sequence[Target]) -> LookPlan:
        """The looks at n examples."""
        if isinstance(self.looks, LookPlan):
            return self.looks
        assert n is not None
        exact = {target.pvalue for target in targets} <= {"binomial", "betting"}
        return default_looks(n, self.alpha, self.delta, "binomial" if exact else "convex")


def check_enough(n: int, alpha: float, delta: float, group: str | None = None) -> None:
    """Raise ValueError, with the number needed, where n examples cannot certify a zero loss."""
    needed = required_n(alpha, delta)
    if n >= needed:
        return
    who = "" if group is None else f" of group {group!r}"
    way_out = "give more examples, or raise alpha or delta"
    if group is not None:
        way_out += ", or merge the group with another"
    raise ValueError(
        f"{n} examples{who} cannot certify even a zero loss at alpha={alpha:g}, "
        f"delta={delta:g}; at least {needed} are needed: {way_out}"
    )


def needs_more(procedure: Procedure) -> str:
    """What to tell a caller whose procedure cannot run by its name alone."""
    return (
        f"procedure {procedure.name!r} needs {', '.join(procedure.needs)}: pass "
        f"functools.partial(confprune.risk.testing.{procedure.name}, "
        f"{', '.join(f'{name}=...' for name in procedure.needs)})"
    )
