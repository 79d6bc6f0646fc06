"""Masks of several levels, applied to weights that come block by block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.reading import Buffers, Bytes
from confprune.levels import PruneLevels
from confprune.selection import Cuts

Bits = NDArray[Any]
"""Floats as the signed integers of their size."""


class Masks(Protocol):
    """The masks of all levels."""

    def masked(
        self, tensor: StoredTensor, start: int, block: Bytes, buffers: Buffers
    ) -> Iterator[Bits]:
        """The weights of a block at each level, zero where they are pruned, in the buffers.

        Parameters
        ----------
        tensor : StoredTensor
        start : int
            Where in the tensor the block begins, in bytes.
        block : Bytes
        buffers : Buffers
        """
        ...


class MasksFromCuts:
    """The masks that cuts make, where blocks come in the order that breaks ties."""

    def __init__(self, cuts: Cuts) -> None:
        self._levels = [
            _Cut(value, int(ties), whole=bool(ties == equal))
            for value, ties, equal in zip(
                cuts.thresholds.tolist(), cuts.ties, cuts.equal, strict=True
            )
        ]

    def masked(
        self, tensor: StoredTensor, start: int, block: Bytes, buffers: Buffers
    ) -> Iterator[Bits]:
        """See `Masks`."""
        dtype = PRUNABLE_DTYPES[tensor.dtype]
        weights = _bits(block, dtype)
        for level in self._levels:
            out = _bits(buffers.take(len(block)), dtype)
            level.mask(weights, dtype, out)
            yield out


class MasksFromLevels:
    """The masks of prune levels in memory."""

    def __init__(self, levels: PruneLevels) -> None:
        self._size = len(levels)
        self._levels = {name: flat.reshape(-1).numpy() for name, flat in levels.levels.items()}

    def masked(
        self, tensor: StoredTensor, start: int, block: Bytes, buffers: Buffers
    ) -> Iterator[Bits]:
        """See `Masks`."""
        dtype = PRUNABLE_DTYPES[tensor.dtype]
        weights = _bits(block, dtype)
        first = start // dtype.itemsize
        levels = self._levels[tensor.name][first : first + len(weights)]
        for j in range(self._size):
            out = _bits(buffers.take(len(block)), dtype)
            np.copyto(out, weights)
            np.copyto(out, 0, where=levels <= j)
            yield out


class _Cut:
    """One level: its threshold, and how many of the weights equal to it are still to be pruned."""

    def __init__(self, threshold: float, ties: int, *, whole: bool) -> None:
        self._threshold = threshold
        self._ties = ties
        self._whole = whole

    def mask(self, weights: Bits, dtype: torch.dtype, out: Bits) -> None:
        last, exact = _last_key(self._threshold, dtype)
        straddled = exact and not self._whole
        if straddled and self._ties == 0:
            last, straddled = last - 1, False
        np.bitwise_and(weights, np.iinfo(out.dtype).max, out=out)
        distance = np.subtract(last, out, out=out)
        late = self._late_ties(distance) if straddled else None
        # All ones where the key is larger: a product would make NaN of infinity, and keep -0.
        survives = np.right_shift(distance, 8 * out.itemsize - 1, out=out)
        np.bitwise_and(weights, survives, out=out)
        if late is not None:
            out[late] = weights[late]

    def _late_ties(self, distance: Bits) -> NDArray[np.intp] | None:
        """Where the weights at the threshold come too late to be pruned."""
        equal = distance.size - int(np.count_nonzero(distance))
        late = np.flatnonzero(distance == 0)[self._ties :] if equal > self._ties else None
        self._ties -= min(equal, self._ties)
        return late


def _bits(block: Bytes, dtype: torch.dtype) -> Bits:
    return block.view(f"i{dtype.itemsize}")


@cache
def _last_key(threshold: float, dtype: torch.dtype) -> tuple[int, bool]:
    """The largest key of a type up to a threshold, and whether the threshold is of that type."""
    if threshold < 0:
        return -1, False
    value = torch.tensor(threshold, dtype=torch.float64)
    nearest = value.to(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    key = int(nearest.view(integer))
    return key - int(nearest > value), bool(nearest == value)
