"""Early looks: how much work they save, and what they cost in certified sparsity."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.curves import (
    CURVES,
    HARD_CURVES,
    LOSS_PARTS,
    SPARSITIES,
    NestedLosses,
    clopper_pearson,
    standard_error,
)
from benchmarks.parallel import run_jobs
from benchmarks.records import Row, markdown
from benchmarks.remember import remember_pure_functions
from confprune.risk.looks import default_looks
from confprune.risk.pvalues import PVALUES
from confprune.risk.sequential import RiskTarget, SequentialTest
from confprune.risk.testing import fixed_sequence

if TYPE_CHECKING:
    from collections.abc import Mapping


QUESTION = "How many evaluations do early looks save, and how much sparsity do they cost?"
DRAWS = 2000
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
        for curve in curves
    ]
    rows = dict(run_jobs(_measure_one, jobs, workers))
    order = [(job.losses, job.pvalue) for job in jobs]
    ranked = sorted(
        rows, key=lambda i: (TESTS.index(order[i]), list(curves).index(jobs[i].curve), jobs[i].n)
    )
    return [rows[i] for i in ranked]


def _draws_of(pvalue: str, draws: int) -> int:
    """Betting goes through the examples one by one, and gets a tenth of the draws."""
    return max(1, draws // 10) if PVALUES[pvalue].anytime else draws


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
        test = SequentialTest(plan, len(risks), [RiskTarget(ALPHA, job.pvalue)])
        if PVALUES[job.pvalue].anytime:
            losses = source.losses(job.n, rng)
            while not test.finished:
                rows = losses[test.seen : test.next_look]
                test.update([rows[:, test.active]])
            pvalues = PVALUES[job.pvalue].from_losses(losses, ALPHA)
        else:
            totals = np.zeros(len(risks))
            for size in np.diff([0, *plan.sizes]):
                sums = source.sums(int(size), rng)
                totals += sums
                if not test.finished:
                    test.update_sums(int(size), sums[None, test.active])
            pvalues = PVALUES[job.pvalue].from_sums(totals, job.n, ALPHA)
        result = test.result()
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
