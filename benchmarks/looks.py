"""Early looks: how much work they save, and what they cost in certified sparsity."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks import figures
from benchmarks.curves import (
    CURVES,
    HARD_CURVES,
    LOSS_PARTS,
    SPARSITIES,
    FloatArray,
    NestedLosses,
    clopper_pearson,
    standard_error,
)
from benchmarks.parallel import run_jobs
from benchmarks.records import Row, markdown
from benchmarks.remember import remember_pure_functions
from confprune.risk.looks import LookPlan, default_looks
from confprune.risk.pvalues import PVALUES
from confprune.risk.sequential import RiskTarget, SequentialResult, SequentialTest
from confprune.risk.testing import fixed_sequence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUESTION = "How many evaluations do early looks save, and how much sparsity do they cost?"
DRAWS = 800
QUICK_DRAWS = 20
PEERS: tuple[str, ...] = ()

ALPHA = 0.05
DELTA = 0.1
SIZES = (1000, 5000, 20000)
TESTS = (("0/1", "binomial"), ("share of 8", "betting"), ("share of 8", "convex"))
"""Losses and the p-value that tests them; the first two are what `calibrate` chooses."""

LEAST_RATIO = 10.0
MOST_STEPS = 0.5
"""Targets at n >= 5000: evaluations saved, and sparsity lost in steps of the grid."""


class Job(NamedTuple):
    curve: str
    n: int
    losses: str
    pvalue: str
    draws: int
    seed: int


def measure(draws: int, seed: int, workers: int) -> list[Row]:
    """One row per curve, n and test."""
    curves = {**CURVES, **HARD_CURVES}
    jobs = [
        Job(curve, n, losses, pvalue, _draws_of(pvalue, draws), seed)
        for n in sorted(SIZES, reverse=True)
        for losses, pvalue in reversed(TESTS)
        for curve in (CURVES if PVALUES[pvalue].anytime else curves)
    ]
    rows = dict(run_jobs(_measure_one, jobs, workers))
    order = [(job.losses, job.pvalue) for job in jobs]
    ranked = sorted(
        rows, key=lambda i: (TESTS.index(order[i]), list(curves).index(jobs[i].curve), jobs[i].n)
    )
    return [rows[i] for i in ranked]


def _draws_of(pvalue: str, draws: int) -> int:
    """All draws for the test of 0/1 losses, a quarter of them for the slower ones."""
    return draws if pvalue == "binomial" else max(1, draws // 4)


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {
        "alpha": ALPHA,
        "delta": DELTA,
        "levels": len(SPARSITIES),
        "procedure": "fixed_sequence",
    }


def _measure_one(job: Job) -> Row:
    remember_pure_functions()
    risks = {**CURVES, **HARD_CURVES}[job.curve]
    source = NestedLosses(risks, LOSS_PARTS[job.losses])
    name = f"{job.curve} {job.n} {job.losses} {job.pvalue}"
    rng = np.random.default_rng([job.seed, zlib.crc32(name.encode())])
    plan = default_looks(job.n, ALPHA, DELTA, job.pvalue)
    step = float(SPARSITIES[1] - SPARSITIES[0])
    seen = np.zeros(len(risks))
    evaluations, early, fixed = np.zeros((3, job.draws))
    violations = 0
    for draw in range(job.draws):
        result, pvalues = _test_both_ways(source, plan, job.pvalue, rng)
        evaluations[draw] = result.evaluations
        seen += result.seen
        early[draw] = _certified(result.rejected)
        fixed[draw] = _certified(fixed_sequence(pvalues, DELTA))
        violations += bool((result.rejected & (risks >= ALPHA)).any())
    ratio = job.n * len(risks) / evaluations.mean()
    lost = (fixed - early) / step
    low, high = clopper_pearson(violations, job.draws)
    return {
        "curve": job.curve,
        "n": job.n,
        "losses": job.losses,
        "pvalue": job.pvalue,
        "draws": job.draws,
        "looks": len(plan.sizes),
        "first_look": plan.sizes[0],
        "ratio": round(ratio, 3),
        "ratio_se": round(ratio * standard_error(evaluations) / evaluations.mean(), 3),
        "certified": round(float(early.mean()), 5),
        "certified_fixed": round(float(fixed.mean()), 5),
        "steps_lost": round(float(lost.mean()), 4),
        "steps_lost_se": round(standard_error(lost), 4),
        "same_level": round(float((np.abs(lost) < 0.5).mean()), 4),
        "violations": violations,
        "violation_interval": [round(low, 4), round(high, 4)],
        "examples_by_level": [round(value, 1) for value in (seen / job.draws).tolist()],
    }


def _test_both_ways(
    source: NestedLosses, plan: LookPlan, pvalue: str, rng: np.random.Generator
) -> tuple[SequentialResult, FloatArray]:
    """One draw: the result with looks, and the p-values [K] of all its examples."""
    kind = PVALUES[pvalue]
    test = SequentialTest(plan, len(source.risks), [RiskTarget(ALPHA, pvalue)])
    if kind.from_sums is None:
        losses = source.losses(plan.n, rng)
        while not test.finished:
            test.update([losses[test.seen : test.next_look, test.active]])
        return test.result(), kind.from_losses(losses, ALPHA)
    totals = np.zeros(len(source.risks))
    for size in np.diff([0, *plan.sizes]):
        sums = source.sums(int(size), rng)
        totals += sums
        if not test.finished:
            test.update_sums(int(size), sums[None, test.active])
    return test.result(), kind.from_sums(totals, plan.n, ALPHA)


def _certified(rejected: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    return float(SPARSITIES[rejected].max(initial=0.0))


def met(row: Mapping[str, Any]) -> bool:
    """Whether a row reaches all targets for n >= 5000."""
    return bool(
        row["ratio"] >= LEAST_RATIO
        and row["steps_lost"] <= MOST_STEPS
        and row["violation_interval"][0] <= DELTA
    )


def tables(record: Mapping[str, Any]) -> str:
    """One table per test."""
    parts = []
    for losses, pvalue in TESTS:
        rows = [r for r in record["rows"] if (r["losses"], r["pvalue"]) == (losses, pvalue)]
        if not rows:
            continue
        table = markdown(
            [
                "risk curve",
                "n",
                "looks",
                "fewer evaluations",
                "certified, all n",
                "certified, looks",
                "grid steps lost",
                "violations",
                "targets",
            ],
            [_cells(row) for row in rows],
        )
        parts.append(f"**{losses} losses, `{pvalue}`** ({rows[0]['draws']} draws)\n\n{table}")
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["violation_interval"]
    target = "met" if met(row) else "missed"
    return [
        row["curve"] + (" (hard)" if row["curve"] in HARD_CURVES else ""),
        str(row["n"]),
        str(row["looks"]),
        f"{row['ratio']:.1f} ± {row['ratio_se']:.1f} ×",
        f"{row['certified_fixed']:.3f}",
        f"{row['certified']:.3f}",
        f"{row['steps_lost']:.2f} ± {row['steps_lost_se']:.2f}",
        f"{row['violations'] / row['draws']:.3f} [{low:.3f}, {high:.3f}]",
        target if row["n"] >= 5000 else "–",
    ]


def plot(record: Mapping[str, Any]) -> Figure:
    """Where the evaluations go, and how the targets are met."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.25])
    losses, pvalue = TESTS[0]
    upper.suptitle(
        f"Examples evaluated at each level, mean ({losses} losses, {pvalue})", fontsize=11
    )
    panels = upper.subplots(1, len(CURVES), sharey=True)
    for axes, (curve, risks) in zip(panels, CURVES.items(), strict=True):
        rows = [r for r in record["rows"] if (r["curve"], r["pvalue"]) == (curve, pvalue)]
        _plot_levels(axes, risks, rows)
        axes.set_title(f"{curve} risk curve", fontsize=10)
    panels[0].set_ylabel("examples")
    panels[0].legend(frameon=False, fontsize=9, title="n", loc="upper left")
    lower.suptitle("The targets for n ≥ 5000", fontsize=11)
    _plot_targets(lower.subplots(1, 3, sharey=True), record["rows"])
    return figure


def _plot_levels(axes: Axes, risks: np.ndarray[Any, Any], rows: list[Row]) -> None:
    for row in sorted(rows, key=lambda row: row["n"]):
        shade = figures.SHADES[SIZES.index(row["n"])]
        axes.plot(100 * SPARSITIES, row["examples_by_level"], color=shade, label=f"{row['n']}")
    near = 100 * SPARSITIES[(risks > 0.8 * ALPHA) & (risks < 1.2 * ALPHA)]
    axes.axvspan(near.min() - 0.5, near.max() + 0.5, color="#eeeeee", zorder=0)
    axes.text(
        near.mean(),
        0.97,
        "risk within\n20 % of α",
        fontsize=8,
        ha="center",
        va="top",
        transform=axes.get_xaxis_transform(),
    )
    axes.set_yscale("log")
    axes.set_ylim(40, 100000)
    axes.set_xlabel("sparsity (%)")
    figures.clean(axes, "y")


def _plot_targets(panels: Sequence[Axes], rows: list[Row]) -> None:
    saved, lost, wrong = panels
    groups = list(dict.fromkeys((r["losses"], r["pvalue"], r["curve"]) for r in rows))
    figures.list_rows(saved, [f"{curve}, {pvalue}" for _, pvalue, curve in groups])
    for row in rows:
        place = groups.index((row["losses"], row["pvalue"], row["curve"]))
        size = SIZES.index(row["n"])
        style: dict[str, Any] = {
            "color": figures.SHADES[size],
            "marker": figures.MARKS[size],
            "linestyle": "none",
            "markersize": 5,
            "linewidth": 1,
            "label": f"n = {row['n']}" if place == 0 else None,
        }
        height = place + 0.25 * (size - 1)
        saved.plot(row["ratio"], height, **style)
        lost.errorbar(row["steps_lost"], height, xerr=1.96 * row["steps_lost_se"], **style)
        share = row["violations"] / row["draws"]
        low, high = row["violation_interval"]
        wrong.errorbar(share, height, xerr=[[share - low], [high - share]], **style)
    saved.set_xscale("log")
    saved.set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    saved.set_xlabel("times fewer evaluations than the full matrix")
    lost.set_xlabel("grid steps lost to the fixed-n test (95 % interval)")
    wrong.set_xlabel("share of violations (95 % interval)")
    for axes, target in zip(panels, (LEAST_RATIO, MOST_STEPS, DELTA), strict=True):
        axes.axvline(target, color=figures.LIMIT, linewidth=1.2, linestyle="--")
        figures.clean(axes)
    saved.legend(frameon=False, fontsize=9, loc="lower right")
