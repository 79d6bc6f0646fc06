"""What the panels of the plot share: colours, the scale of the axes, and wording."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from confprune.certificate.promise import confidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from confprune.certificate import Certificate

INK = "#1b2a41"
BAND = "#d5e3ef"
BOUND = "#4f81a8"
LIMIT = "#a4243b"
TEST = "#c4701c"
OTHERS = "#a9b4c0"
LONGEST_NAME = 34


def percents(certificate: Certificate) -> NDArray[np.float64]:
    """The sparsities in percent, [K]."""
    return 100 * np.array(certificate.sparsities)


def unit(certificate: Certificate) -> float:
    """What risks are drawn relative to: alpha where there are several, else 1."""
    return certificate.alpha if certificate.parts else 1.0


def marker_step(certificate: Certificate) -> int:
    """Every how many levels there is room for a marker."""
    return max(1, len(certificate.sparsities) // 50)


def bound_label(certificate: Certificate) -> str:
    """What the bounds of a certificate are, with delta."""
    return f"upper bound on the risk, each level at {confidence(certificate)}"


def shortened(name: str) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def clean(axes: Axes) -> None:
    """A light grid behind the data, and no frame."""
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
