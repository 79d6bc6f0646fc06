"""The operator that masks weights by a cut, against the obvious."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elements import DTYPES, INTEGERS
from hypothesis import given
from hypothesis import strategies as st

from confprune import ops  # noqa: F401  (registers torch.ops.confprune)

cut_weights = torch.ops.confprune.cut_weights

SPECIAL = [0.0, -0.0, 1e-45, -7e-6, 0.5, -0.5, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]


def drawn(size, dtype, seed=0):
    torch.manual_seed(seed)
    special = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(len(SPECIAL), (size,))]
    return torch.where(torch.rand(size) < 0.3, special, torch.randn(size).double()).to(dtype)


def keys_of(weights):
    """Their magnitudes' bits, exact also where an integer type has no room for one more."""
    bits = weights.view(INTEGERS[weights.dtype]).numpy()
    return np.array([int(b) & int(np.iinfo(bits.dtype).max) for b in bits], dtype=object)


def run(weights, *last_keys):
    out, counts = torch.empty_like(weights), torch.tensor([100, 1000])
    return out, counts, cut_weights(weights, *last_keys, out, counts)


@given(
    size=st.one_of(st.integers(0, 10), st.sampled_from([63, 64, 65, 200])),
    dtype=st.sampled_from(DTYPES),
    cuts=st.tuples(*[st.floats(0, 1.01)] * 3),
    seed=st.integers(0, 9),
)
def test_weights_are_masked_counted_and_found(size, dtype, cuts, seed):
    weights = drawn(size, dtype, seed)
    keys = keys_of(weights)
    ordered = [-1, *sorted(keys), (1 << (8 * dtype.itemsize - 1)) - 1]
    last_keys = sorted(int(ordered[min(int(c * len(ordered)), len(ordered) - 1)]) for c in cuts)
    out, counts, places = run(weights, *last_keys)
    sure, pruned, unsure = last_keys
    bits = INTEGERS[dtype]
    expected = torch.where(torch.from_numpy((keys > pruned).astype(bool)), weights.view(bits), 0)
    assert torch.equal(out.view(bits), expected)
    assert counts.tolist() == [100 + sum(keys <= sure), 1000 + int(weights.isnan().sum())]
    assert places.dtype == torch.int32
    assert places.tolist() == np.flatnonzero((keys > sure) & (keys <= unsure)).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_bracket_nothing_is_unsure(dtype):
    weights = drawn(1000, dtype)
    out, counts, places = run(weights, -1, -1, -1)
    assert torch.equal(out.view(INTEGERS[dtype]), weights.view(INTEGERS[dtype]))
    assert counts[0] == 100
    assert places.numel() == 0


def test_the_operator_is_registered_as_torch_wants_it():
    weights = drawn(200, torch.float32)
    arguments = (1 << 29, 1 << 29, 1 << 30, torch.empty(200), torch.zeros(2, dtype=torch.int64))
    torch.library.opcheck(cut_weights.default, (weights, *arguments))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": torch.zeros(3).int()}, TypeError, "weights must be float32, float64"),
        ({"out": torch.zeros(4)}, ValueError, "of one type and shape"),
        ({"out": torch.zeros(3).half()}, ValueError, "of one type and shape"),
        ({"weights": torch.zeros(6)[::2]}, ValueError, "must be contiguous"),
        ({"surely_pruned": -2}, ValueError, "keys in increasing order, or -1, got -2, 2 and 3"),
        ({"pruned": 0}, ValueError, "increasing order"),
        ({"unsure": 1}, ValueError, "increasing order"),
        ({"unsure": 1 << 31}, ValueError, "increasing order"),
        ({"counts": torch.zeros(2)}, TypeError, "counts must be a contiguous int64"),
        ({"counts": torch.zeros(3).long()}, ValueError, "counts holds 3 cells, not 2"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, message):
    arguments = {
        "weights": torch.zeros(3),
        "surely_pruned": 1,
        "pruned": 2,
        "unsure": 3,
        "out": torch.zeros(3),
        "counts": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        cut_weights(**(arguments | changes))
