"""Masks by a guessed cut, so that a file is read once: to be masked and written.

What is surely in front of the cut or behind it is masked for good. The few weights between are
masked as is most likely, and remembered: at the end it is known which of them is the last to be
pruned, and what was written wrong. Where the cut is elsewhere, that is known too, and only time is
lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from confprune.checkpoint.guess import Bracket, guess
from confprune.checkpoint.layout import StoredTensor
from confprune.checkpoint.masking import MasksFromCuts, cut_weights
from confprune.checkpoint.reading import Buffers, Bytes
from confprune.checkpoint.weights import Bits, StoredWeights, bits_of
from confprune.selection import select

_MOST = 1 << 24  # weights that are remembered


class Correction(NamedTuple):
    """Weights of a tensor that were masked wrong.

    Attributes
    ----------
    tensor : StoredTensor
    places : [n] int64
        Where in the tensor.
    weights : [n]
        What belongs there.
    """

    tensor: StoredTensor
    places: NDArray[np.int64]
    weights: Bits


def guessed_masks(weights: StoredWeights, count: int, key: torch.dtype) -> GuessedMasks | None:
    """Masks that most likely prune the `count` smallest weights; None where nothing can be guessed.

    Raises
    ------
    ValueError
        If a weight that was looked at is NaN.
    """
    bracket = guess(weights, count, key, 3 * _MOST // 4)
    return None if bracket is None else GuessedMasks(weights, count, key, bracket)


class GuessedMasks:
    """The mask that a guessed cut makes, where blocks come in the order that breaks ties.

    Parameters
    ----------
    weights : StoredWeights
        What competes.
    count : int
        How many are to be pruned.
    key : torch.dtype
        The type of all weights.
    bracket : Bracket
        Where the cut should be.
    """

    def __init__(
        self, weights: StoredWeights, count: int, key: torch.dtype, bracket: Bracket
    ) -> None:
        self._selection = weights, [count], key
        self._first = weights.first
        self._count = count
        self._bracket = bracket
        self._counts = torch.zeros(2, dtype=torch.int64)  # surely pruned; NaN
        self._unsure: list[_Unsure] = []
        self._size = 0

    def masked(
        self, tensor: StoredTensor, start: int, block: Bytes, buffers: Buffers
    ) -> Iterator[Bits]:
        """See `Masks`.

        Raises
        ------
        ValueError
            If a weight is NaN.
        """
        weights = bits_of(block, tensor.dtype)
        out = bits_of(buffers.take(len(block)), tensor.dtype)
        start //= weights.itemsize
        first = self._first[tensor.name] + start
        points = {point.place - first for point in self._bracket}
        ends = sorted({0, len(weights)} | {at for at in points if 0 < at < len(weights)})
        for begin, end in pairwise(ends):
            last_keys = [point.last_key(first + begin) for point in self._bracket]
            part = weights[begin:end]
            places = cut_weights(part, tensor.dtype, last_keys, out[begin:end], self._counts)
            self._size += len(places)
            if self._size <= _MOST:
                met = _Unsure(tensor, start + begin, last_keys[1], places, part[places])
                self._unsure.append(met)
        if self._counts[1]:
            raise ValueError("a weight is NaN")
        yield out

    def corrections(self) -> list[Correction] | None:
        """What is wrong in the masks, once all blocks have come; None where the guess was."""
        rank = self._count - int(self._counts[0])  # of the last that is pruned, among the unsure
        if not 0 <= rank <= self._size <= _MOST:
            return None
        cut, ties = self._exact_cut(rank)
        corrections = []
        for unsure in self._unsure:
            keys = unsure.keys
            pruned = keys < cut
            tied = np.flatnonzero(keys == cut)[:ties]
            pruned[tied] = True
            ties -= len(tied)
            wrong = np.flatnonzero(pruned != (keys <= unsure.last_zeroed))
            places = unsure.start + unsure.places[wrong].astype(np.int64)
            weights = np.where(pruned[wrong], keys.dtype.type(0), unsure.weights[wrong])
            corrections.append(Correction(unsure.tensor, places, weights))
        return corrections

    def _exact_cut(self, rank: int) -> tuple[int, int]:
        """The largest key that is pruned, and how many of the unsure weights with it are."""
        if rank == 0:
            return -1, 0
        _, _, key = self._selection
        weights = torch.from_numpy(np.concatenate([unsure.weights for unsure in self._unsure]))
        cuts = select({"unsure": weights.view(key)}, [rank])
        return int(cuts.keys[0]), int(cuts.ties[0])

    def exact(self) -> MasksFromCuts:
        """The masks without a guess: all weights are read to find them."""
        return MasksFromCuts(select(*self._selection))


class _Unsure(NamedTuple):
    """The weights within the bracket, of a part of a tensor."""

    tensor: StoredTensor
    start: int  # of the part, in the tensor
    last_zeroed: int  # key
    places: NDArray[np.int32]  # in the part
    weights: Bits

    @property
    def keys(self) -> Bits:
        return self.weights & np.iinfo(self.weights.dtype).max
