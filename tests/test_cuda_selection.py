"""The CUDA kernels of selection and prune levels, run on the CPU in lockstep."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import FLAGS, check_sanitized, kernels
from torch import Tensor

from confprune import selection
from confprune.selection import KEY_BITS, Cuts, key_type

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # by number
SHARED = [99 << 10, 227 << 10]  # bytes of shared memory that a block has on one device or another


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def int64(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def arguments(scores: list[Tensor]) -> list[Any]:
    """Data, types, sizes and number of some tensors, as the exports take them."""
    assert all(tensor.is_contiguous() for tensor in scores)
    number = len(scores)
    return [
        (ctypes.c_void_p * number)(*(tensor.data_ptr() for tensor in scores)),
        (ctypes.c_int * number)(*(DTYPES.index(tensor.dtype) for tensor in scores)),
        (ctypes.c_int64 * number)(*(tensor.numel() for tensor in scores)),
        int64(number),
    ]


def named(scores: list[Tensor]) -> dict[str, Tensor]:
    return {str(i): tensor for i, tensor in enumerate(scores)}


def select(scores: list[Tensor], rank: list[int], **device: int) -> list[list[int]]:
    """Keys, numbers below and numbers of equals for each rank, and the number of NaN."""
    key = DTYPES.index(key_type(named(scores)))
    found = [torch.full((size,), -7) for size in (len(rank), len(rank), len(rank), 1)]
    ranks = torch.tensor(rank)
    kernels(**device).cuda_select(
        *arguments(scores), key, pointer(ranks), int64(len(rank)), *map(pointer, found)
    )
    return [tensor.tolist() for tensor in found]


def check_select(scores: list[Tensor], rank: list[int], **device: int) -> None:
    """As on the CPU."""
    cuts = selection.select(named(scores), rank)
    keys, below, equal, nan = select(scores, rank, **device)
    cutting = cuts.counts > 0
    assert keys == np.where(cutting, cuts.keys, 0).tolist()
    assert below == np.where(cutting, cuts.counts - cuts.ties, 0).tolist()
    assert equal == np.where(cutting, cuts.equal, 0).tolist()
    assert nan == [0]


def ranks_of(scores: list[Tensor], levels: int) -> list[int]:
    """Evenly spread, from none to all."""
    total = sum(tensor.numel() for tensor in scores)
    return [round(total * j / max(1, levels - 1)) for j in range(levels)]


# Scores as weights have them, and as they had better not.
KINDS = {
    "normal": lambda n: torch.randn(n, dtype=torch.float64),
    "zeros": lambda n: torch.zeros(n),
    "minus zeros": lambda n: -torch.zeros(n),
    "ones": lambda n: torch.ones(n),
    "two values": lambda n: torch.randint(0, 2, (n,)) + 1.5,
    "pruned before": lambda n: torch.randn(n) * (torch.rand(n) < 0.3),
    "sorted": lambda n: torch.randn(n).sort().values,
    "of all sizes": lambda n: torch.exp2(torch.rand(n) * 36 - 20),
    "tiny": lambda n: torch.randint(0, 9, (n,)) * 1e-45,
    "one large": lambda n: torch.ones(n).index_fill(0, torch.tensor([n // 2]), 3e4),
    "one small": lambda n: torch.ones(n).index_fill(0, torch.tensor([n // 3]), 1e-5),
    "infinities": lambda n: torch.randn(n).where(torch.rand(n) < 0.5, -torch.inf),
}


@pytest.mark.parametrize("shared_bytes", SHARED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_thresholds(kind, dtype, shared_bytes):
    scores = [KINDS[kind](3001).to(dtype)]
    check_select(scores, ranks_of(scores, 8), shared_bytes=shared_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiprocessors", [1, 5])
def test_thresholds_of_many_tiles(multiprocessors, dtype):
    scores = [torch.randn(170_003).to(dtype)]
    device = {"multiprocessors": multiprocessors, "resident": 4, "shared_bytes": 227 << 10}
    check_select(scores, ranks_of(scores, 5)[1:-1], **device)


@pytest.mark.parametrize("levels", [1, 2, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_of_few_and_of_many_levels(dtype, levels):
    scores = [torch.randn(2000).to(dtype)]
    check_select(scores, ranks_of(scores, levels))
    check_select(scores, [2000] * levels)
    check_select(scores, [0] * levels)


def test_thresholds_of_many_tensors_some_empty_some_not_aligned():
    scores = [torch.randn(3 * (i % 7) + 1)[1:] for i in range(120)]
    check_select(scores, ranks_of(scores, 20))
    check_select([], [0])
    check_select([torch.zeros(0)], [0, 0])


@pytest.mark.parametrize("widest", [torch.float32, torch.float64])
def test_narrow_types_are_widened_exactly(widest):
    every = torch.arange(1 << 15).to(torch.int16)
    half, bfloat16 = every.view(torch.float16), every.view(torch.bfloat16)
    scores = [half[: 31 << 10], bfloat16[: 255 << 7], torch.randn(50).to(widest)]
    if widest == torch.float64:
        scores.append((every.int() << 14).view(torch.float32))  # subnormal ones too
    total = sum(tensor.numel() for tensor in scores)
    check_select(scores, list(range(1, total + 1, 997)))
    cuts = selection.select(named(scores), list(range(0, total + 1, 997)))
    check_assign(scores, cuts)


@pytest.mark.parametrize("shared_bytes", SHARED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_counted(dtype, shared_bytes):
    scores = torch.randn(5000).to(dtype)
    scores[[3, 4000]] = torch.nan
    scores[7] = torch.inf
    assert select([scores, -scores], [5, 3000], shared_bytes=shared_bytes)[3] == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_that_misleads_costs_a_look_but_no_exactness(dtype):
    # More scores than are sampled; the smallest and the largest are far from all others.
    scores = torch.rand(150_000, dtype=torch.float64).add(1).to(dtype)
    scores[77_777], scores[5], scores[149_999] = 1e-30, 3e-31, 1e30
    check_select([scores], [1, 2, 3, 75_000, 149_999, 150_000])


SIZES = st.lists(st.integers(0, 700), min_size=1, max_size=4)
DEVICES = st.fixed_dictionaries(
    {
        "multiprocessors": st.integers(1, 5),
        "shared_bytes": st.sampled_from(SHARED),
        "resident": st.integers(1, 4),
        "seed": st.integers(0, 99),
    }
)


@st.composite
def competitions(draw: Any) -> tuple[list[Tensor], list[int]]:
    """Scores with many ties, and ranks."""
    torch.manual_seed(draw(st.integers(0, 999)))
    mixed = draw(st.booleans())
    one = draw(st.sampled_from(DTYPES))
    scores = []
    for size in draw(SIZES):
        dtype = draw(st.sampled_from(DTYPES)) if mixed else one
        values = draw(st.sampled_from([3, 40, 1 << 20]))
        tensor = (torch.randint(-values, values, (size + 1,)) / 17).to(dtype)
        scores.append(tensor[draw(st.integers(0, 1)) :])
    total = sum(tensor.numel() for tensor in scores)
    return scores, sorted(draw(st.lists(st.integers(0, total), min_size=1, max_size=12)))


@given(competitions(), DEVICES)
@settings(max_examples=25)
def test_any_thresholds_and_levels(competition, device):
    scores, rank = competition
    check_select(scores, rank, **device)
    check_assign(scores, selection.select(named(scores), rank), **device)


def tables(cuts: Cuts) -> list[Tensor]:
    """Values, first levels, ties and straddled values, as `assign_levels` takes them."""
    cutting = np.flatnonzero(cuts.counts > 0)
    values, starts = np.unique(cuts.keys[cutting], return_index=True)
    first_level = np.append(cutting[starts], len(cuts.keys)).astype(np.int64)
    straddled = cuts.ties[first_level[:-1]] < cuts.equal[first_level[:-1]]
    return [torch.from_numpy(a) for a in (values, first_level, cuts.ties, straddled)]


def assign(
    scores: list[Tensor], cuts: Cuts, ranks: Tensor, skip: int = 0, **device: int
) -> list[Tensor]:
    """The prune levels of all scores, written `skip` places after what is aligned."""
    values, first_level, ties, straddled = tables(cuts)
    dtype = torch.uint8 if len(ties) <= 255 else torch.int16
    levels = [torch.full((tensor.numel() + skip,), 77, dtype=dtype)[skip:] for tensor in scores]
    kernels(**device).cuda_assign(
        *arguments(scores),
        DTYPES.index(cuts.key),
        *(pointer(values), int64(len(values)), pointer(first_level)),
        *(pointer(ties), int64(len(ties)), pointer(straddled), pointer(ranks)),
        (ctypes.c_void_p * len(scores))(*(tensor.data_ptr() for tensor in levels)),
    )
    return levels


def check_assign(scores: list[Tensor], cuts: Cuts, **options: int) -> None:
    """As on the CPU, in one call, and in one for each tensor."""
    values, *others = tables(cuts)
    together, apart = (torch.zeros(len(values), dtype=torch.int64) for _ in range(2))
    expected, passed = torch.ops.confprune.assign_levels(
        scores, cuts.key, values, *others, together
    )
    found = assign(scores, cuts, together, **options)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(together, passed)
    if len(scores) > 1:
        found = [assign([tensor], cuts, apart, **options)[0] for tensor in scores]
        assert all(map(torch.equal, found, expected))
        assert torch.equal(apart, passed)


def inner_cuts(scores: list[Tensor], levels: int) -> Cuts:
    return selection.select(named(scores), ranks_of(scores, levels + 2)[1:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_levels(kind, dtype):
    scores = [KINDS[kind](3001).to(dtype)]
    check_assign(scores, inner_cuts(scores, 9))


@pytest.mark.parametrize("levels", [1, 126, 127, 255, 256, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_of_any_number(dtype, levels):
    scores = [(torch.randint(-400, 400, (1500,)) / 64).to(dtype), torch.randn(300).to(dtype)]
    check_assign(scores, inner_cuts(scores, levels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [20, 130])
@pytest.mark.parametrize(("resident", "seed"), [(1, 0), (4, 1)])
def test_ties_are_broken_by_position_over_many_tiles(resident, seed, levels, dtype):
    size = 4 * (16 << 10 if levels > 126 or dtype == torch.float64 else 32 << 10)
    scores = [torch.randint(0, 4, (size,)).to(dtype), torch.randint(0, 4, (size // 9,)).to(dtype)]
    device = {"resident": resident, "seed": seed, "multiprocessors": 2}
    check_assign(scores, inner_cuts(scores, levels), **device)


def test_ties_that_come_in_order():
    scores = [torch.arange(100_000).div(20_000).floor().bfloat16()]
    check_assign(scores, inner_cuts(scores, 33))


@pytest.mark.parametrize("levels", [10, 200, 300])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("skip", [0, 1])
def test_levels_of_what_is_not_aligned(skip, offset, levels):
    scores = [torch.randn(40_000).mul(9).round()[offset:]]
    check_assign(scores, inner_cuts(scores, levels), skip=skip)


def test_levels_of_many_tensors_some_empty_some_not_aligned():
    scores = [torch.randint(-5, 6, (i % 9 * 3 + 1,)).float()[i % 2 :] for i in range(52)]
    check_assign(scores, inner_cuts(scores, 20))


def test_no_cut_leaves_all():
    scores = [torch.randn(50), torch.zeros(0), torch.zeros(3)]
    check_assign(scores, selection.select(named(scores), [0, 0]))
    check_assign([], selection.select(named(scores), [0, 10]))


def test_more_cuts_than_fit_one_launch():
    scores = [torch.rand(1_400_000)]
    scores[0][-20:] = scores[0][1_000_000]
    rank = np.arange(1, 32768) * 40
    at = int((scores[0] < scores[0][-1]).sum()) // 40
    rank[at] = int((scores[0] < scores[0][-1]).sum()) + 5
    check_assign(scores, selection.select(named(scores), np.sort(rank).tolist()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_histograms(dtype):
    scores = torch.randn(9000).to(dtype)[1:]
    bits = KEY_BITS[dtype]
    for digit_bits in (5, 15, 17):
        if digit_bits > bits:
            continue
        counts = count(scores, dtype, np.zeros(0, np.int64), bits - digit_bits, digit_bits)
        met = np.flatnonzero(counts)
        if bits - digit_bits >= 3:
            known = np.unique(met[[0, len(met) // 2, -1]])
            count(scores, dtype, known, bits - digit_bits - 3, 3)
    if dtype != torch.float64:
        count(scores, torch.float64, np.array([0, 1020, 1021, 1022]), 63 - 11 - 9, 9)


def count(
    scores: Tensor, key: torch.dtype, prefixes: np.ndarray, shift: int, digit_bits: int
) -> np.ndarray:
    """Counts of a digit, checked against those of the CPU; both add to what is there."""
    expected = torch.full((max(1, len(prefixes)), 1 << digit_bits), 3)
    found = expected.clone()
    rows = torch.from_numpy(prefixes)
    torch.ops.confprune.magnitude_histogram(scores, key, rows, shift, digit_bits, expected)
    kernels().cuda_histogram(
        *(pointer(scores), DTYPES.index(scores.dtype), int64(scores.numel())),
        *(DTYPES.index(key), shift, digit_bits, pointer(rows), int64(len(rows)), pointer(found)),
    )
    assert torch.equal(found, expected)
    return (found - 3).numpy()[0]


@pytest.mark.parametrize("capacity", [0, 10, 10_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_in_brackets(dtype, capacity):
    scores = torch.randn(9000).to(dtype)[1:]
    shift = KEY_BITS[dtype] - 9
    prefixes, sizes = np.unique(keys_of(scores) >> shift, return_counts=True)
    prefixes = torch.from_numpy(np.sort(prefixes[np.argsort(sizes)[-5:]]))
    low = (prefixes << shift) + (1 << shift) // 4
    high = low + (1 << shift) // 2
    tables = (prefixes, low, high)
    under = torch.ones(len(prefixes), dtype=torch.int64)
    expected = torch.ops.confprune.magnitude_collect(
        scores, dtype, prefixes, shift, low, high, 10_000, under
    )
    below = torch.ones_like(under)
    keys, found = torch.full((capacity,), -7), torch.zeros(1, dtype=torch.int64)
    kernels().cuda_collect(
        *(pointer(scores), DTYPES.index(dtype), int64(scores.numel()), DTYPES.index(dtype), shift),
        *(*map(pointer, tables), int64(len(prefixes)), int64(capacity)),
        *map(pointer, (keys, found, below)),
    )
    assert found.item() == len(expected) > 10
    assert torch.equal(below, under)
    if capacity >= len(expected):
        assert torch.equal(keys[: len(expected)].sort().values, expected.sort().values)
        assert (keys[len(expected) :] == -7).all()
    else:
        assert np.isin(keys, expected).all()


def keys_of(scores: Tensor) -> np.ndarray:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[scores.dtype.itemsize]
    return scores.abs().view(integer).to(torch.int64).numpy()


@pytest.mark.skipif(FLAGS in os.environ, reason="runs within itself")
def test_no_access_outside_of_memory():
    """Some of the tests above, again under AddressSanitizer."""
    check_sanitized(
        __file__, "many_tensors or 1-1-10 or 0-1-300 or dtype0-10000 or dtype3-127", "address"
    )


@pytest.mark.skipif(FLAGS in os.environ, reason="runs within itself")
def test_no_races():
    """Some of the tests above, again under ThreadSanitizer."""
    check_sanitized(__file__, "thresholds_of_many_tensors or broken and 4-1-20-dtype2", "thread")
