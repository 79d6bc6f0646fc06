"""Masks of several levels, applied to weights that come block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.reading import Buffers, Bytes
from confprune.checkpoint.weights import Bits, bits_of
from confprune.levels import PruneLevels
from confprune.selection import Cuts


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
        weights = bits_of(block, tensor.dtype)
        for level in self._levels:
            out = bits_of(buffers.take(len(block)), tensor.dtype)
            level.mask(weights, tensor.dtype, out)
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
        weights = bits_of(block, tensor.dtype)
        first = start // weights.itemsize
        levels = self._levels[tensor.name][first : first + len(weights)]
        for j in range(self._size):
            out = bits_of(buffers.take(len(block)), tensor.dtype)
            np.copyto(out, weights)
            np.copyto(out, 0, where=levels <= j)
            yield out


class _Cut:
    """One level: its threshold, and how many of the weights equal to it are still to be pruned."""

    def __init__(self, threshold: float, ties: int, *, whole: bool) -> None:
        self._threshold = threshold
        self._ties = ties
        self._whole = whole

    def mask(self, weights: Bits, dtype: str, out: Bits) -> None:
        last, exact = _last_key(self._threshold, PRUNABLE_DTYPES[dtype])
        straddled = exact and not self._whole
        if straddled and self._ties == 0:
            last, straddled = last - 1, False
        equal = cut_weights(weights, dtype, (last - straddled, last, last), out)
        if straddled:
            late = equal[self._ties :]
            out[late] = weights[late]
            self._ties -= min(len(equal), self._ties)


def cut_weights(
    weights: Bits,
    dtype: str,
    last_keys: Sequence[int],
    out: Bits,
    counts: Tensor | None = None,
) -> NDArray[np.int32]:
    """Write weights to `out`, with zero for those up to the second of three increasing keys.

    Returns
    -------
    [n] int32
        The places of those above the first key and up to the last. To `counts` goes how many are
        up to the first, and how many are NaN.
    """
    of, to = (torch.from_numpy(bits).view(PRUNABLE_DTYPES[dtype]) for bits in (weights, out))
    counts = torch.zeros(2, dtype=torch.int64) if counts is None else counts
    places: Tensor = torch.ops.confprune.cut_weights(of, *last_keys, to, counts)
    return places.numpy()


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
