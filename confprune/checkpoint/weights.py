"""The weights of stored tensors as selection takes them: read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, ValuesView
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.reading import Buffers, Bytes, ahead, tensor_blocks, tensor_pieces

_BLOCK = 1 << 25  # bytes, beside which the counters of a histogram cost little

_PIECE = 1024  # weights of a sample that lie together
_DISTANCE = 128  # one piece of a sample in so many, or fewer,
_PIECES = 1 << 14  # lest there be more


class StoredWeights(Mapping[str, Tensor]):
    """Stored tensors in blocks, each of which is good until the next but one is read.

    Parameters
    ----------
    tensors : sequence of StoredTensor
        In the order that breaks ties.
    bar : tqdm
        Is told of the bytes that are read, and of those to come after the first read.
    """

    def __init__(self, tensors: Sequence[StoredTensor], bar: tqdm) -> None:
        self._blocks = {
            f"{tensor.name} {start}": (tensor, start, min(tensor.nbytes, start + _BLOCK))
            for tensor in tensors
            for start in range(0, tensor.nbytes, _BLOCK)
        }
        self._tensors = tensors
        self._bar = bar
        self._reads = 0
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
        if self._reads:
            self._bar.total += sum(end - start for _, start, end in self._blocks.values())
        self._reads += 1
        return _ReadAhead(self)

    @property
    def total(self) -> int:
        """Number of weights."""
        return sum(tensor.size for tensor in self._tensors)

    def sample(self, dtype: torch.dtype) -> NDArray[np.signedinteger[Any]] | None:
        """Bits of the weights in pieces at even distances, [pieces, piece]; None without any.

        None too where not all weights are of the type.
        """
        if any(PRUNABLE_DTYPES[tensor.dtype] != dtype for tensor in self._tensors):
            return None
        pieces: list[Bytes] = []
        size = _PIECE * dtype.itemsize
        step = size * max(_DISTANCE, self.total // (_PIECE * _PIECES))
        at = 0  # where the next piece starts, from the start of the tensor
        for tensor in self._tensors:
            starts = range(at, tensor.nbytes - size + 1, step)
            pieces += tensor_pieces(tensor, starts, size)
            at = max(0, at + len(starts) * step - tensor.nbytes)
        return np.stack(pieces).view(f"i{dtype.itemsize}") if pieces else None

    def find_nan(self) -> StoredTensor | None:
        """The first tensor with a NaN."""
        nan = (self._blocks[key][0] for key in self if self[key].isnan().any())
        return next(nan, None)


class _ReadAhead(ValuesView[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return ahead(super().__iter__())
