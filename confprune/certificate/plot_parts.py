"""Several risks in one picture: their curves, and each at the level that matters.

All are drawn relative to their alpha, so that one line stands for the limits of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from confprune.certificate.evidence import Part, closest
from confprune.certificate.plot_style import (
    BAND,
    BOUND,
    INK,
    LIMIT,
    OTHERS,
    bound_label,
    clean,
    marker_step,
    percents,
    shortened,
)
from confprune.certificate.promise import part_text, sparsity_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from confprune.certificate import Certificate

MOST_ROWS = 24
STYLES = (("-", "o", INK), ("--", "s", "#4f81a8"), ("-.", "^", "#6b7a3a"), (":", "D", "#8a5a83"))
"""Line, marker and colour of each of a few risks; the first is for the one that binds."""

MOST_CURVES = len(STYLES)
"""Of more risks, only the one that binds is told apart in the curves; there is a row for each."""


def draw_several(axes: Axes, certificate: Certificate) -> None:
    """The curve of each risk; hollow markers are levels that are not certified."""
    binding, sparsity = certificate.binding, percents(certificate)
    assert binding is not None
    others = [part for part in certificate.parts if part is not binding]
    bounds = np.array(binding.bounds) / binding.alpha
    risks = np.array(binding.risks) / binding.alpha
    axes.fill_between(sparsity, risks, bounds, color=BAND, linewidth=0)
    if len(certificate.parts) > MOST_CURVES:
        for number, part in enumerate(others):
            axes.plot(
                sparsity,
                np.array(part.risks) / part.alpha,
                color=OTHERS,
                linewidth=0.7,
                label=f"the other {len(others)} risks" if number == 0 else None,
            )
        others = []
    _draw_curve(axes, certificate, binding, STYLES[0], f"{binding.name} (binds)", width=2.0)
    for part, style in zip(others, STYLES[1:], strict=False):
        _draw_curve(axes, certificate, part, style, part.name)
    axes.plot([], [], linestyle="none", marker="o", color=INK, markersize=4,
              markerfacecolor="white", label="hollow: not certified")  # fmt: skip
    axes.plot(
        sparsity,
        bounds,
        color=BOUND,
        linewidth=1.0,
        linestyle=(0, (6, 1.5)),
        zorder=1.9,
        label=bound_label(certificate).replace("the risk", "what binds"),
    )


def _draw_curve(
    axes: Axes,
    certificate: Certificate,
    part: Part,
    style: tuple[str, str, str],
    label: str,
    width: float = 1.2,
) -> None:
    line, marker, color = style
    sparsity, risks = percents(certificate), np.array(part.risks) / part.alpha
    step = marker_step(certificate)
    axes.plot(
        sparsity,
        risks,
        color=color,
        linewidth=width,
        linestyle=line,
        marker=marker,
        markersize=4,
        markevery=step,
        label=shortened(label),
    )
    hollow = ~np.array(certificate.rejected) & (np.arange(len(risks)) % step == 0)
    axes.plot(
        sparsity[hollow],
        risks[hollow],
        color=color,
        linestyle="none",
        marker=marker,
        markersize=4,
        markerfacecolor="white",
    )


def draw_each(axes: Axes, certificate: Certificate) -> None:
    """Risk and bound of each part at the certified level, or at the first if there is none."""
    level = certificate.level if certificate.level is not None else certificate.obstacle
    assert level is not None
    parts = [certificate.parts[p] for p in closest(certificate.parts, level)[:MOST_ROWS]]
    binding = certificate.binding
    if binding is not None and not any(part is binding for part in parts):
        parts[-1] = binding
    parts.sort(key=lambda part: (part.bounds[level] / part.alpha, part.risks[level] / part.alpha))
    risks = np.array([part.risks[level] / part.alpha for part in parts])
    bounds = np.array([part.bounds[level] / part.alpha for part in parts])
    rows = np.arange(len(parts))
    right = min(4.0, 1.08 * float(np.nanmax([1.0, *bounds, *risks])))
    axes.hlines(rows, np.nan_to_num(risks), bounds, color=BOUND, linewidth=1.2)
    axes.plot(bounds, rows, "|", color=BOUND, markersize=8, markeredgewidth=1.6)
    axes.plot(risks, rows, "o", color=INK, markersize=4.5)
    axes.axvline(1, color=LIMIT, linewidth=1.4, linestyle="-.")
    axes.set_xlim(-0.03 * right, right)
    axes.set_ylim(-0.7, len(parts) - 0.3)
    names = [shortened(part_text(certificate, part)) for part in parts]
    axes.set_yticks(
        rows,
        [
            f"binds ▸ {name}" if part is binding else name
            for name, part in zip(names, parts, strict=True)
        ],
        fontsize=8,
    )
    for label, part in zip(axes.get_yticklabels(), parts, strict=True):
        label.set_fontweight("bold" if part is binding else "normal")
    clean(axes)
    axes.set_xlabel("Risk (dot) and bound (bar), relative to α")
    which = "Each risk"
    if len(parts) < len(certificate.parts):
        which = f"{len(parts)} of {len(certificate.parts)} risks"
    axes.set_title(
        f"{which} at {sparsity_text(certificate, certificate.sparsities[level])} sparsity",
        loc="left",
        fontsize=9.5,
        color=INK,
    )
