"""The figures of the report; each says whose data it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.figures import BLUE, INK, LIMIT, MARKS, PALE, SHADES, clean, list_rows
from benchmarks.paper.experiments import Numbers
from benchmarks.paper.tasks import Task
from confprune.files import written_whole

_WIDTH = 9.0


def draw(numbers: Numbers, folder: Path, stem: str) -> dict[str, str]:
    """Draw the experiments with one network; the names of the files by experiment."""
    drawings = {
        "curves": _curves(numbers["curves"]),
        "against": _against(numbers["against"]),
        "splits": _splits(numbers["splits"]),
        "groups": _groups(numbers["groups"]),
        "criteria": _criteria(numbers["criteria"]),
    }
    title = f"{numbers['network']}, {numbers['data']}"
    return {name: save(figure, title, folder, stem, name) for name, figure in drawings.items()}


def save(figure: Figure, title: str, folder: Path, stem: str, name: str) -> str:
    """Write a figure under the network's name."""
    figure.suptitle(title, fontsize=10)
    file = f"{stem}-{name}.png"
    with written_whole(folder / file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return file


def _curves(curves: Numbers) -> Figure:
    figure, row = _panels(len(curves), 3.2)
    for axes, (question, curve) in zip(row, curves.items(), strict=True):
        sparsities = np.array(curve["sparsities"])
        axes.plot(sparsities, curve["calibration"], color=PALE, label="calibration")
        axes.plot(sparsities, curve["test"], color=INK, label="test")
        highest = max(float(alpha) for alpha in next(iter(curve["certified"].values())))
        for mark, shade, (method, found) in zip(
            MARKS, SHADES, curve["certified"].items(), strict=True
        ):
            points = [(s, float(alpha)) for alpha, s in found.items() if s > 0]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    mark,
                    color=shade,
                    markeredgecolor=INK,
                    label=method,
                )
        for alpha in next(iter(curve["certified"].values())):
            axes.axhline(float(alpha), color=LIMIT, linewidth=0.6, linestyle=":")
        axes.set_ylim(0, 1.3 * highest)
        axes.set_xlabel("sparsity")
        axes.set_title(f"{question}: {curve['loss']}", fontsize=9)
        clean(axes, "y")
    row[0].set_ylabel("risk; marks: certified at alpha")
    row[0].legend(fontsize=7, frameon=False, loc="upper left")
    return figure


def _against(against: Numbers) -> Figure:
    labels = {"n": "calibration images", "delta": "δ", "alpha": "α"}
    figure, row = _panels(3, 2.8)
    for axes, (variable, label) in zip(row, labels.items(), strict=True):
        rows = [r for r in against["rows"] if r["variable"] == variable]
        methods = list(dict.fromkeys(r["method"] for r in rows))
        for mark, shade, method in zip(MARKS, SHADES, methods, strict=True):
            own = [r for r in rows if r["method"] == method]
            x = np.array([r["value"] for r in own])
            mean = np.array([r["mean"] for r in own])
            reach = np.array([[r["mean"] - r["low"], r["high"] - r["mean"]] for r in own]).T
            axes.errorbar(
                x,
                mean,
                np.maximum(reach, 0),
                fmt=f"-{mark}",
                color=shade,
                markeredgecolor=INK,
                linewidth=1,
                label=method,
            )
        if variable != "n":
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{value:g}" for value in x], minor=False)
            axes.minorticks_off()
        axes.set_ylim(0, 1)
        axes.set_xlabel(label)
        clean(axes, "y")
    row[0].set_ylabel("certified sparsity")
    row[0].legend(fontsize=7, frameon=False)
    return figure


def _splits(splits: Numbers) -> Figure:
    figure, row = _panels(len(splits), 2.8)
    for axes, (question, found) in zip(row, splits.items(), strict=True):
        methods = found["methods"]
        rng, highest = np.random.default_rng(0), found["alpha"]
        for place, numbers in enumerate(methods.values()):
            risks = np.array([r for r in numbers["test_risks"] if r is not None])
            lift = place + rng.uniform(-0.25, 0.25, len(risks))
            axes.plot(risks, lift, ".", color=BLUE, markersize=3)
            highest = max([highest, *risks])
            above = numbers["above_on_test"]["share"]
            axes.text(1, place - 0.35, f"{above:.0%} above", transform=_across(axes), ha="right",
                      fontsize=7, color=INK)  # fmt: skip
        axes.axvline(found["alpha"], color=LIMIT, linewidth=1)
        list_rows(axes, list(methods))
        if axes is not row[0]:
            axes.set_yticklabels([])
        axes.set_xlim(-0.03 * highest, 1.1 * highest)
        axes.set_xlabel("test risk at the certified sparsity")
        axes.set_title(f"{question}: {found['loss']}", fontsize=9)
        clean(axes)
    return figure


def _groups(groups: Numbers) -> Figure:
    names = groups["groups"]
    figure = Figure(figsize=(_WIDTH * 0.6, 1.6 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    for mark, shade, (title, row) in zip(MARKS, (PALE, INK), groups["rows"].items(), strict=False):
        axes.plot(row["risks"], range(len(names)), mark, color=shade, markeredgecolor=INK,
                  clip_on=False, label=f"{title}, {row['mean']:.0%} sparsity")  # fmt: skip
    axes.axvline(groups["alpha"], color=LIMIT, linewidth=1)
    list_rows(axes, [f"{groups['kind']} {name}" for name in names])
    axes.set_xlim(0, None)
    axes.set_xlabel(f"mean test risk ({groups['loss']})")
    axes.legend(fontsize=7, frameon=False)
    clean(axes)
    return figure


def _criteria(criteria: Numbers) -> Figure:
    rows = criteria["rows"]
    figure = Figure(figsize=(_WIDTH * 0.75, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows.values()):
        axes.plot([row["low"], row["high"]], [place, place], color=PALE, linewidth=4)
        axes.plot(row["mean"], place, "o", color=INK, clip_on=False)
    list_rows(axes, list(rows))
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"certified sparsity ({criteria['loss']}, α = {criteria['alpha']:g})")
    clean(axes)
    return figure


def masks(task: Task, sparsity: float, title: str, folder: Path, stem: str) -> str:
    """Example images with the truth, and the masks of the full and the pruned network."""
    level = int(np.searchsorted(task.table.sparsities, sparsity))
    pruned = task.levels["magnitude"].prune(task.model, level)
    pool, shown = task.source.pool, _one_per_group(task.source.pool.groups, 4)
    images = pool.inputs[torch.tensor(shown)]
    with torch.no_grad():
        full, sparse = (model(images)[:, 0] > 0 for model in (task.model, pruned))
    figure = Figure(figsize=(_WIDTH * 0.75, 1.75 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 4, squeeze=False)
    columns = ("image", "true mask", "full network", f"pruned, {sparsity:.0%} sparsity")
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=9)
    for number, row in enumerate(grid):
        pictures = (images[number].permute(1, 2, 0), pool.targets[shown[number], 0],
                    full[number], sparse[number])  # fmt: skip
        for axes, picture in zip(row, pictures, strict=True):
            _show(axes, picture)
        row[0].set_ylabel(f"{task.group} {pool.groups[shown[number]]}", fontsize=8)
    return save(figure, title, folder, stem, "masks")


def _show(axes: Axes, picture: Tensor) -> None:
    axes.imshow(picture.numpy(), cmap="gray", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _one_per_group(groups: NDArray[np.str_], number: int) -> list[int]:
    """Images of different groups, in turn, so many in all."""
    by_group = [np.flatnonzero(groups == name) for name in sorted(set(groups.tolist()))]
    turns = [int(own[turn]) for turn in range(number) for own in by_group if turn < len(own)]
    return turns[:number]


def _panels(number: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def _across(axes: Axes) -> Any:
    """Coordinates of the axes across, and of the data along the other way."""
    return axes.get_yaxis_transform()
