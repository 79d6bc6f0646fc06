"""A single cut found in one read of the weights, where a sample tells about where it lies.

A histogram finds the bin of a cut in one read, and the cut in a second. Files are read slowly, so
for one sparsity the bin is guessed from some thousand pieces of the weights instead. The read that
follows counts what lies below the guess and collects what lies in it: where the cut is not there,
that is noticed, and nothing is lost but the read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from confprune.checkpoint.weights import StoredWeights
from confprune.selection import MANTISSA, Cuts, collect_keys, infinity_key

_DEVIATIONS = 8  # half the width of a guess, in standard deviations of the sample's rank
_MOST = 1 << 23  # keys that are collected
_LEAST = 1 << 22  # weights of a file that a sample is worth while for


def select_one(weights: StoredWeights, count: int, key: torch.dtype) -> Cuts | None:
    """The cut that prunes the `count` smallest weights; None where the guess was wrong.

    Nothing is guessed where one read is enough anyway, or the weights are few or of several types.

    Raises
    ------
    ValueError
        If a weight is NaN.
    """
    total = weights.total
    if key.itemsize < 4 or total < _LEAST or not 0 < count <= total:
        return None
    sample = weights.sample(key)
    if sample is None:
        return None
    infinity = infinity_key(key)
    low, high, share = _guess(sample & np.iinfo(sample.dtype).max, count / total)
    if high >= infinity or share * total > _MOST / 2:
        return None
    # All exponents up to that of the guess, so that everything below it is counted; and the last,
    # which is that of NaN.
    first, last = low >> MANTISSA[key], high >> MANTISSA[key]
    prefixes = np.append(np.arange(last + 1), infinity >> MANTISSA[key])
    starts = prefixes << MANTISSA[key]
    ends = starts + (1 << MANTISSA[key]) - 1
    lows, highs = ends + 1, ends.copy()
    lows[first : last + 1] = np.maximum(starts[first : last + 1], low)
    highs[last] = high
    lows[-1] = infinity + 1
    below = np.zeros(len(prefixes), dtype=np.int64)
    keys = np.sort(collect_keys(weights, key, prefixes, MANTISSA[key], lows, highs, _MOST, below))
    if len(keys) > _MOST:
        return None
    if len(keys) and keys[-1] > infinity:
        raise ValueError("a weight is NaN")
    at = count - int(below[:-1].sum()) - 1
    if not 0 <= at < len(keys):
        return None
    cut = keys[at]
    left, right = np.searchsorted(keys, cut), np.searchsorted(keys, cut, "right")
    return Cuts(key, *(np.array([n]) for n in (count, cut, at + 1 - left, right - left)))


def _guess(pieces: NDArray[np.signedinteger[Any]], share: float) -> tuple[int, int, float]:
    """The keys between which the cut should lie, and the share of all keys that does.

    From keys [pieces, piece].
    """
    ordered = np.sort(pieces, axis=None)
    size = len(ordered)
    middle = ordered[min(size - 1, int(share * size))]
    # Neighbours resemble each other: the pieces are the sample, not their weights.
    shares = (pieces <= middle).mean(axis=1)
    margin = _DEVIATIONS * (shares.std() / np.sqrt(len(pieces)) + 1 / size)
    places = np.array([share - margin, share + margin]) * size
    low, high = np.clip(places, 0, size - 1).astype(np.int64)
    top = int(ordered[high]) if places[1] < size - 1 else int(np.iinfo(ordered.dtype).max)
    return int(ordered[low]) if places[0] > 0 else 0, top, 2 * float(margin)
