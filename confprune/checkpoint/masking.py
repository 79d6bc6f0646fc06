"""Apply the masks of several levels to weights that come block by block, in the order of ties."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from confprune.checkpoint.reading import Buffers
from confprune.checkpoint.scores import KEY_INTEGER, Bits, ScoredBlock
from confprune.selection import Cuts


class Masks:
    """The masks that cuts make, one a level; to be called with all blocks in order."""

    def __init__(self, cuts: Cuts) -> None:
        self._levels = [
            _Level(value, int(ties), whole=bool(ties == equal))
            for value, ties, equal in zip(
                cuts.thresholds.tolist(), cuts.ties, cuts.equal, strict=True
            )
        ]

    def masked(self, block: ScoredBlock, buffers: Buffers) -> Iterator[Bits]:
        """The weights of a block at each level, zero where they are pruned, in the buffers."""
        for level in self._levels:
            out = buffers.take(block.scores.nbytes).view(block.scores.dtype)
            yield level.masked(block, out)


class _Level:
    """One level: its threshold, and how many of the weights equal to it are still to be pruned."""

    def __init__(self, threshold: float, ties: int, *, whole: bool) -> None:
        self._threshold = threshold
        self._ties = ties
        self._whole = whole

    def masked(self, block: ScoredBlock, out: Bits) -> Bits:
        last, exact = _last_key(self._threshold, block.dtype)
        keys = np.bitwise_and(block.scores, np.iinfo(out.dtype).max, out=out)
        late = None
        if exact and not self._whole:
            if self._ties:
                late = self._late_ties(keys == last)
            else:
                last -= 1
        # All ones where the key is larger: a product would make NaN of infinity, and keep -0.
        np.subtract(last, keys, out=out)
        np.right_shift(out, 8 * out.itemsize - 1, out=out)
        pruned = out.astype(block.weights.dtype, copy=False)
        np.bitwise_and(block.weights, pruned, out=pruned)
        if late is not None:
            pruned[late] = block.weights[late]
        return pruned

    def _late_ties(self, equal: NDArray[np.bool_]) -> NDArray[np.intp] | None:
        """Where the weights equal to the threshold come too late to be pruned."""
        count = int(np.count_nonzero(equal))
        late = np.flatnonzero(equal)[self._ties :] if count > self._ties else None
        self._ties -= min(count, self._ties)
        return late


@cache
def _last_key(threshold: float, dtype: torch.dtype) -> tuple[int, bool]:
    """The largest key of a type up to a threshold, and whether the threshold is of that type."""
    if threshold < 0:
        return -1, False
    value = torch.tensor(threshold, dtype=torch.float64)
    nearest = value.to(dtype)
    key = int(nearest.view(KEY_INTEGER[dtype.itemsize]))
    return key - int(nearest > value), bool(nearest == value)
