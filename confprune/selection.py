"""Exact thresholds of a whole grid of sparsities, by histograms of integer keys.

The bits of |w| without the sign order as |w| does, so the k-th smallest score is found as its key
is read from the top: a histogram of the high bits over all scores tells for every level which bin
holds its cut, and how many keys of the bin are pruned. Where within the bin the cut lies is then
guessed by interpolation, and the keys of a narrow bracket around it are collected and sorted; what
stands under the bracket is counted, so that a bad guess is noticed, and further digits are counted
instead. 16-bit floats need one read, the others two.

Counts add, and a few keys are soon gathered: so the scores may be split over the ranks of a process
group, and what passes between these is small beside the scores.

Scores on one CUDA device are selected there from end to end, and only the cuts come to the host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from confprune import ops  # noqa: F401  (registers torch.ops.confprune)
from confprune.distributed import ALONE, Ranks

_FIRST_DIGIT = 17  # the counters that weights meet stay in a first-level cache
_COLLECT = 1 << 17  # keys that are always few enough to be sorted
_MOST = 1 << 22  # keys that are collected, however many scores there are
_DEVIATIONS = 5  # half the width of a bracket, in standard deviations of a rank among uniform keys
_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 28}  # scores levelled by one call, which keep it busy

MANTISSA = {torch.float32: 23, torch.float64: 52, torch.float16: 10, torch.bfloat16: 7}
"""Bits of a key below its exponent."""

KEY_BITS = {torch.float32: 31, torch.float64: 63, torch.float16: 15, torch.bfloat16: 15}
"""Bits of a key: those of the type without the sign."""

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
    scores: Mapping[str, Tensor],
    counts: Sequence[int],
    key: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> Cuts:
    """The cuts that prune the `counts[j]` smallest scores at each level j, all tensors competing.

    Parameters
    ----------
    scores : mapping from name to tensor
        Of any shape and strides, on the CPU or CUDA devices; their absolute values count.
    counts : [K]
        Non-decreasing, each at most the number of scores.
    key : torch.dtype, optional
        What `key_type` says of the scores, where that is known without reading them.
    ranks : Ranks
        Who else holds scores: the tensors of the same names, in the same order and of the same
        types, are one after another, rank by rank, the whole. All ranks get the same cuts.

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
    rank = np.asarray(counts, dtype=np.int64)  # the cut is the rank-th smallest key, from 1
    if ranks.size == 1 and (together := _on_one_device(scores)) is not None:
        return _select_on_device(scores, together, rank, key)
    total = int(rank.max(initial=0))  # to count all scores could mean to make them
    cutting = np.flatnonzero(rank > 0)
    below = np.zeros(len(rank), dtype=np.int64)  # keys smaller than every key with this prefix
    equal = np.zeros(len(rank), dtype=np.int64)  # keys with this prefix
    prefix = np.zeros(len(rank), dtype=np.int64)
    prefixes = np.zeros(0, dtype=np.int64)
    shift = KEY_BITS[key]
    while shift > 0:
        first = shift == KEY_BITS[key]
        digit_bits = min(shift, _FIRST_DIGIT if first else _next_digit(len(prefixes), total))
        shift -= digit_bits
        histogram = ranks.sum(_count(scores, key, prefixes, shift, digit_bits))
        if first and histogram[0, infinity_key(key) >> shift :].any():
            _check_nan(scores)
        row = 0 if first else np.searchsorted(prefixes, prefix[cutting])
        before = np.zeros(histogram.size + 1, dtype=np.int64)  # keys in all cells before one
        np.cumsum(histogram, out=before[1:])
        start = before[row << digit_bits]
        cell = np.searchsorted(before, start + (rank - below)[cutting]) - 1
        below[cutting] += before[cell] - start
        equal[cutting] = before[cell + 1] - before[cell]
        prefix[cutting] = prefix[cutting] << digit_bits | cell & ((1 << digit_bits) - 1)
        prefixes = np.unique(prefix[cutting])
        if shift == 0 or not len(cutting):
            break
        inside = _Inside(shift, prefixes, prefix[cutting], (rank - below)[cutting], equal[cutting])
        found = _interpolate(scores, key, inside, total, ranks)
        if found is not None:
            prefix[cutting], below_cut, equal[cutting] = found
            below[cutting] += below_cut
            break
    return Cuts(key, rank, prefix, np.where(rank > 0, rank - below, 0), equal)


def _on_one_device(scores: Mapping[str, Tensor]) -> list[Tensor] | None:
    """All scores at once, where one CUDA device holds them; else None."""
    if not torch.cuda.is_initialized():  # a look at one may mean to read it from a file
        return None
    found: list[Tensor] = []
    try:
        for tensor in scores.values():
            if not tensor.is_cuda or tensor.device != (found or [tensor])[0].device:
                return None
            found.append(tensor)
    except torch.OutOfMemoryError:  # they can still be made one after the other
        return None
    return found or None


def _select_on_device(
    scores: Mapping[str, Tensor], together: list[Tensor], rank: np.ndarray, key: torch.dtype
) -> Cuts:
    """What `select` returns, by one operator and one copy of its results to the host."""
    wanted = torch.from_numpy(rank).to(together[0].device, non_blocking=True)
    found = torch.ops.confprune.magnitude_select(together, key, wanted)
    lengths = np.cumsum([len(part) for part in found])
    keys, below, equal, nan = np.split(torch.cat(found).cpu().numpy(), lengths[:-1])
    if nan.any():
        _check_nan(scores)
    keys, equal = (np.where(rank > 0, values, 0) for values in (keys, equal))
    return Cuts(key, rank, keys, np.where(rank > 0, rank - below, 0), equal)


class _Inside(NamedTuple):
    """Cuts known by the bin they lie in, and their rank among its keys."""

    shift: int  # bits of a key that are not known yet
    prefixes: np.ndarray  # of the bins, increasing
    prefix: np.ndarray  # of each cut's bin
    rank: np.ndarray  # from 1
    size: np.ndarray  # keys in the bin


def _interpolate(
    scores: Mapping[str, Tensor], key: torch.dtype, inside: _Inside, total: int, ranks: Ranks
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The cuts' keys, the keys below each in its bin, and those equal to it.

    None where the keys are not spread evenly enough for that.
    """
    row = np.searchsorted(inside.prefixes, inside.prefix)
    width = 1 << inside.shift
    margin = _DEVIATIONS * np.sqrt(inside.rank * (1 - inside.rank / inside.size)) + 8
    scale = width / inside.size
    low = np.full(len(inside.prefixes), width, dtype=np.int64)
    high = np.zeros(len(inside.prefixes), dtype=np.int64)
    np.minimum.at(low, row, np.maximum(0, (inside.rank - margin) * scale).astype(np.int64))
    np.maximum.at(high, row, np.minimum(width - 1, (inside.rank + margin) * scale).astype(np.int64))
    sizes = np.zeros(len(inside.prefixes))
    sizes[row] = inside.size
    # Every rank holds all keys collected, also of scores that no memory holds.
    limit = max(_COLLECT, min(total // 32, _MOST) // ranks.size)
    if (sizes * (high - low + 1) / width).sum() > limit:
        return None
    low += inside.prefixes << inside.shift
    high += inside.prefixes << inside.shift
    below = np.zeros(len(inside.prefixes), dtype=np.int64)
    keys = collect_keys(scores, key, inside.prefixes, inside.shift, low, high, 2 * limit, below)
    if ranks.sum(np.array([len(keys)]))[0] > 2 * limit:
        return None
    below = ranks.sum(below)
    if ranks.size > 1:
        keys = _merged([ranks.concatenate(keys)])
    start, stop = np.searchsorted(keys, low), np.searchsorted(keys, high, "right")
    at = start[row] + inside.rank - below[row] - 1
    if np.any((at < start[row]) | (at >= stop[row])):
        return None
    cut = keys[at]
    left, right = np.searchsorted(keys, cut), np.searchsorted(keys, cut, "right")
    return cut, below[row] + left - start[row], right - left


def assign(scores: Mapping[str, Tensor], cuts: Cuts, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """The prune level of every score: uint8 up to 255 levels, int16 above; K where it survives all.

    With `ranks`, as for `select`, those of this rank's scores.

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
    tables = _Tables(values, first_level, cuts.ties, straddled)
    passed: Tensor | None = None  # equals that stand before
    levels: dict[str, Tensor] = {}
    for run in _runs(scores, alone=ranks.size > 1):
        tensors = list(run.values())
        device = tensors[0].device
        if passed is None:
            passed = torch.zeros(len(values), dtype=torch.int64, device=device)
        passed, later = passed.to(device), None
        if ranks.size > 1 and straddled.any():
            [own] = tensors
            earlier, later = map(torch.from_numpy, ranks.around(_equals(own, cuts.key, values)))
            passed += earlier.to(device)
        found, passed = torch.ops.confprune.assign_levels(
            tensors, cuts.key, *tables.on(device), passed
        )
        levels.update(zip(run, found, strict=True))
        if later is not None:
            passed += later.to(device)
    return levels


def _runs(scores: Mapping[str, Tensor], *, alone: bool) -> Iterator[dict[str, Tensor]]:
    """The scores in order, `_AT_ONCE` of one device at a time but for larger tensors, or `alone`.

    A look at a tensor may mean to make it, or to read it from a file: so few are held.
    """
    run: dict[str, Tensor] = {}
    room = 0
    for name in scores:
        tensor = scores[name]
        if run and (tensor.numel() > room or tensor.device != next(iter(run.values())).device):
            yield run
            run = {}
        if not run:
            room = 0 if alone else _AT_ONCE.get(tensor.device.type, 0)
        run[name] = tensor
        room -= tensor.numel()
        if room <= 0:
            yield run
            run = {}
    if run:
        yield run


class _Tables:
    """Arrays as tensors on whatever devices they are asked for on."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self._host = [torch.from_numpy(array) for array in arrays]
        self._copies: dict[torch.device, list[Tensor]] = {}

    def on(self, device: torch.device) -> list[Tensor]:
        """The tensors there, the same ones at each call; on the CPU those of the arrays."""
        if device not in self._copies:
            self._copies[device] = [table.to(device, non_blocking=True) for table in self._host]
        return self._copies[device]


def _equals(scores: Tensor, key: torch.dtype, values: np.ndarray) -> np.ndarray:
    """How many keys equal each of some increasing values, [values] int64."""
    prefixes = np.unique(values >> 1)
    counts = _count({"": scores}, key, prefixes, 0, 1)
    return np.asarray(counts[np.searchsorted(prefixes, values >> 1), values & 1])


def _count(
    scores: Mapping[str, Tensor],
    key: torch.dtype,
    prefixes: np.ndarray,
    shift: int,
    digit_bits: int,
) -> np.ndarray:
    """Counts of one digit below each prefix, [prefixes, 2^digit_bits]."""
    shape = max(1, len(prefixes)), 1 << digit_bits
    counts: dict[torch.device, Tensor] = {}
    tables = _Tables(prefixes)
    for tensor in scores.values():
        device = tensor.device
        if device not in counts:
            counts[device] = torch.zeros(shape, dtype=torch.int64, device=device)
        torch.ops.confprune.magnitude_histogram(
            tensor, key, *tables.on(device), shift, digit_bits, counts[device]
        )
    parts = [part.cpu().numpy() for part in counts.values()] or [np.zeros(shape, dtype=np.int64)]
    return functools.reduce(np.add, parts)


def collect_keys(
    scores: Mapping[str, Tensor],
    key: torch.dtype,
    prefixes: np.ndarray,
    shift: int,
    low: np.ndarray,
    high: np.ndarray,
    limit: int,
    below: np.ndarray,
) -> np.ndarray:
    """The keys in [low, high] among those with each prefix, sorted.

    The numbers of keys with each prefix that are under `low` are added to `below`. Ends early once
    there are more than `limit` keys.
    """
    tables = _Tables(prefixes, low, high)
    under = {torch.device("cpu"): torch.from_numpy(below)}
    found: list[np.ndarray] = []
    for tensor in scores.values():
        left, device = limit - sum(map(len, found)), tensor.device
        if left < 0:
            continue
        if device not in under:
            under[device] = torch.zeros(len(below), dtype=torch.int64, device=device)
        wanted, *brackets = tables.on(device)
        keys = torch.ops.confprune.magnitude_collect(
            tensor, key, wanted, shift, *brackets, left, under[device]
        )
        found.append(keys.cpu().numpy())
    for device, counts in under.items():
        if device.type != "cpu":
            below += counts.cpu().numpy()
    return found[0] if len(found) == 1 else _merged(found)


def _merged(runs: Sequence[np.ndarray]) -> np.ndarray:
    """The keys of sorted runs in one, by the sort of NumPy that sees them."""
    return np.sort(np.concatenate(runs), kind="stable")


def infinity_key(key: torch.dtype) -> int:
    """The key of infinity, above which stand those of NaN."""
    return ((1 << (KEY_BITS[key] - MANTISSA[key])) - 1) << MANTISSA[key]


def _check_nan(scores: Mapping[str, Tensor]) -> None:
    """Raise for the first tensor with NaN."""
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
