"""The weights of stored tensors as selection takes them: read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, ValuesView

import torch
from torch import Tensor
from tqdm.auto import tqdm

from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.reading import Buffers, ahead, tensor_blocks

_BLOCK = 1 << 25  # bytes, beside which the counters of a histogram cost little


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

    def find_nan(self) -> StoredTensor | None:
        """The first tensor with a NaN."""
        nan = (self._blocks[key][0] for key in self if self[key].isnan().any())
        return next(nan, None)


class _ReadAhead(ValuesView[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return ahead(super().__iter__())
