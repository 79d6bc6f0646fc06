"""The plan of a calibration, as the command line shows it: from a guess to a short report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from confprune.calibration import DEFAULT_SPARSITIES
from confprune.levels import check_sparsities
from confprune.risk.bounds import required_n
from confprune.risk.inputs import FloatArray, check_losses
from confprune.risk.planning import POWER, Simulation

MOST_ROWS = 9
CLEAR = 0.005
"""Levels certified with less probability than this, or more than 1 minus this, are not listed."""


def curve(
    points: Sequence[tuple[float, float]], sparsities: Sequence[float] | None = None
) -> tuple[tuple[float, ...], FloatArray]:
    """A risk for each level of a grid, interpolated between points.

    Parameters
    ----------
    points : sequence of (sparsity, risk)
        With increasing sparsities.
    sparsities : [K], optional
        The grid; default the levels of `confprune.calibrate` between the first and the last point.

    Returns
    -------
    sparsities : tuple of float, length K
    risks : ndarray of float64 [K]

    Raises
    ------
    ValueError
        If the sparsities of the points do not increase, or the grid goes beyond the points: a
        guess says nothing there.

    Examples
    --------
    >>> from confprune.plan import curve
    >>> grid, risks = curve([(0.0, 0.0), (0.9, 0.18)], [0.0, 0.5, 0.9])
    >>> risks
    array([0.  , 0.1 , 0.18])
    """
    at = check_sparsities([sparsity for sparsity, _ in points])
    first, last = at[0], at[-1]
    if sparsities is None:
        grid = tuple(s for s in DEFAULT_SPARSITIES if first <= s <= last)
    else:
        grid = check_sparsities(sparsities)
    if not grid or grid[0] < first or grid[-1] > last:
        raise ValueError(
            f"the risks are given from sparsity {first:g} to {last:g}, which is not where the grid "
            "lies: give a risk at both ends of the grid"
        )
    return grid, np.interp(grid, at, [risk for _, risk in points])


def pilot(
    path: str | os.PathLike[str], sparsities: Sequence[float] | None = None
) -> tuple[tuple[float, ...], FloatArray]:
    """The grid and the losses of a pilot sample, from a file.

    Parameters
    ----------
    path : path
        A ``.npy`` file, or ``.csv`` without a header: losses [m, K].
    sparsities : [K], optional
        The grid; default that of `confprune.calibrate`.

    Returns
    -------
    sparsities : tuple of float, length K
    losses : ndarray [m, K]

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no such matrix, or its columns are not as many as the sparsities.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".csv"):
        raise ValueError(f"{path} is neither .npy nor .csv")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".npy":
            losses = check_losses(np.load(path, allow_pickle=False))
        else:
            losses = check_losses(np.loadtxt(path, delimiter=",", ndmin=2))
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path} is not a matrix of losses: {error}") from error
    grid = DEFAULT_SPARSITIES if sparsities is None else check_sparsities(sparsities)
    if losses.shape[1] != len(grid):
        raise ValueError(
            f"{path} has {losses.shape[1]} columns for {len(grid)} sparsities: name the sparsities "
            "of its columns"
        )
    return grid, losses


def report(simulation: Simulation, risks: FloatArray, alpha: float, delta: float) -> str:
    """The simulation with the levels around the border, and the one wished for, in plain text.

    Parameters
    ----------
    simulation : Simulation
    risks : [K]
        What was taken for the risk of each level.
    alpha, delta : float

    Returns
    -------
    str

    Examples
    --------
    >>> import confprune
    >>> from confprune.plan import curve, report
    >>> grid, risks = curve([(0.0, 0.0), (0.8, 0.2)], [0.0, 0.2, 0.4, 0.6, 0.8])
    >>> print(report(confprune.simulate(grid, risks, 0.07, 0.1, n=500), risks, 0.07, 0.1))
    with 500 examples
      expected certified sparsity     0.121
      certified with probability 0.9  0.000
      losses to evaluate              26.0% of examples x levels
    <BLANKLINE>
      sparsity    risk  certified with probability
         0.000  0.0000                       1.000
         0.200  0.0500                       0.605
         0.400  0.1000                       0.000
    """
    lines = [repr(simulation), "", "  sparsity    risk  certified with probability"]
    shown = set(_border(simulation.probabilities))
    if simulation.wished is not None:
        shown.update(np.flatnonzero(simulation.sparsities >= simulation.wished)[:1].tolist())
    for j in sorted(shown):
        sparsity, probability = simulation.sparsities[j], simulation.probabilities[j]
        lines.append(f"  {sparsity:8.3f}  {risks[j]:.4f}  {probability:26.3f}")
    needed = required_n(alpha, delta)
    if simulation.n < needed:
        lines += ["", f"At least {needed} examples are needed to certify even a zero loss."]
    return "\n".join(lines)


def reaches(simulation: Simulation) -> bool:
    """Whether anything was certified, and the wished sparsity can be."""
    wish = simulation.wished is None or simulation.needed_n is not None
    return wish and bool(simulation.probabilities.any())


def _border(probabilities: FloatArray) -> list[int]:
    """The levels that are neither sure nor hopeless, with a neighbour on either side, thinned."""
    unsure = np.flatnonzero((probabilities > CLEAR) & (probabilities < 1 - CLEAR))
    if not unsure.size:
        unsure = np.flatnonzero(probabilities >= POWER)[-1:]
    first, last = (unsure[0], unsure[-1]) if unsure.size else (0, 0)
    first, last = max(first - 1, 0), min(last + 1, len(probabilities) - 1)
    return sorted({round(j) for j in np.linspace(first, last, MOST_ROWS)})
