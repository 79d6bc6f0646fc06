"""The weights of stored tensors as selection takes them: read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, ValuesView
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.reading import Buffers, Bytes, ahead, read_pieces, tensor_blocks

_BLOCK = 1 << 25  # bytes, beside which the counters of a histogram cost little

_PIECE = 1024  # weights of a sample that lie together
_DISTANCE = 64  # one piece of a sample in so many, or fewer,
_PIECES = 1 << 15  # lest there be more

Bits = NDArray[Any]
"""Floats as the signed integers of their size."""


class Sample(NamedTuple):
    """Pieces of the weights, at random places in stretches of one length.

    Attributes
    ----------
    keys : [pieces, piece]
        Weights without their signs, as integers of their size.
    places : [pieces] int64
        Where a piece begins among all weights.
    """

    keys: Bits
    places: NDArray[np.int64]


class StoredWeights(Mapping[str, Tensor]):
    """Stored tensors in blocks, each of which is good until the next but one is read.

    Parameters
    ----------
    tensors : sequence of StoredTensor
        In the order that breaks ties.
    bar : tqdm
        Is told of the bytes that are to be read, and of those that were.
    """

    def __init__(self, tensors: Sequence[StoredTensor], bar: tqdm) -> None:
        self._blocks = {
            f"{tensor.name} {start}": (tensor, start, min(tensor.nbytes, start + _BLOCK))
            for tensor in tensors
            for start in range(0, tensor.nbytes, _BLOCK)
        }
        self._tensors = tensors
        self._bar = bar
        self._buffers = Buffers()

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __getitem__(self, key: str) -> Tensor:
        tensor, start, end = self._blocks[key]
        (block,) = tensor_blocks(tensor, start, end, end - start, self._buffers)
        self._bar.update(len(block))
        return torch.from_numpy(block).view(PRUNABLE_DTYPES[tensor.dtype])

    def values(self) -> ValuesView[Tensor]:
        """All blocks, each read while the one before is in use."""
        self._bar.total += sum(end - start for _, start, end in self._blocks.values())
        return _ReadAhead(self)

    @property
    def total(self) -> int:
        """Number of weights."""
        return sum(tensor.size for tensor in self._tensors)

    @property
    def first(self) -> dict[str, int]:
        """By the name of a tensor, how many weights come before its own."""
        sizes = (tensor.size for tensor in self._tensors)
        names = (tensor.name for tensor in self._tensors)
        return dict(zip(names, accumulate(sizes, initial=0), strict=False))

    def sample(self, dtype: torch.dtype) -> Sample | None:
        """A sample, the same for the same weights; None if they are few, or not all of the type."""
        if any(PRUNABLE_DTYPES[tensor.dtype] != dtype for tensor in self._tensors):
            return None
        whole = [tensor.size // _PIECE for tensor in self._tensors]
        stretch = max(_DISTANCE, -(-sum(whole) // _PIECES))
        starts = np.arange(0, sum(whole) - stretch + 1, stretch)
        if not len(starts):
            return None
        # At even distances they could all be of the same few columns.
        chosen = starts + np.random.default_rng(0).integers(stretch, size=len(starts))
        keys = np.empty((len(chosen), _PIECE), dtype=f"i{dtype.itemsize}")
        places = np.empty(len(chosen), dtype=np.int64)
        before = 0  # pieces of the tensors before
        for tensor, pieces in zip(self._tensors, whole, strict=True):
            own = slice(*np.searchsorted(chosen, [before, before + pieces]))
            within = (chosen[own] - before) * _PIECE
            read_pieces(tensor, within * dtype.itemsize, keys[own])
            places[own] = self.first[tensor.name] + within
            before += pieces
        keys &= np.iinfo(keys.dtype).max
        return Sample(keys, places)

    def find_nan(self) -> StoredTensor | None:
        """The first tensor with a NaN."""
        nan = (self._blocks[key][0] for key in self if self[key].isnan().any())
        return next(nan, None)


class _ReadAhead(ValuesView[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return ahead(super().__iter__())


def bits_of(block: Bytes, dtype: str) -> Bits:
    """The weights of a block of a type, as the format has it."""
    return block.view(f"i{PRUNABLE_DTYPES[dtype].itemsize}")
