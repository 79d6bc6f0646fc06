"""The picture of a certificate: risk against sparsity."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from confprune.files import written_whole
from confprune.report import loss_text, promise, sparsity_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from confprune.certificate import Certificate

INK = "#1b2a41"
BAND = "#d5e3ef"
BOUND = "#4f81a8"
LIMIT = "#a4243b"
TEST = "#c4701c"


def plot_certificate(
    certificate: Certificate,
    path: str | os.PathLike[str] | None = None,
    *,
    test_risks: Sequence[float] | None = None,
) -> Figure:
    """Plot the risk of each level with its confidence bound, alpha and the certified point.

    Needs matplotlib: ``pip install confprune[plot]``. No global state of matplotlib is touched.

    Parameters
    ----------
    certificate : Certificate
        What to plot, K levels.
    path : path, optional
        Where to write the picture; the extension decides the format (png, pdf, svg, ...). A crash
        leaves an older file as it was.
    test_risks : sequence of float, length K, optional
        Risk measured on held-out data, drawn over it; NaN where it was not measured.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If `test_risks` has another length than the grid, or the extension is no known format.

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
        raise ImportError("plots need matplotlib: pip install confprune[plot]") from problem
    if test_risks is not None and len(test_risks) != len(certificate.sparsities):
        raise ValueError(
            f"test_risks has {len(test_risks)} values for {len(certificate.sparsities)} sparsities"
        )
    figure = Figure(figsize=(7.6, 5.0), dpi=160, layout="constrained", facecolor="white")
    # Draws without pyplot, whose backend and open figures belong to the user.
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.margins(x=0.02)
    _draw_curves(axes, certificate)
    if test_risks is not None:
        axes.plot(
            _percent(certificate),
            np.asarray(test_risks, dtype=float),
            color=TEST,
            linewidth=1.1,
            linestyle=":",
            marker="x",
            markersize=4.5,
            markevery=_marker_step(certificate),
            label="risk on held-out data",
        )
    _draw_limit(axes, certificate)
    _describe(axes, certificate)
    _mark_certified(axes, certificate)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    if path is not None:
        with written_whole(path) as temporary:
            figure.savefig(temporary)
    return figure


def _percent(certificate: Certificate) -> NDArray[np.float64]:
    return 100 * np.array(certificate.sparsities)


def _marker_step(certificate: Certificate) -> int:
    return max(1, len(certificate.sparsities) // 50)


def _draw_curves(axes: Axes, certificate: Certificate) -> None:
    """Risk with its bound; filled and hollow markers tell certified levels from the others."""
    sparsity, risks = _percent(certificate), np.array(certificate.risks)
    bounds = np.array(certificate.bounds)
    rejected = np.array(certificate.rejected)
    axes.fill_between(sparsity, risks, bounds, color=BAND, linewidth=0)
    axes.plot(sparsity, risks, color=INK, linewidth=1.3)
    for chosen, face, label in (
        (rejected, INK, "risk on the calibration data: certified"),
        (~rejected, "white", "risk on the calibration data: not certified"),
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
                markevery=_marker_step(certificate),
                label=label,
            )
    axes.plot(
        sparsity,
        bounds,
        color=BOUND,
        linewidth=1.3,
        linestyle="--",
        zorder=1.9,
        label=f"upper bound on the risk, each level at {100 * (1 - certificate.delta):.6g} %",
    )


def _draw_limit(axes: Axes, certificate: Certificate) -> None:
    axes.axhline(certificate.alpha, color=LIMIT, linewidth=1.4, linestyle="-.")
    # Where the curves are not: above a chain of certified levels, or below those that failed.
    leftward = _certified_rightmost(certificate)
    axes.annotate(
        f"α = {certificate.alpha:g}",
        xy=(0 if leftward else 1, certificate.alpha),
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
    x, y = 100 * certificate.sparsity, certificate.risk
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
    top, alpha = axes.get_ylim()[1], certificate.alpha
    height = y + 0.18 * top if leftward else y / 2
    if abs(height - alpha) < 0.08 * top:
        height = alpha + (0.1 * top if leftward else -0.1 * top)
    height = min(height, 0.9 * top)
    axes.annotate(
        f"{sparsity_text(certificate, certificate.sparsity)} certified\n"
        f"risk {y:.4f}, bound {certificate.bound:.4f}",
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
    """Axes with their units, a window on the neighbourhood of alpha, and the promise as title."""
    highest = np.nanmax([*certificate.risks, *certificate.bounds, 2 * certificate.alpha])
    top = min(1.05 * highest, 4 * certificate.alpha, 1.02)
    # A little below 0, where the markers of a zero risk lie.
    axes.set_ylim(-0.02 * top, top)
    axes.set_xlabel("Sparsity (% of the prunable weights)")
    axes.set_ylabel(f"Expected {loss_text(certificate)} (0 to 1)", fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    title = textwrap.fill(promise(certificate), 92, break_on_hyphens=False)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, pad=10)
