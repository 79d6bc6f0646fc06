"""From settings, data and ways of pruning to a certificate."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
from torch import Tensor, nn

from confprune.agreement import check_agreement
from confprune.batches import batches, example_count, ordering_size, permutable, random_order
from confprune.calling import Forward
from confprune.certificate import Certificate
from confprune.certificate.evidence import Looks, Part, Pruning, ScoreData, binding_part
from confprune.certificate.fingerprint import fingerprint
from confprune.distributed import Ranks
from confprune.evaluation import Evaluation, evaluate_all
from confprune.findings import Findings, early_test, fixed_test
from confprune.grid import GridForward
from confprune.levels import PruneLevels
from confprune.losses import Loss
from confprune.parameters import named_parameters
from confprune.question import Question
from confprune.risk.control import conformal_risk_control, monotonise, rcps
from confprune.risk.inputs import FloatArray, IntArray, loss_sums
from confprune.risk.looks import LookPlan
from confprune.risk.procedures import resolve_procedure
from confprune.risk.testing import pareto_order
from confprune.risks import Target, group_labels, resolve_targets
from confprune.sharding import is_sharded


def certify(
    question: Question,
    model: nn.Module,
    data: Any,
    ways: Sequence[PruneLevels],
    *,
    forward: Forward | None,
    batch_size: int | None,
    activation_bytes: int | None,
    progress: bool,
    ranks: Ranks,
) -> Certificate:
    """Evaluate, test, and write down what may be claimed."""
    for name, parameter in named_parameters(model).items():
        if is_sharded(parameter):
            raise ValueError(
                f"parameter {name!r} is sharded over ranks; calibration runs the whole model on "
                "each: give one whose parameters are plain tensors"
            )
    candidates = [(g, j) for g, levels in enumerate(ways) for j in range(len(levels))]
    question.check_procedure(len(candidates))
    grids = [
        GridForward(
            model, levels, question.measures, forward=forward, activation_bytes=activation_bytes
        )
        for levels in ways
    ]
    losses = [risk.loss for risk in question.risks]
    order = None
    if permutable(data):
        order = random_order(data, question.seed)[question.scored :]
    if ranks.size > 1:
        weights = [pruning_of(model, levels).fingerprint for levels in ways]
        check_agreement(ranks, question, data, batches(data, batch_size, order), ways, weights)
    names = _group_names(question, data, batch_size, order)
    notes: list[str] = []
    run = _Run(question, model, data, grids, losses, names, order, batch_size, progress, ranks)
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
    for found in ranks.objects([grid.notes for grid in grids]):
        notes += itertools.chain.from_iterable(found)
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
        ranks: Ranks,
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
        self.ranks = ranks

    def evaluation(self, candidates: Sequence[tuple[int, int]]) -> Evaluation:
        question = self.question
        return Evaluation(
            self.model,
            self.grids,
            candidates,
            self.losses,
            question.accept,
            question.groups,
            self.ranks,
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
        tried = ", ".join(_name(levels) for levels in ways)
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
            pruning=pruning_of(self.model, levels, question.score_data),
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
            pruning=pruning_of(self.model, levels, question.score_data),
            seed=question.seed,
            versions=versions(),
            parts=parts if len(parts) > 1 else (),
            looks=looks,
            accept=None if question.accept is None else question.accept.name,
            acceptance=None if rates is None else spread(rates),
        )


def pruning_of(
    model: nn.Module, levels: PruneLevels, score_data: ScoreData | None = None
) -> Pruning:
    """How these levels prune this model, with the fingerprint of its weights."""
    parameters = named_parameters(model)
    return Pruning(
        scope=levels.scope,
        criterion=levels.criterion,
        parameters=tuple(levels.levels),
        fingerprint=fingerprint({name: parameters[name] for name in levels.levels}),
        total=levels.total,
        pattern=levels.pattern,
        inputs_first=dict(levels.inputs_first),
        statistics={name: fingerprint(values) for name, values in levels.statistics.items()},
        score_data=score_data,
        kept=levels.statistics,
        network=sum(parameter.numel() for parameter in model.parameters()),
    )


def _name(levels: PruneLevels) -> str:
    """What tells one way of pruning from another."""
    with_pattern = "" if levels.pattern is None else f", {levels.pattern}"
    return f"{levels.criterion} ({levels.scope}{with_pattern})"


def versions() -> dict[str, str]:
    """The versions that made a certificate."""
    return {name: _version(name) for name in ("confprune", "torch", "numpy")}


@functools.cache
def _version(name: str) -> str:
    """What is installed, which takes milliseconds to find out."""
    return metadata.version(name)


def _group_names(
    question: Question, data: Any, batch_size: int | None, order: Tensor | None
) -> list[str] | None:
    """The groups there are, read from the data beforehand; None where it can be read only once."""
    if question.groups is None or isinstance(data, Iterator):
        return None
    every = (group_labels(batch, question.groups) for batch in batches(data, batch_size, order))
    return question.check_groups(itertools.chain.from_iterable(every))


def _means(sums: FloatArray, counts: IntArray) -> FloatArray:
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
