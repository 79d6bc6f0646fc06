"""Power: how much sparsity each test certifies, on the same draws."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks import figures
from benchmarks.curves import CURVES, LOSS_PARTS, SPARSITIES, NestedLosses, standard_error
from benchmarks.parallel import run_jobs
from benchmarks.records import Row, markdown
from benchmarks.remember import remember_pure_functions
from confprune.risk.looks import default_looks
from confprune.risk.procedures import PROCEDURES
from confprune.risk.pvalues import PVALUES
from confprune.risk.sequential import RiskTarget, SequentialTest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.curves import FloatArray

QUESTION = "How much sparsity does each test certify, against the paper's and MAPIE's?"
DRAWS = 200
QUICK_DRAWS = 8
PEERS = ("mapie", "scikit-learn")

ALPHA = 0.05
DELTA = 0.1
SIZES = (1000, 5000, 20000)
CHUNK = 25
"""Draws per job."""

PAPER = "paper"


class Method(NamedTuple):
    """A way to certify: whose functions, which p-value and procedure, and with looks or not."""

    label: str
    pvalue: str
    procedure: str = "fixed_sequence"
    looks: bool = False
    mapie: bool = False


METHODS = {
    "0/1": (
        Method(PAPER, "hoeffding_bentkus"),
        Method("MAPIE, fixed sequence", "hoeffding_bentkus", mapie=True),
        Method("MAPIE, its default (Holm)", "hoeffding_bentkus", "bonferroni_holm", mapie=True),
        Method("binomial", "binomial"),
        Method("binomial, looks", "binomial", looks=True),
        Method("binomial, Holm", "binomial", "holm"),
        Method("binomial, Bonferroni", "binomial", "bonferroni"),
        Method("convex", "convex"),
        Method("convex, looks", "convex", looks=True),
        Method("betting", "betting"),
        Method("betting, looks", "betting", looks=True),
    ),
    "share of 8": (
        Method(PAPER, "hoeffding_bentkus"),
        Method("MAPIE, fixed sequence", "hoeffding_bentkus", mapie=True),
        Method("MAPIE, its default (Holm)", "hoeffding_bentkus", "bonferroni_holm", mapie=True),
        Method("convex", "convex"),
        Method("convex, looks", "convex", looks=True),
        Method("convex, Holm", "convex", "holm"),
        Method("convex, Bonferroni", "convex", "bonferroni"),
        Method("betting", "betting"),
        Method("betting, looks", "betting", looks=True),
    ),
}
"""By family of losses. MAPIE's p-value is told whether they are binary; it then is the exact one
or Hoeffding's, whichever is smaller."""


class Job(NamedTuple):
    curve: str
    n: int
    losses: str
    chunk: int
    draws: int
    seed: int


def measure(draws: int, seed: int, workers: int) -> list[Row]:
    """One row per curve, n, family of losses and method."""
    jobs = [
        Job(curve, n, losses, chunk, min(CHUNK, draws - chunk * CHUNK), seed)
        for n in sorted(SIZES, reverse=True)
        for losses in METHODS
        for curve in CURVES
        for chunk in range(-(-draws // CHUNK))
    ]
    found = dict(run_jobs(_certify, jobs, workers))
    rows = []
    for losses, methods in METHODS.items():
        for curve in CURVES:
            for n in SIZES:
                chunks = [found[i] for i, job in enumerate(jobs) if (losses, curve, n) == _key(job)]
                certified = np.concatenate(chunks, axis=1)
                rows += _rows(losses, curve, n, methods, certified)
    return rows


def _key(job: Job) -> tuple[str, str, int]:
    return job.losses, job.curve, job.n


def _rows(
    losses: str, curve: str, n: int, methods: tuple[Method, ...], certified: FloatArray
) -> list[Row]:
    """Rows from certified sparsities [M, D]; NaN where a method was not run."""
    paper = certified[[method.label for method in methods].index(PAPER)]
    oracle = SPARSITIES[CURVES[curve] < ALPHA].max()
    rows = []
    for method, values in zip(methods, certified, strict=True):
        run = ~np.isnan(values)
        gain = values[run] - paper[run]
        rows.append(
            {
                "losses": losses,
                "curve": curve,
                "n": n,
                "method": method.label,
                "pvalue": method.pvalue,
                "procedure": method.procedure,
                "looks": method.looks,
                "mapie": method.mapie,
                "draws": int(run.sum()),
                "certified": round(float(values[run].mean()), 5),
                "certified_se": round(standard_error(values[run]), 5),
                "over_paper": round(float(gain.mean()), 5),
                "over_paper_se": round(standard_error(gain), 5),
                "oracle": round(float(oracle), 5),
            }
        )
    return rows


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {"alpha": ALPHA, "delta": DELTA, "K": len(SPARSITIES)}


def _certify(job: Job) -> FloatArray:
    """Certified sparsity [M, D] of each method on each draw."""
    remember_pure_functions()
    name = f"{job.curve} {job.n} {job.losses} {job.chunk}"
    rng = np.random.default_rng([job.seed, zlib.crc32(name.encode())])
    source = NestedLosses(CURVES[job.curve], LOSS_PARTS[job.losses])
    methods = METHODS[job.losses]
    certified = np.full((len(methods), job.draws), np.nan)
    for draw in range(job.draws):
        losses = source.losses(job.n, rng)
        pvalues = _memory(losses)
        for row, method in enumerate(methods):
            if method.pvalue == "betting" and not _bets(job, draw):
                continue
            if method.mapie:
                rejected = _with_mapie(losses, method, binary=job.losses == "0/1")
            elif method.looks:
                rejected = _with_looks(losses, method)
            else:
                rejected = PROCEDURES[method.procedure].test(pvalues(method.pvalue), DELTA)
            certified[row, draw] = SPARSITIES[rejected].max(initial=0.0)
    return certified


def _bets(job: Job, draw: int) -> bool:
    """Betting goes through the examples one by one: with many of them, on part of the draws."""
    return job.n < 20000 or draw % 4 == 0


def _memory(losses: FloatArray) -> Callable[[str], FloatArray]:
    """The p-values [K] of all examples by name, each computed once."""
    return functools.cache(lambda name: PVALUES[name].from_losses(losses, ALPHA))


def _with_looks(losses: FloatArray, method: Method) -> NDArray[np.bool_]:
    plan = default_looks(len(losses), ALPHA, DELTA, method.pvalue)
    test = SequentialTest(
        plan,
        losses.shape[1],
        [RiskTarget(ALPHA, method.pvalue)],
        procedure=method.procedure,
    )
    while not test.finished:
        test.update([losses[test.seen : test.next_look, test.active]])
    return test.result().rejected


def _with_mapie(losses: FloatArray, method: Method, *, binary: bool) -> NDArray[np.bool_]:
    # Imported here, so that the other benchmarks and the tables need no MAPIE.
    from mapie.risk_control.fwer_control import control_fwer
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    n, levels = losses.shape
    pvalues = compute_hoeffding_bentkus_p_value(losses.mean(axis=0), n, ALPHA, binary=binary)
    rejected = np.zeros(levels, dtype=bool)
    rejected[control_fwer(pvalues[:, 0], DELTA, fwer_method=method.procedure)] = True
    return rejected


def tables(record: Mapping[str, Any]) -> str:
    """One table per family of losses: the paper's certified sparsity, and the gains over it."""
    parts = []
    for losses, methods in METHODS.items():
        rows = {
            (row["method"], row["curve"], row["n"]): row
            for row in record["rows"]
            if row["losses"] == losses
        }
        columns = [(curve, n) for curve in CURVES for n in SIZES]
        body = []
        for method in methods:
            cells = [_cell(rows[(method.label, *column)]) for column in columns]
            body.append([method.label, *cells])
        best = [f"{100 * rows[(PAPER, *column)]['oracle']:.0f}" for column in columns]
        body.append(["were the risks known", *best])
        table = markdown(["method", *(f"{curve}, {n}" for curve, n in columns)], body)
        draws = sorted({row["draws"] for row in rows.values()}, reverse=True)
        fewer = f", {draws[-1]} for betting at n = {max(SIZES)}" if len(draws) > 1 else ""
        parts.append(
            f"**{losses} losses** ({draws[0]} draws{fewer}): certified sparsity in %, and points "
            f"more than that\n\n{table}"
        )
    return "\n\n".join(parts)


def _cell(row: Mapping[str, Any]) -> str:
    if row["method"] == PAPER:
        return f"{100 * row['certified']:.2f}"
    return f"{100 * row['over_paper']:+.2f} ± {100 * row['over_paper_se']:.2f}"


def plot(record: Mapping[str, Any]) -> Figure:
    """What each method certifies beyond the paper's, by curve and n."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    heights = [len(methods) for methods in METHODS.values()]
    grid = figure.subplots(
        len(METHODS), len(CURVES), sharex="col", sharey="row", height_ratios=heights
    )
    for losses, panels in zip(METHODS, grid, strict=True):
        labels = [method.label for method in METHODS[losses] if method.label != PAPER]
        figures.list_rows(panels[0], labels)
        panels[0].set_ylabel(f"{losses} losses")
        for axes, curve in zip(panels, CURVES, strict=True):
            for row in record["rows"]:
                if (row["losses"], row["curve"]) == (losses, curve) and row["method"] != PAPER:
                    _plot_gain(axes, row, labels.index(row["method"]))
            axes.axvline(0, color=figures.LIMIT, linewidth=1.2, linestyle="--")
            figures.clean(axes)
    for axes, curve in zip(grid[0], CURVES, strict=True):
        axes.set_title(f"{curve} risk curve", fontsize=11)
    figure.supxlabel("sparsity certified beyond the paper's test (points)", fontsize=11)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower right", ncols=len(SIZES), frameon=False)
    figure.suptitle(
        "Certified sparsity against Hoeffding-Bentkus with fixed-sequence testing, 95 % intervals",
    )
    return figure


def _plot_gain(axes: Axes, row: Mapping[str, Any], place: int) -> None:
    size = SIZES.index(row["n"])
    axes.errorbar(
        100 * row["over_paper"],
        place + 0.22 * (size - 1),
        xerr=196 * row["over_paper_se"],
        color=figures.SHADES[size],
        marker=figures.MARKS[size],
        linestyle="none",
        markersize=5,
        linewidth=1,
        label=f"n = {row['n']}" if place == 0 else None,
    )
