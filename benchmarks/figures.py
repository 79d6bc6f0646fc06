"""What the benchmarks' pictures share: shades and marks that tell apart in grey, and axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1b2a41"
BLUE = "#4f81a8"
PALE = "#a9b4c0"
LIMIT = "#a4243b"

SHADES = (PALE, BLUE, INK)
"""From light to dark, for three sizes of one thing."""

MARKS = ("o", "s", "D")


def clean(axes: Axes, along: str = "x") -> None:
    """A light grid along the axis that is read, behind the data, and no frame."""
    axes.grid(axis=along, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def list_rows(axes: Axes, labels: list[str]) -> None:
    """Name the rows of a dot plot, the first one on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
