"""The picture of a certificate: risk against sparsity, and what else there is to see.

One risk is drawn as it is, several relative to their alphas. Panels below show the examples that
early looks used and the share of accepted predictions; beside many risks, each at the certified
level.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from confprune.certificate.plot_panels import draw_acceptance, draw_examples
from confprune.certificate.plot_parts import MOST_CURVES, draw_each, draw_several
from confprune.certificate.plot_style import (
    BAND,
    BOUND,
    INK,
    LIMIT,
    TEST,
    bound_label,
    clean,
    marker_step,
    percents,
    shortened,
    unit,
)
from confprune.certificate.promise import loss_text, promise, sparsity_text
from confprune.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from confprune.certificate import Certificate


def plot_certificate(
    certificate: Certificate,
    path: str | os.PathLike[str] | None = None,
    *,
    test_risks: Sequence[float] | None = None,
) -> Figure:
    """Plot the risk of each level with its confidence bound, alpha and the certified point.

    Needs matplotlib: ``pip install matplotlib``. No global state of matplotlib is touched.

    Parameters
    ----------
    certificate : Certificate
        What to plot, K levels.
    path : path, optional
        Where to write the picture; the extension decides the format (png, pdf, svg, ...). A crash
        leaves an older file as it was.
    test_risks : sequence of float, length K, optional
        Risk measured on held-out data, drawn over it; NaN where it was not measured. With several
        risks, that of the part that binds.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If `test_risks` has another length than the grid, or `path` has no extension, or one that is
        no known format.

    Examples
    --------
    >>> import numpy as np, confprune
    >>> certificate = confprune.calibrate_losses(np.zeros((99, 1)), [0.5], alpha=0.05, delta=0.1)
    >>> plot_certificate(certificate).axes[0].get_xlabel()
    'Sparsity (% of the prunable weights)'
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ImportError("plots need matplotlib: pip install matplotlib") from problem
    if test_risks is not None and len(test_risks) != len(certificate.sparsities):
        raise ValueError(
            f"test_risks has {len(test_risks)} values for {len(certificate.sparsities)} sparsities"
        )
    if path is not None and not Path(path).suffix:
        raise ValueError(f"path {os.fspath(path)} has no extension: name a format, as in risk.png")
    below = []
    if certificate.acceptance is not None:
        below.append(draw_acceptance)
    if certificate.looks is not None and len(certificate.looks.sizes) > 1:
        below.append(draw_examples)
    many = len(certificate.parts) > MOST_CURVES
    size = (11.6 if many else 7.6, 5.0 + 0.9 * len(below))
    figure = Figure(figsize=size, dpi=160, layout="constrained", facecolor="white")
    # Draws without pyplot, whose backend and open figures belong to the user.
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        1 + len(below),
        2 if many else 1,
        height_ratios=[4.2, *(1 for _ in below)],
        width_ratios=[1.9, 1] if many else [1],
    )
    axes = figure.add_subplot(grid[0, 0])
    axes.margins(x=0.02)
    if certificate.parts:
        draw_several(axes, certificate)
    else:
        _draw_single(axes, certificate)
    if test_risks is not None:
        axes.plot(
            percents(certificate),
            np.asarray(test_risks, dtype=float) / unit(certificate),
            color=TEST,
            linewidth=1.1,
            linestyle=":",
            marker="x",
            markersize=4.5,
            markevery=marker_step(certificate),
            label="what binds, on held-out data" if certificate.parts else "risk on held-out data",
        )
    _draw_limit(axes, certificate)
    _describe(axes, certificate)
    _mark_certified(axes, certificate)
    last = axes
    for row, draw in enumerate(below, start=1):
        last.tick_params(labelbottom=False)
        last = figure.add_subplot(grid[row, 0], sharex=axes)
        draw(last, certificate)
    last.set_xlabel("Sparsity (% of the prunable weights)")
    title = textwrap.fill(promise(certificate), 142 if many else 92, break_on_hyphens=False)
    style: dict[str, Any] = {"fontsize": 9.5, "color": INK}
    if many:
        draw_each(figure.add_subplot(grid[:, 1]), certificate)
        figure.suptitle(title, x=0.01, ha="left", **style)
    else:
        axes.set_title(title, loc="left", pad=10, **style)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    if path is not None:
        with written_whole(path) as temporary:
            figure.savefig(temporary)
    return figure


def _draw_single(axes: Axes, certificate: Certificate) -> None:
    """Risk with its bound; filled and hollow markers tell certified levels from the others."""
    sparsity, risks = percents(certificate), np.array(certificate.risks)
    bounds = np.array(certificate.bounds)
    rejected = np.array(certificate.rejected)
    tested = ~np.isnan(risks)
    kind = "risk" if certificate.guarantee == "risk" else "monotonised risk"
    if certificate.delta is not None:
        axes.fill_between(sparsity, risks, bounds, color=BAND, linewidth=0)
    axes.plot(sparsity, risks, color=INK, linewidth=1.3)
    for chosen, face, label in (
        (rejected & tested, INK, f"{kind} on the calibration data: certified"),
        (~rejected & tested, "white", f"{kind} on the calibration data: not certified"),
    ):
        if chosen.any():
            axes.plot(
                sparsity[chosen],
                risks[chosen],
                color=INK,
                linestyle="none",
                marker="o",
                markersize=3.8,
                markeredgewidth=0.9,
                markerfacecolor=face,
                markevery=marker_step(certificate),
                label=label,
            )
    if certificate.delta is not None:
        axes.plot(
            sparsity,
            bounds,
            color=BOUND,
            linewidth=1.3,
            linestyle="--",
            zorder=1.9,
            label=bound_label(certificate),
        )


def _draw_limit(axes: Axes, certificate: Certificate) -> None:
    limit = certificate.alpha / unit(certificate)
    axes.axhline(limit, color=LIMIT, linewidth=1.4, linestyle="-.")
    # Where the curves are not: above a chain of certified levels, or below those that failed.
    leftward = _certified_rightmost(certificate)
    axes.annotate(
        "α of each risk" if certificate.parts else f"α = {certificate.alpha:g}",
        xy=(0 if leftward else 1, limit),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4) if leftward else (-4, -5),
        textcoords="offset points",
        ha="left" if leftward else "right",
        va="bottom" if leftward else "top",
        color=LIMIT,
    )


def _certified_rightmost(certificate: Certificate) -> bool:
    """Whether the certified level lies in the right half of the grid."""
    first, last = certificate.sparsities[0], certificate.sparsities[-1]
    return certificate.certified and certificate.sparsity >= (first + last) / 2


def _mark_certified(axes: Axes, certificate: Certificate) -> None:
    if certificate.risk is None:
        return
    x, y = 100 * certificate.sparsity, certificate.risk / unit(certificate)
    axes.axvline(x, color=INK, linewidth=0.8, linestyle=":")
    axes.plot(
        [x],
        [y],
        linestyle="none",
        marker="D",
        markersize=9,
        markerfacecolor="white",
        markeredgecolor=INK,
        markeredgewidth=1.8,
        zorder=5,
    )
    leftward = _certified_rightmost(certificate)
    left, right = axes.get_xlim()
    top, alpha = axes.get_ylim()[1], certificate.alpha / unit(certificate)
    height = y + 0.18 * top if leftward else y / 2
    # The text must not lie on the line of alpha; what binds takes a third line.
    room = (0.1 if certificate.binding is None else 0.15) * top
    if certificate.binding is not None:
        height = max(height, 0.7 * room)
    if abs(height - alpha) < 0.8 * room:
        height = alpha + (room if leftward else -room)
    height = min(height, top - room)
    values = f"risk {certificate.risk:.4f}"
    if certificate.delta is not None:
        values += f", bound {certificate.bound:.4f}"
    if certificate.binding is not None:
        values = f"binding: {shortened(certificate.binding.name)}\n{values}"
    axes.annotate(
        f"{sparsity_text(certificate, certificate.sparsity)} certified\n{values}",
        xy=(x, y),
        xytext=(x + (-0.06 if leftward else 0.06) * (right - left), height),
        ha="right" if leftward else "left",
        va="center",
        color=INK,
        bbox={"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "none"},
        arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.8, "shrinkB": 7},
        zorder=6,
    )


def _describe(axes: Axes, certificate: Certificate) -> None:
    """Axes with their units, and a window on the neighbourhood of alpha."""
    limit = certificate.alpha / unit(certificate)
    curves = [np.array([part.risks, part.bounds]) / part.alpha for part in certificate.parts]
    curves = curves or [np.array([certificate.risks, certificate.bounds])]
    highest = max(2 * limit, *(float(np.max(np.nan_to_num(values))) for values in curves))
    top = min(1.05 * highest, 4 * limit)
    if not certificate.parts:
        top = min(top, 1.02)
    # A little below 0, where the markers of a zero risk lie.
    axes.set_ylim(-0.02 * top, top)
    if certificate.parts:
        axes.set_ylabel("Risk relative to its α", fontsize=9)
    else:
        label = f"Expected {loss_text(certificate)} (0 to 1)"
        axes.set_ylabel(textwrap.fill(label, 56), fontsize=9)
    clean(axes)
