"""From settings, data and ways of pruning to a certificate."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from confprune.batches import (
    Forward,
    batches,
    example_count,
    order_length,
    ordering_size,
    permutable,
    random_order,
)
from confprune.certificate import Certificate
from confprune.certificate.evidence import Looks, Part, Pruning, binding_part
from confprune.certificate.fingerprint import fingerprint
from confprune.evaluation import Evaluation, Findings, early_test, evaluate_all, fixed_test
from confprune.grid import GridForward
from confprune.levels import PruneLevels
from confprune.losses import Loss
from confprune.risk.bounds import required_n
from confprune.risk.control import conformal_risk_control, monotonise, rcps
from confprune.risk.inputs import FloatArray, IntArray, check_probability, loss_sums
from confprune.risk.looks import LookPlan, default_looks
from confprune.risk.pvalues import PVALUES
from confprune.risk.testing import Procedure, pareto_order, resolve_procedure
from confprune.risks import Groups, Risk, Target, group_labels, resolve_targets

GUARANTEES = ("risk", "expectation", "monotone")
ORDERS = ("random", "given")


@dataclass(frozen=True)
class Question:
    """What is to be certified, and how. The fields are the arguments of `confprune.calibrate`."""

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
        self._check_order(data, targets, ways)
        count = _count(data)
        if count is not None:
            self.check_enough(count)

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
        if abs(plan.delta - self.delta) > 1e-12:
            raise ValueError(
                f"looks were planned for delta={plan.delta:g}, but delta={self.delta:g}; plan them "
                "for the same"
            )
        count = _count(data)
        if count is not None:
            plan.check_n(count - (ordering_size(count) if ways > 1 else 0))

    def _check_order(self, data: Any, targets: Sequence[Target], ways: int) -> None:
        """Refuse to take the order of the data for random unless the caller says so."""
        if permutable(data) or self.order == "given":
            return
        anytime = any(PVALUES[target.pvalue].anytime for target in targets)
        for setting, given in (
            ("looks", isinstance(self.looks, LookPlan)),
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
        asymptotic = self.pvalue in PVALUES and PVALUES[self.pvalue].asymptotic
        sequential = self.procedure.chain or self.procedure.bonferroni_start
        return n is not None and random and sequential and not asymptotic

    def plan(self, n: int | None, targets: Sequence[Target]) -> LookPlan:
        """The looks at n examples."""
        if isinstance(self.looks, LookPlan):
            return self.looks
        assert n is not None
        exact = {target.pvalue for target in targets} <= {"binomial", "betting"}
        return default_looks(n, self.alpha, self.delta, "binomial" if exact else "convex")


def certify(
    question: Question,
    model: nn.Module,
    data: Any,
    ways: Sequence[PruneLevels],
    *,
    forward: Forward | None,
    batch_size: int | None,
    activation_bytes: int,
    progress: bool,
) -> Certificate:
    """Evaluate, test, and write down what may be claimed."""
    grids = [
        GridForward(
            model, levels, question.measures, forward=forward, activation_bytes=activation_bytes
        )
        for levels in ways
    ]
    losses = [risk.loss for risk in question.risks]
    order = random_order(data, question.seed) if permutable(data) else None
    names = _group_names(question, data, batch_size)
    candidates = [(g, j) for g, levels in enumerate(ways) for j in range(len(levels))]
    notes: list[str] = []
    run = _Run(question, model, data, grids, losses, names, order, batch_size, progress)
    if question.guarantee != "risk":
        certificate = run.control(ways[0])
    else:
        if run.procedure.needs or (len(ways) > 1 and run.procedure.chain):
            candidates, note = run.ordered(candidates, ways)
            notes.append(note)
        certificate = run.tested(candidates, ways)
    if order is None and question.order == "given" and certificate.looks is not None:
        note = "the order of the examples was taken as given, and for a random one"
        warnings.warn(note, UserWarning, stacklevel=3)
        notes.append(note)
    for grid in grids:
        notes += grid.notes
    return replace(certificate, notes=(*certificate.notes, *dict.fromkeys(notes)))


class _Run:
    """One calibration: the question, and everything that is read to answer it."""

    def __init__(
        self,
        question: Question,
        model: nn.Module,
        data: Any,
        grids: Sequence[GridForward],
        losses: Sequence[Loss],
        groups: Sequence[str] | None,
        order: Tensor | None,
        batch_size: int | None,
        progress: bool,
    ) -> None:
        self.question = question
        self.model = model
        self.data = data
        self.grids = grids
        self.losses = losses
        self.groups = groups
        self.order = order
        self.reading: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        self.procedure = question.procedure

    def evaluation(self, candidates: Sequence[tuple[int, int]]) -> Evaluation:
        question = self.question
        return Evaluation(
            self.model, self.grids, candidates, self.losses, question.accept, question.groups
        )

    def ordered(
        self, candidates: Sequence[tuple[int, int]], ways: Sequence[PruneLevels]
    ) -> tuple[list[tuple[int, int]], str]:
        """The candidates worth testing, in an order learned on a part of the data set aside."""
        if self.order is None:
            raise ValueError(
                "several scopes or criteria, or procedure='split_fixed_sequence', set a part of "
                "the examples aside and need a map-style Dataset or tensors"
            )
        size = ordering_size(len(self.order))
        self.question.check_enough(len(self.order) - size)
        self.procedure = resolve_procedure("split_fixed_sequence")
        evaluation = self.evaluation(candidates)
        evidence = evaluate_all(evaluation, self.data, order=self.order[:size], **self.reading)
        self.order = self.order[size:]
        sparsities = [ways[g].sparsities[j] for g, j in candidates]
        alphas = [risk.alpha for risk in self.question.risks]
        front = pareto_order(list(evidence.losses), alphas, sparsities)
        tried = ", ".join(f"{levels.criterion} ({levels.scope})" for levels in ways)
        note = (
            f"the order of testing was learned on {size:,} other examples, among {tried}; the "
            f"{len(front)} candidates on the Pareto front were tested"
        )
        return [candidates[c] for c in front], note

    def tested(
        self, candidates: Sequence[tuple[int, int]], ways: Sequence[PruneLevels]
    ) -> Certificate:
        """The certificate of the best candidate that passes."""
        question = self.question
        evaluation = self.evaluation(candidates)
        random = self.order is not None or question.order == "given"
        count = example_count(self.data) if self.order is None else len(self.order)
        early = question.looks_early(count, random=random)
        targets = resolve_targets(question.risks, self.groups, question.pvalue, early=early)
        plan = question.plan(count, targets) if early else None
        if plan is not None and self.groups is None and question.groups is not None:
            raise ValueError(
                "groups with looks need data that can be read twice; give a map-style Dataset, "
                "tensors or a DataLoader, or looks=None"
            )
        if plan is not None:
            findings = early_test(
                evaluation,
                self.data,
                targets,
                plan,
                self.procedure,
                order=self.order,
                **self.reading,
            )
            n = plan.n
        else:
            evidence = evaluate_all(evaluation, self.data, order=self.order, **self.reading)
            n = evidence.losses.shape[1]
            question.check_enough(n)
            if evidence.labels is not None and self.groups is None:
                targets = self._late_targets(evidence.labels)
            findings = fixed_test(evidence, self.losses, targets, question.delta, self.procedure)
        return self._certificate(findings, targets, candidates, ways, plan, n)

    def control(self, levels: PruneLevels) -> Certificate:
        """The certificate of conformal risk control, or of monotone upper bounds."""
        question, risk = self.question, self.question.risks[0]
        evaluation = self.evaluation([(0, j) for j in range(len(levels))])
        evidence = evaluate_all(evaluation, self.data, order=self.order, **self.reading)
        matrix = evidence.losses[0]
        question.check_enough(len(matrix))
        [target] = resolve_targets(question.risks, None, question.pvalue, early=False)
        unknown = (math.nan,) * len(levels)
        expectation = question.guarantee == "expectation"
        if expectation:
            found = conformal_risk_control(matrix, risk.alpha)
        else:
            found = rcps(matrix, risk.alpha, question.delta, target.pvalue)
        last = -1 if found.level is None else found.level
        return Certificate(
            sparsities=levels.sparsities,
            alpha=risk.alpha,
            delta=question.delta,
            n=len(matrix),
            loss=risk.loss.name,
            pvalue=target.pvalue,
            procedure="conformal_risk_control" if expectation else "rcps",
            risks=tuple(loss_sums(monotonise(matrix)) / len(matrix)),
            pvalues=unknown,
            bounds=tuple(found.bounds),
            rejected=tuple(j <= last for j in range(len(levels))),
            pruning=pruning_of(self.model, levels),
            seed=question.seed,
            versions=versions(),
            guarantee=question.guarantee,
        )

    def _late_targets(self, labels: np.ndarray) -> list[Target]:
        """The targets where the groups could not be known before the data had been read."""
        groups = self.question.check_groups(labels.tolist())
        return resolve_targets(self.question.risks, groups, self.question.pvalue, early=False)

    def _certificate(
        self,
        findings: Findings,
        targets: Sequence[Target],
        candidates: Sequence[tuple[int, int]],
        ways: Sequence[PruneLevels],
        plan: LookPlan | None,
        n: int,
    ) -> Certificate:
        question, result = self.question, findings.result
        grid_of, level_of = np.array(candidates).T
        sparsities = np.array([ways[g].sparsities[j] for g, j in candidates])
        passed = np.flatnonzero(result.rejected)
        way = int(grid_of[passed[np.argmax(sparsities[passed])]]) if len(passed) else 0
        mine = grid_of == way
        columns, levels = np.flatnonzero(mine), ways[way]

        def spread(values: Any, empty: Any = np.nan) -> Any:
            """Values of the tested candidates as values of the whole grid."""
            whole = np.full(len(levels), empty)
            whole[level_of[columns]] = np.asarray(values)[columns]
            return tuple(whole.tolist())

        parts = tuple(
            Part(
                loss=target.risk.loss.name,
                pvalue=target.pvalue,
                alpha=target.risk.alpha,
                group=target.group,
                counts=spread(result.counts[r], 0),
                risks=spread(_means(result.sums[r], result.counts[r])),
                pvalues=spread(result.pvalues_by_risk[r]),
                bounds=spread(findings.bounds[r]),
            )
            for r, target in enumerate(targets)
        )
        rejected = spread(result.rejected, False)
        binding = parts[binding_part(parts, rejected)]
        looks = None
        if plan is not None:
            looks = Looks(
                sizes=plan.sizes,
                spending=plan.spending,
                seen=spread(result.seen, 0),
                evaluations=result.evaluations,
                saved=result.saved,
                order="given" if self.order is None else "permuted",
            )
        rates = findings.acceptance
        return Certificate(
            sparsities=levels.sparsities,
            alpha=binding.alpha,
            delta=question.delta,
            n=n,
            loss=binding.loss,
            pvalue=binding.pvalue,
            procedure=self.procedure.name,
            risks=binding.risks,
            pvalues=spread(result.pvalues),
            bounds=binding.bounds,
            rejected=rejected,
            pruning=pruning_of(self.model, levels),
            seed=question.seed,
            versions=versions(),
            parts=parts if len(parts) > 1 else (),
            looks=looks,
            accept=None if question.accept is None else question.accept.name,
            acceptance=None if rates is None else spread(rates),
        )


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


def pruning_of(model: nn.Module, levels: PruneLevels) -> Pruning:
    """How these levels prune this model, with the fingerprint of its weights."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return Pruning(
        scope=levels.scope,
        criterion=levels.criterion,
        parameters=tuple(levels.levels),
        fingerprint=fingerprint({name: parameters[name] for name in levels.levels}),
        total=levels.total,
    )


def versions() -> dict[str, str]:
    """The versions that made a certificate."""
    return {name: metadata.version(name) for name in ("confprune", "torch", "numpy")}


def _count(data: Any) -> int | None:
    return order_length(data) if permutable(data) else example_count(data)


def _group_names(question: Question, data: Any, batch_size: int | None) -> list[str] | None:
    """The groups there are, read from the data beforehand; None where it can be read only once."""
    if question.groups is None or isinstance(data, Iterator):
        return None
    order = torch.arange(order_length(data)) if permutable(data) else None
    every = (group_labels(batch, question.groups) for batch in batches(data, batch_size, order))
    return question.check_groups(itertools.chain.from_iterable(every))


def _means(sums: FloatArray, counts: IntArray) -> FloatArray:
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
