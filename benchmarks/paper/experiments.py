"""The experiments: what they draw, and the numbers they give, ready for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.curves import clopper_pearson
from benchmarks.paper.sizes import Sizes
from benchmarks.paper.tables import (
    METHODS,
    ONE_TEST,
    IntArray,
    Question,
    Table,
    certify,
    certify_best,
    shuffled,
)
from benchmarks.paper.tasks import Task

DELTA = 0.1
DELTAS = (0.01, 0.05, 0.1, 0.2)
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Sizes of the calibration set, as shares of the whole."""
_CURVE, _SPLIT, _DRAW, _GROUP, _CRITERION = range(5)  # streams of random numbers

Numbers = dict[str, Any]


def run(task: Task, sizes: Sizes, seed: int, *, progress: bool = True) -> Numbers:
    """Every experiment with one network."""
    # Those that others are compared with come from the question that needs no labels.
    main = task.questions[1]
    names = ("against", "splits", "groups", "criteria")
    steps: dict[str, Callable[[], Numbers]] = {
        "against": lambda: against(task, main, sizes, seed),
        "splits": lambda: {q.name: splits(task, q, sizes, seed) for q in task.questions},
        "groups": lambda: groups(task, main, sizes, seed),
        "criteria": lambda: criteria(task, main, sizes, seed),
    }
    found: Numbers = {
        "network": task.name,
        "data": task.source.name,
        "stand_in": task.source.stand_in,
        "notes": task.notes,
        "training": len(task.source.training),
        "calibration": task.calibration,
        "test": len(task.source.pool) - task.calibration,
        "weights": task.levels["magnitude"].total,
        "delta": DELTA,
        "curves": {q.name: curve(task, q, seed) for q in task.questions},
    }
    for name in tqdm(names, f"experiments with {task.name}", disable=not progress):
        found[name] = steps[name]()
    return found


def curve(task: Task, question: Question, seed: int) -> Numbers:
    """Risk against sparsity on one split, with what is certified at several alphas."""
    table = task.table
    calibration, test = task.split(shuffled(len(table), (seed, _CURVE)))
    return {
        "loss": question.loss.name,
        "sparsities": table.sparsities.tolist(),
        "calibration": table.risks(question, calibration).tolist(),
        "test": table.risks(question, test).tolist(),
        "accepted": table.accepted[test].mean(axis=0).tolist() if question.selective else None,
        "certified": {
            method.name: {
                f"{alpha:g}": _sparsity(
                    table, certify(table, question, calibration, alpha, DELTA, method)
                )
                for alpha in question.alphas
            }
            for method in METHODS
        },
    }


def against(task: Task, question: Question, sizes: Sizes, seed: int) -> Numbers:
    """Mean certified sparsity against n, delta and alpha, each with the others fixed."""
    whole = task.calibration
    settings: dict[str, list[tuple[float, int, float, float]]] = {
        "n": [
            (round(share * whole), round(share * whole), question.alpha, DELTA) for share in SHARES
        ],
        "delta": [(delta, whole, question.alpha, delta) for delta in DELTAS],
        "alpha": [(alpha, whole, alpha, DELTA) for alpha in question.alphas],
    }
    table = task.table
    found: Numbers = {"loss": question.loss.name, "alpha": question.alpha, "rows": []}
    for variable, points in settings.items():
        for value, n, alpha, delta in points:
            for method in METHODS:
                sparsities = [
                    _sparsity(table, certify(table, question, order[:n], alpha, delta, method))
                    for order in _orders(table, sizes.curve_splits, seed, _CURVE)
                ]
                found["rows"].append(
                    {"variable": variable, "value": value, "method": method.name}
                    | _spread(sparsities)
                )
    return found


def splits(task: Task, question: Question, sizes: Sizes, seed: int) -> Numbers:
    """Many random splits: the test risk at the certified sparsity, and how often it is too large.

    Besides, calibration sets drawn from the pool with replacement: then the pool is the population,
    and the risk is known instead of estimated.
    """
    table, everything = task.table, np.arange(len(task.table))
    known = table.risks(question, everything)
    found: Numbers = {"loss": question.loss.name, "alpha": question.alpha, "methods": {}}
    for method in METHODS:
        chosen, risks, above = [], [], 0
        for order in _orders(table, sizes.splits, seed, _SPLIT):
            calibration, test = task.split(order)
            level = certify(table, question, calibration, question.alpha, DELTA, method)
            chosen.append(_sparsity(table, level))
            risks.append(None if level is None else float(table.risks(question, test)[level]))
        for number in range(sizes.splits):
            drawn = np.random.default_rng((seed, _DRAW, number)).choice(
                everything, task.calibration
            )
            level = certify(table, question, drawn, question.alpha, DELTA, method)
            above += level is not None and known[level] > question.alpha
        found["methods"][method.name] = {
            "sparsities": chosen,
            "test_risks": risks,
            **_spread(chosen),
            "above_on_test": _share(
                sum(risk is not None and risk > question.alpha for risk in risks), len(risks)
            ),
            "above_known": _share(above, sizes.splits),
        }
    return found


def groups(task: Task, question: Question, sizes: Sizes, seed: int) -> Numbers:
    """Each group's test risk, where the average is certified and where every group is."""
    table = task.table
    names = sorted(set(table.groups.tolist()))
    # A group is a small calibration set: it takes a larger alpha to certify anything.
    alpha = question.alphas[-2]
    found: Numbers = {
        "loss": question.loss.name,
        "alpha": alpha,
        "groups": names,
        "kind": task.group,
        "rows": {},
    }
    for title, kept in (("average certified", None), ("every group certified", names)):
        chosen, worst, by_group = [], 0, []
        for order in _orders(table, sizes.curve_splits, seed, _GROUP):
            calibration, test = task.split(order)
            level = certify(table, question, calibration, alpha, DELTA, ONE_TEST, kept)
            chosen.append(_sparsity(table, level))
            of_groups = _group_risks(table, question, test, level, names)
            by_group.append(of_groups)
            worst += level is not None and max(of_groups) > alpha
        found["rows"][title] = {
            **_spread(chosen),
            "risks": np.mean(by_group, axis=0).tolist(),
            "some_group_above": _share(worst, len(chosen)),
        }
    return found


def criteria(task: Task, question: Question, sizes: Sizes, seed: int) -> Numbers:
    """What each way of pruning certifies on the same splits, and all of them as one choice."""
    found: Numbers = {"loss": question.loss.name, "alpha": question.alpha, "rows": {}}
    together = task.together
    named = np.repeat(list(task.tables), [len(t.sparsities) for t in task.tables.values()])
    picked: list[str] = []
    for way, table in [*task.tables.items(), ("all, one certified choice", together)]:
        one_choice = table is together
        chosen, risks = [], []
        for order in _orders(table, sizes.curve_splits, seed, _CRITERION):
            calibration, test = task.split(order)
            how = certify_best if one_choice else certify
            level = how(table, question, calibration, question.alpha, DELTA, ONE_TEST)
            chosen.append(_sparsity(table, level))
            if level is not None:
                risks.append(float(table.risks(question, test)[level]))
                picked += [str(named[level])] * one_choice
        found["rows"][way] = _spread(chosen) | {
            "test_risk": float(np.mean(risks)) if risks else None
        }
    found["picked"] = {way: picked.count(way) for way in task.tables if way in picked}
    return found


def _orders(table: Table, number: int, seed: int, stream: int) -> Iterable[IntArray]:
    """Random orders of the pool, the same ones whenever they are asked for."""
    return (shuffled(len(table), (seed, stream, split)) for split in range(number))


def _sparsity(table: Table, level: int | None) -> float:
    return 0.0 if level is None else float(table.sparsities[level])


def _spread(values: Sequence[float]) -> Numbers:
    """Mean, and the range that four fifths of the values lie in."""
    low, high = np.quantile(values, [0.1, 0.9])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


def _share(events: int, trials: int) -> Numbers:
    """A share with its exact 95 % interval."""
    low, high = clopper_pearson(int(events), trials)
    return {"share": int(events) / trials, "low": low, "high": high, "of": trials}


def _group_risks(
    table: Table, question: Question, index: IntArray, level: int | None, names: Sequence[str]
) -> list[float]:
    """The risk of each group at a level, 0 for the full network against itself."""
    column = 0 if level is None else level
    losses = table.losses[question.loss.name][index, column]
    return [
        float(losses[member].mean()) if (member := table.groups[index] == name).any() else 0.0
        for name in names
    ]
