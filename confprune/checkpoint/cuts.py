"""Where the sparsities cut the tensors of a checkpoint, found in a few reads of bounded size.

As `confprune.selection.select` does it for tensors in memory, but by histograms alone: the keys are
counted digit by digit from the top, each digit in one read of all tensors. 16-bit floats need one
read, float32 two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from confprune import ops  # noqa: F401  (registers torch.ops.confprune)
from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.reading import Buffers, ahead
from confprune.checkpoint.scores import KEY_INTEGER, scored_blocks
from confprune.criteria import Criterion, magnitude
from confprune.selection import Cuts, key_type

Progress = Callable[[int], object]

_BLOCK = 1 << 25  # bytes, beside which the counters of a histogram cost little
_DIGIT = 17  # bits: the counters that weights meet stay in a first-level cache


def find_cuts(
    tensors: Sequence[StoredTensor],
    counts: Sequence[int],
    criterion: Criterion,
    progress: Progress,
) -> Cuts:
    """The cuts that prune the `counts[j]` smallest scores at each level j, all tensors competing.

    Parameters
    ----------
    tensors : sequence of StoredTensor
        In the order that breaks ties.
    counts : [K]
        Non-decreasing, each at most the number of elements.
    criterion : callable
        From a tensor to its scores.
    progress : callable
        Told the number of bytes of each block that has been counted.

    Raises
    ------
    ValueError
        If a score is NaN, naming tensor and file.
    OSError
        If a file cannot be read to its end.
    """
    key = _key_type(tensors, criterion)
    rank = np.asarray(counts, dtype=np.int64)  # the cut is the rank-th smallest key, from 1
    cutting = np.flatnonzero(rank > 0)
    below, equal, prefix = np.zeros((3, len(rank)), dtype=np.int64)
    prefixes = np.zeros(0, dtype=np.int64)
    shift = _key_bits(key)
    for digit_bits in _digits(shift, len(rank)):
        shift -= digit_bits
        histogram = _count(tensors, criterion, key, prefixes, shift, digit_bits, progress)
        cumulative = histogram.cumsum(axis=1)
        rows = np.searchsorted(prefixes, prefix)
        for j in cutting:
            row = rows[j]
            digit = int(np.searchsorted(cumulative[row], rank[j] - below[j]))
            equal[j] = histogram[row, digit]
            below[j] += cumulative[row, digit] - equal[j]
            prefix[j] = (prefix[j] << digit_bits) | digit
        prefixes = np.unique(prefix[cutting])
        if not len(prefixes):
            break
    return Cuts(key, rank, prefix, np.where(rank > 0, rank - below, 0), equal)


def reads(tensors: Sequence[StoredTensor], counts: Sequence[int], criterion: Criterion) -> int:
    """How often `find_cuts` reads the tensors."""
    if not any(counts):
        return 1
    return sum(1 for _ in _digits(_key_bits(_key_type(tensors, criterion)), len(counts)))


def _count(
    tensors: Sequence[StoredTensor],
    criterion: Criterion,
    key: torch.dtype,
    prefixes: NDArray[np.int64],
    shift: int,
    digit_bits: int,
    progress: Progress,
) -> NDArray[np.int64]:
    """Counts of one digit below each prefix, [prefixes, 2^digit_bits]."""
    wanted = torch.from_numpy(prefixes)
    histogram = torch.zeros(max(1, len(prefixes)), 1 << digit_bits, dtype=torch.int64)
    infinity = int(torch.tensor(torch.inf, dtype=key).view(KEY_INTEGER[key.itemsize])) >> shift
    buffers = Buffers()
    blocks = (
        (tensor, block)
        for tensor in tensors
        for block in scored_blocks(tensor, criterion, _BLOCK, buffers)
    )
    for tensor, block in ahead(blocks):
        scores = torch.from_numpy(block.scores).view(block.dtype)
        torch.ops.confprune.magnitude_histogram(scores, key, wanted, shift, digit_bits, histogram)
        # Infinity, or NaN, whose keys stand above it; later reads find none.
        if not len(prefixes) and histogram[0, infinity:].any() and scores.isnan().any():
            raise ValueError(
                f"tensor {tensor.name!r} in {tensor.path} holds NaN, which has no magnitude; "
                "repair the weights, or leave the tensor out with exclude"
            )
        progress(block.weights.nbytes)
    return histogram.numpy()


def _digits(bits: int, levels: int) -> Iterator[int]:
    """The widths of a key's digits from the top: below a prefix a level, the counters stay few."""
    width = _DIGIT
    while bits > 0:
        yield min(bits, width)
        bits -= width
        width = max(1, _DIGIT - (levels - 1).bit_length())


def _key_bits(key: torch.dtype) -> int:
    return 8 * key.itemsize - 1


def _key_type(tensors: Sequence[StoredTensor], criterion: Criterion) -> torch.dtype:
    """The type whose bits are the keys: one that holds all scores exactly."""
    if criterion is not magnitude:
        return torch.float64
    dtypes = {PRUNABLE_DTYPES[tensor.dtype] for tensor in tensors}
    return key_type({str(dtype): torch.empty(0, dtype=dtype) for dtype in dtypes})
