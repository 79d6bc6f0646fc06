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
        straddled = exact and not self._whole
        if straddled and self._ties == 0:
            last, straddled = last - 1, False
        np.bitwise_and(block.scores, np.iinfo(out.dtype).max, out=out)
        distance = np.subtract(last, out, out=out)
        late = self._late_ties(distance) if straddled else None
        # All ones where the key is larger: a product would make NaN of infinity, and keep -0.
        survives = np.right_shift(distance, 8 * out.itemsize - 1, out=out)
        pruned = survives.astype(block.weights.dtype, copy=False)
        np.bitwise_and(block.weights, pruned, out=pruned)
        if late is not None:
            pruned[late] = block.weights[late]
        return pruned

    def _late_ties(self, distance: Bits) -> NDArray[np.intp] | None:
        """Where the weights at the threshold come too late to be pruned."""
        equal = distance.size - int(np.count_nonzero(distance))
        late = np.flatnonzero(distance == 0)[self._ties :] if equal > self._ties else None
        self._ties -= min(equal, self._ties)
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
