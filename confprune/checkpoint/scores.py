"""The scores of a tensor in a file, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.reading import Buffers, tensor_blocks
from confprune.criteria import Criterion, magnitude

KEY_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""The integers that hold the bits of floats, by bytes."""

Bits = NDArray[Any]
"""Floats, as such integers."""


class ScoredBlock(NamedTuple):
    """Consecutive weights of a tensor, and their scores, which are of type `dtype`."""

    weights: Bits
    scores: Bits
    dtype: torch.dtype


def scored_blocks(
    tensor: StoredTensor, criterion: Criterion, size: int, buffers: Buffers
) -> Iterator[ScoredBlock]:
    """The weights of a tensor, at most `size` bytes at a time, good as `Buffers` says."""
    dtype = PRUNABLE_DTYPES[tensor.dtype]
    if criterion is magnitude:
        for block in tensor_blocks(tensor, size, buffers):
            weights = block.view(f"i{dtype.itemsize}")
            yield ScoredBlock(weights, weights, dtype)
        return
    # Any other score may depend on the whole tensor.
    for whole in tensor_blocks(tensor, tensor.nbytes, buffers):
        weights = whole.view(f"i{dtype.itemsize}")
        scores = criterion(torch.from_numpy(weights).view(dtype).view(tensor.shape)).reshape(-1)
        yield ScoredBlock(
            weights, scores.view(KEY_INTEGER[scores.dtype.itemsize]).numpy(), scores.dtype
        )
