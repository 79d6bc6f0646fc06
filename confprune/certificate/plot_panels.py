"""The panels below the risk: examples used by early looks, and accepted predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from confprune.certificate.plot_style import BOUND, INK, clean, percents

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from confprune.certificate import Certificate


def draw_examples(axes: Axes, certificate: Certificate) -> None:
    """The examples on which each level was tested, beside the number there were."""
    looks = certificate.looks
    assert looks is not None
    sparsity, n = percents(certificate), certificate.n
    width = 0.7 * min(np.diff(sparsity), default=1.0)
    axes.bar(sparsity, looks.seen, width=width, color=BOUND, linewidth=0)
    axes.axhline(n, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.3 * n)
    axes.set_yticks([0, n], ["0", f"{n:,}"])
    axes.set_ylabel("Examples\nused", fontsize=9)
    _note(axes, f"{100 * looks.saved:.1f} % of the evaluations saved")
    _finish(axes, certificate)


def draw_acceptance(axes: Axes, certificate: Certificate) -> None:
    """The share of predictions accepted at each level."""
    assert certificate.acceptance is not None
    accepted = 100 * np.array(certificate.acceptance)
    axes.plot(percents(certificate), accepted, color=INK, linewidth=1.0)
    axes.set_ylim(0, 130)
    axes.set_yticks([0, 50, 100])
    axes.set_ylabel("Accepted\n(%)", fontsize=9)
    if certificate.level is not None:
        _note(axes, f"{accepted[certificate.level]:.1f} % accepted at the certified level")
    _finish(axes, certificate)


def _note(axes: Axes, text: str) -> None:
    axes.annotate(
        text,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(4, -1),
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize=8,
        color=INK,
    )


def _finish(axes: Axes, certificate: Certificate) -> None:
    axes.tick_params(labelsize=8)
    clean(axes)
    if certificate.certified:
        axes.axvline(100 * certificate.sparsity, color=INK, linewidth=0.8, linestyle=":")
