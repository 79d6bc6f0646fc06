"""What the statistics accept: losses in [0, 1], p-values, and probabilities in (0, 1).

Every refusal names the argument, the value, and the way out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_BLOCK = 4096
"""Rows summed at a time: keeps temporaries small and rounding errors from piling up."""


def check_probability(name: str, value: float) -> float:
    """Return `value` as a float strictly between 0 and 1, or raise ``ValueError``.

    ``TypeError`` for what is no number.

    Examples
    --------
    >>> check_probability("alpha", 0.05)
    0.05
    """
    try:
        if isinstance(value, str):  # which float would take
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}; try {name}=0.1") from None
    if not 0.0 < number < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}; try {name}=0.1")
    return number


def check_grid(sparsities: ArrayLike) -> tuple[float, ...]:
    """Return sparsities as floats, after checking that they are a grid.

    Raises
    ------
    TypeError
        If they are no numbers.
    ValueError
        If they are not strictly increasing, or not all in [0, 1).

    Examples
    --------
    >>> check_grid(np.array([0.5, 0.75]))
    (0.5, 0.75)
    """
    try:
        values = np.asarray(sparsities, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"sparsities must be a list of numbers, such as [0.5, 0.7], got {sparsities!r}"
        ) from None
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"sparsities must be a non-empty one-dimensional grid, got shape {values.shape}; for "
            "one level give [0.5]"
        )
    if values.size > 32767:
        raise ValueError(f"sparsities has {values.size} levels; at most 32767 are supported")
    for s in values:
        if not 0 <= s < 1:
            share = f": {s:g} % is {s / 100:g}" if 1 < s < 100 else ""
            raise ValueError(f"sparsities must be in [0, 1), got {s:g}{share}")
    for a, b in itertools.pairwise(values):
        if b <= a:
            raise ValueError(
                f"sparsities must be strictly increasing, got {b:g} after {a:g}; sort them and "
                "remove duplicates"
            )
    return tuple(float(s) for s in values)


def check_losses(losses: ArrayLike) -> NDArray[Any]:
    """Return `losses` as an array [n, K] of finite numbers in [0, 1].

    Parameters
    ----------
    losses : array_like [n, K]
        Row = example, column = level. Floating point, integer or boolean; not converted, because
        a float32 matrix need not be held twice.

    Returns
    -------
    ndarray [n, K]

    Raises
    ------
    TypeError
        If the entries are not real numbers.
    ValueError
        If the matrix is not two-dimensional, is empty, or has an entry outside of [0, 1].

    Examples
    --------
    >>> check_losses([[0.0, 1.0], [0.5, 0.25]]).shape
    (2, 2)
    """
    array = np.asarray(losses)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"losses must be real numbers, got dtype {array.dtype}; convert to float")
    if array.ndim != 2:
        raise ValueError(
            f"losses must be [n, K] (row = example, column = level), got shape {array.shape}; "
            "for a single level pass losses[:, None]"
        )
    if array.size == 0:
        raise ValueError(f"losses must not be empty, got shape {array.shape}")
    for first, block in _blocks(array):
        # Written so that NaN fails too.
        if not (block.min() >= 0 and block.max() <= 1):
            row, column = np.argwhere(~((block >= 0) & (block <= 1)))[0]
            raise ValueError(
                f"losses must lie in [0, 1], got {block[row, column]} for example {first + row} "
                f"at level {column}; rescale or clip the loss"
            )
    return array


def losses_are_binary(losses: NDArray[Any]) -> bool:
    """Whether every loss is exactly 0 or 1.

    Examples
    --------
    >>> losses_are_binary(np.array([[0.0, 1.0]])), losses_are_binary(np.array([[0.5, 1.0]]))
    (True, False)
    """
    if losses.dtype.kind == "b":
        return True
    return all(bool(((block == 0) | (block == 1)).all()) for _, block in _blocks(losses))


def loss_sums(losses: NDArray[Any]) -> FloatArray:
    """Column sums [K] in float64, block by block.

    Adding ten million rows one after the other could lose seven digits; adding blocks loses three
    fewer, and no float64 copy of the matrix is made.

    Examples
    --------
    >>> loss_sums(np.array([[0.5, 1.0], [0.25, 1.0]], dtype=np.float32))
    array([0.75, 2.  ])
    """
    sums = [block.sum(axis=0, dtype=np.float64) for _, block in _blocks(losses)]
    return np.asarray(np.sum(sums, axis=0), dtype=np.float64)


def check_sums(sums: ArrayLike, n: ArrayLike) -> tuple[FloatArray, IntArray]:
    """Return sums of losses and the numbers of examples behind them, with equal shapes.

    Parameters
    ----------
    sums : array_like [K]
        Sums of losses, each between 0 and its n.
    n : int or array_like [K]
        Numbers of examples; may differ between levels, as with selective prediction.

    Returns
    -------
    sums : ndarray of float64 [K]
    n : ndarray of int64 [K]

    Raises
    ------
    ValueError
        If a count is negative or not an integer, or a sum is outside of [0, n].
    """
    counts = np.asarray(n)
    if not np.array_equal(counts, np.floor(counts)) or np.any(counts < 0):
        raise ValueError(f"n must be a non-negative number of examples, got {n!r}")
    values = np.asarray(sums, dtype=np.float64)
    values, counts = np.broadcast_arrays(values, counts.astype(np.int64))
    wrong = ~((values >= 0) & (values <= counts))
    if wrong.any():
        raise ValueError(
            f"sums must lie in [0, n], got {values[wrong][0]} with n = {counts[wrong][0]}; "
            "pass sums of losses in [0, 1], not means"
        )
    return values, counts


def check_pvalues(pvalues: ArrayLike) -> FloatArray:
    """Return `pvalues` as float64 [K] with entries in [0, 1].

    Raises
    ------
    ValueError
        If it is not one-dimensional, or an entry is NaN or outside of [0, 1].

    Examples
    --------
    >>> check_pvalues([0.5, 1])
    array([0.5, 1. ])
    """
    array = np.asarray(pvalues, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"pvalues must be one-dimensional [K], got shape {array.shape}")
    wrong = np.flatnonzero(~((array >= 0) & (array <= 1)))
    if wrong.size:
        raise ValueError(
            f"pvalues must lie in [0, 1], got {array[wrong[0]]} at level {wrong[0]}; "
            "compute them with confprune.risk.pvalues"
        )
    return array


def _blocks(array: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    for first in range(0, len(array), _BLOCK):
        yield first, array[first : first + _BLOCK]
