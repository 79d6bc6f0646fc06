"""About where a cut lies, told by a sample of the weights.

Weights are pruned in the order of their keys, then of their places. So a cut is a point in that
order, and two points of the sample are around it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from confprune.checkpoint.weights import Bits, Sample, StoredWeights
from confprune.selection import Cuts, infinity_key, select

_DEVIATIONS = 6  # half the width of a bracket, in standard deviations of the sample's rank
_LEAST = 1 << 22  # weights of a file that a sample is worth while for
_PIECES = 1 << 10  # of the sample that tell of its deviation


class Point(NamedTuple):
    """A point in the order of pruning, just in front of a key and place."""

    key: int
    place: int

    def last_key(self, place: int) -> int:
        """The largest key that is in front of the point at this place."""
        return self.key if place < self.place else self.key - 1


class Bracket(NamedTuple):
    """Two points that the cut should lie between, and where it most likely is."""

    low: Point
    cut: Point
    high: Point


def guess(weights: StoredWeights, count: int, key: torch.dtype, most: int) -> Bracket | None:
    """Where the cut lies that prunes the `count` smallest weights.

    None if the bracket would hold more than `most` weights, or the weights are few or of several
    types.

    Raises
    ------
    ValueError
        If a weight of the sample is NaN.
    """
    total = weights.total
    sample = weights.sample(key) if total >= _LEAST else None
    if sample is None:
        return None
    share = count / total
    margin = _margin(sample, share, key)
    if 2 * margin * total > most:
        return None
    size = sample.keys.size
    ends = np.array([share - margin, share, share + margin])
    ranks = np.clip(np.round(size * ends), 0, size).astype(np.int64)
    return Bracket(*_points(sample, ranks, key))


def _margin(sample: Sample, share: float, key: torch.dtype) -> float:
    """How far the share of the sample in front of the cut may be from that of all weights."""
    some = sample.keys[:: max(1, len(sample.keys) // _PIECES)]
    cut = _cuts(some, np.array([round(share * some.size)]), key).keys[0]
    # Neighbours resemble each other: the pieces are the sample, not their weights.
    deviation = np.mean(some <= cut, axis=1).std() / np.sqrt(len(sample.keys))
    return float(_DEVIATIONS * deviation + 1 / len(sample.keys))


def _points(sample: Sample, ranks: NDArray[np.int64], key: torch.dtype) -> list[Point]:
    """The points just behind the weights of these ranks in the sample, from 1.

    That of rank 0 is in front of all weights, that of the last behind all.
    """
    cuts = _cuts(sample.keys, ranks, key)
    points = []
    for rank, cut, ties in zip(*(a.tolist() for a in (ranks, cuts.keys, cuts.ties)), strict=True):
        if rank == 0:
            points.append(Point(0, 0))
        elif rank == sample.keys.size:
            points.append(Point(infinity_key(key) + 1, 0))
        else:
            last = int(np.flatnonzero(sample.keys == cut)[ties - 1])
            piece, at = divmod(last, sample.keys.shape[1])
            points.append(Point(cut, int(sample.places[piece]) + at + 1))
    return points


def _cuts(keys: Bits, counts: NDArray[np.int64], key: torch.dtype) -> Cuts:
    return select({"sample": torch.from_numpy(keys).view(key)}, counts.tolist())
