"""Exact thresholds of a whole grid of sparsities, by histograms of integer keys.

The bits of |w| without the sign order as |w| does, so the k-th smallest score is found as its key
is read from the top: a histogram of the high bits over all scores tells for every level which bin
holds its cut. The few keys in those bins are then collected and sorted; where they are many,
because the scores are alike, further digits are counted first. 16-bit floats need one read, float32
two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from confprune import ops  # noqa: F401  (registers torch.ops.confprune)

_FIRST_DIGIT = 18
_COLLECT = 1 << 20  # keys that are always few enough to be sorted
_MANTISSA = {torch.float32: 23, torch.float64: 52, torch.float16: 10, torch.bfloat16: 7}
_KEY_BITS = {torch.float32: 31, torch.float64: 63, torch.float16: 15, torch.bfloat16: 15}
_KEY_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Cuts:
    """Where each level cuts a set of competing scores.

    Attributes
    ----------
    key : torch.dtype
        The floating type whose bits are the keys: one that holds all scores exactly.
    counts : [K] int64
        Number of scores pruned at each level.
    keys : [K] int64
        Key of the largest pruned score; meaningless where `counts` is 0.
    ties : [K] int64
        How many of the scores equal to it are pruned: the first ones in position order.
    equal : [K] int64
        How many there are.
    """

    key: torch.dtype
    counts: np.ndarray
    keys: np.ndarray
    ties: np.ndarray
    equal: np.ndarray

    @property
    def thresholds(self) -> Tensor:
        """The largest pruned score of each level, [K] float64; -inf where none is pruned."""
        bits = torch.from_numpy(self.keys).to(_KEY_INTEGER[self.key.itemsize])
        values = bits.view(self.key).to(torch.float64)
        return torch.where(torch.from_numpy(self.counts) > 0, values, -torch.inf)


def key_type(scores: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest floating type that holds all scores exactly."""
    types = {tensor.dtype for tensor in scores.values()}
    if len(types) == 1:
        return types.pop()
    return torch.float64 if torch.float64 in types else torch.float32


def select(
    scores: Mapping[str, Tensor], counts: Sequence[int], key: torch.dtype | None = None
) -> Cuts:
    """The cuts that prune the `counts[j]` smallest scores at each level j, all tensors competing.

    Parameters
    ----------
    scores : mapping from name to tensor
        CPU tensors of any shape and strides; their absolute values count.
    counts : [K]
        Non-decreasing, each at most the number of scores.
    key : torch.dtype, optional
        What `key_type` says of the scores, where that is known without reading them.

    Raises
    ------
    ValueError
        If a score is NaN, naming its tensor.

    Examples
    --------
    >>> import torch
    >>> from confprune.selection import select
    >>> cuts = select({"w": torch.tensor([3.0, -1.0, 2.0, 2.0])}, [0, 2])
    >>> cuts.thresholds.tolist(), cuts.ties.tolist()
    ([-inf, 2.0], [0, 1])
    """
    key = key or key_type(scores)
    total = max(
        counts, default=0
    )  # of the scores that matter; how many there are beyond is not known yet
    rank = np.asarray(counts, dtype=np.int64)  # the cut is the rank-th smallest key, from 1
    cutting = np.flatnonzero(rank > 0)
    below = np.zeros(len(rank), dtype=np.int64)  # keys smaller than every key with this prefix
    equal = np.zeros(len(rank), dtype=np.int64)  # keys with this prefix
    prefix = np.zeros(len(rank), dtype=np.int64)
    prefixes = np.zeros(0, dtype=np.int64)
    shift = _KEY_BITS[key]
    while shift > 0:
        first = shift == _KEY_BITS[key]
        digit_bits = min(shift, _FIRST_DIGIT if first else _next_digit(len(prefixes), total))
        shift -= digit_bits
        histogram = _count(scores, key, prefixes, shift, digit_bits)
        if first:
            _check_nan(scores, key, histogram[0], shift)
        cumulative = histogram.cumsum(axis=1)
        row = np.zeros(len(rank), dtype=np.int64) if first else np.searchsorted(prefixes, prefix)
        for j in cutting:
            digit = int(np.searchsorted(cumulative[row[j]], rank[j] - below[j]))
            below[j] += cumulative[row[j], digit] - histogram[row[j], digit]
            equal[j] = histogram[row[j], digit]
            prefix[j] = (prefix[j] << digit_bits) | digit
        prefixes, some = np.unique(prefix[cutting], return_index=True)
        sizes = equal[cutting][some]
        if shift > 0 and sizes.sum() <= max(_COLLECT, total // 8):
            ordered = _collect(scores, key, prefixes, shift)
            start = np.concatenate([[0], sizes.cumsum()])[np.searchsorted(prefixes, prefix)]
            place = np.where(rank > 0, start + rank - below - 1, 0)
            prefix = ordered[place] if len(ordered) else prefix
            left, right = (np.searchsorted(ordered, prefix, side) for side in ("left", "right"))
            below, equal = below + left - start, right - left
            break
    return Cuts(key, rank, prefix, np.where(rank > 0, rank - below, 0), equal)


def assign(scores: Mapping[str, Tensor], cuts: Cuts) -> dict[str, Tensor]:
    """The prune level of every score: uint8 up to 255 levels, int16 above; K where it survives all.

    Examples
    --------
    >>> import torch
    >>> from confprune.selection import assign, select
    >>> scores = {"w": torch.tensor([3.0, -1.0, 2.0, 2.0])}
    >>> assign(scores, select(scores, [0, 2, 4]))["w"].tolist()
    [2, 1, 1, 2]
    """
    cutting = np.flatnonzero(cuts.counts > 0)
    values, starts = np.unique(cuts.keys[cutting], return_index=True)
    first_level = np.append(cutting[starts], len(cuts.keys)).astype(np.int64)
    # In steps: all levels of one value see the same equals; the first takes the fewest of them.
    straddled = cuts.ties[first_level[:-1]] < cuts.equal[first_level[:-1]]
    ranks = torch.zeros(len(values), dtype=torch.int64)
    tables = [torch.from_numpy(a) for a in (values, first_level, cuts.ties, straddled)]
    return {
        name: torch.ops.confprune.assign_levels(tensor, cuts.key, *tables, ranks)
        for name, tensor in scores.items()
    }


def _count(
    scores: Mapping[str, Tensor],
    key: torch.dtype,
    prefixes: np.ndarray,
    shift: int,
    digit_bits: int,
) -> np.ndarray:
    """Counts of one digit below each prefix, [prefixes, 2^digit_bits]."""
    histogram = torch.zeros(max(1, len(prefixes)), 1 << digit_bits, dtype=torch.int64)
    for tensor in scores.values():
        torch.ops.confprune.magnitude_histogram(
            tensor, key, torch.from_numpy(prefixes), shift, digit_bits, histogram
        )
    return histogram.numpy()


def _collect(
    scores: Mapping[str, Tensor], key: torch.dtype, prefixes: np.ndarray, shift: int
) -> np.ndarray:
    """All keys with one of these prefixes, sorted."""
    wanted = torch.from_numpy(prefixes)
    found = [
        torch.ops.confprune.magnitude_collect(tensor, key, wanted, shift).numpy()
        for tensor in scores.values()
    ]
    return np.sort(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


def _check_nan(
    scores: Mapping[str, Tensor], key: torch.dtype, histogram: np.ndarray, shift: int
) -> None:
    """Raise for the first tensor with NaN, whose keys stand above that of infinity."""
    infinity = ((1 << (_KEY_BITS[key] - _MANTISSA[key])) - 1) << _MANTISSA[key]
    if not histogram[infinity >> shift :].any():
        return
    for name, tensor in scores.items():
        if tensor.isnan().any():
            raise ValueError(
                f"parameter {name!r} holds NaN, which has no magnitude; repair the weights, or "
                "leave the parameter out with parameters="
            )


def _next_digit(prefixes: int, total: int) -> int:
    """Bits of the next digit: as many as keep the counters few beside the scores."""
    cells = min(max(total // 4, 1 << 14), 1 << 22)
    return max(1, (cells // max(1, prefixes)).bit_length() - 1)
