"""Apply the masks of several levels to weights that come block by block, in the order of ties."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from confprune.checkpoint.cuts import KEY_INTEGER
from confprune.selection import Cuts

_WINDOW = 1 << 18  # elements at a time, so that all steps find them in the caches

Bits = NDArray[Any]
"""Floats as the signed integers of their size."""


class Masks:
    """The masks that cuts make, one a level; called with all blocks of all tensors, in order."""

    def __init__(self, cuts: Cuts) -> None:
        self._levels = [
            _Level(value, int(ties), whole=bool(ties == equal))
            for value, ties, equal in zip(
                cuts.thresholds.tolist(), cuts.ties, cuts.equal, strict=True
            )
        ]

    def masked(self, weights: NDArray[np.uint8], scores: Tensor) -> Iterator[tuple[int, int, Bits]]:
        """Yield (level, first byte, bytes) for pieces of the block, zero where it is pruned."""
        keys = scores.contiguous().view(KEY_INTEGER[scores.dtype]).numpy()
        itemsize = len(weights) // max(1, len(keys))
        values = weights.view(f"i{itemsize}")
        for start in range(0, len(values), _WINDOW):
            window = slice(start, start + _WINDOW)
            magnitudes = keys[window] & np.iinfo(keys.dtype).max
            for j, level in enumerate(self._levels):
                pruned = level.masked(values[window], magnitudes, scores.dtype)
                yield j, start * itemsize, pruned


class _Level:
    """One level: its threshold, and how many of the weights equal to it are still to be pruned."""

    def __init__(self, threshold: float, ties: int, *, whole: bool) -> None:
        self._threshold = threshold
        self._ties = ties
        self._whole = whole

    def masked(self, values: Bits, magnitudes: Bits, dtype: torch.dtype) -> Bits:
        last, exact = _last_key(self._threshold, dtype)
        straddled = exact and not self._whole
        if straddled and self._ties == 0:
            last, straddled = last - 1, False
        # All ones where the key is larger: a product would make NaN of infinity, and keep -0.
        keep = (last - magnitudes) >> (8 * magnitudes.itemsize - 1)
        result: Bits = values & keep.astype(values.dtype, copy=False)
        if straddled:
            self._keep_late_ties(values, magnitudes == last, result)
        return result

    def _keep_late_ties(self, values: Bits, equal: NDArray[np.bool_], result: Bits) -> None:
        count = int(np.count_nonzero(equal))
        if count > self._ties:
            late = np.flatnonzero(equal)[self._ties :]
            result[late] = values[late]
        self._ties -= min(count, self._ties)


@cache
def _last_key(threshold: float, dtype: torch.dtype) -> tuple[int, bool]:
    """The largest key of a type up to a threshold, and whether the threshold is of that type."""
    if threshold < 0:
        return -1, False
    value = torch.tensor(threshold, dtype=torch.float64)
    nearest = value.to(dtype)
    key = int(nearest.view(KEY_INTEGER[dtype]))
    return key - int(nearest > value), bool(nearest == value)
