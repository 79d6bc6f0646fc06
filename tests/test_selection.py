"""Selection by magnitude, against sorting: thresholds, exact counts, ties, any tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elements import DTYPES, INTEGERS
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import threads
from torch import Tensor, nn
from torch.nn.utils import prune

from confprune import prune_levels, selection
from confprune.levels import levels_of
from confprune.selection import Cuts, assign, key_type, select


def magnitudes(scores: dict[str, Tensor]) -> np.ndarray:
    """All absolute scores in position order; float64 holds every type exactly."""
    return np.concatenate([s.double().abs().flatten().numpy() for s in scores.values()])


def slow_levels(scores: dict[str, Tensor], counts: list[int]) -> np.ndarray:
    """The prune levels by a stable sort."""
    values = magnitudes(scores)
    levels = np.empty(len(values), dtype=np.int64)
    levels[np.argsort(values, kind="stable")] = np.searchsorted(
        counts, np.arange(len(values)), side="right"
    )
    return levels


def check(scores: dict[str, Tensor], counts: list[int]) -> Cuts:
    """Hold selection and prune levels to the sort."""
    cuts = select(scores, counts)
    levels = assign(scores, cuts)
    values = np.sort(magnitudes(scores))
    assert list(levels) == list(scores)
    for name, tensor in scores.items():
        assert levels[name].shape == tensor.shape
        assert levels[name].is_contiguous()
        assert levels[name].dtype == (torch.uint8 if len(counts) <= 255 else torch.int16)
    found = np.concatenate([level.flatten().numpy() for level in levels.values()])
    np.testing.assert_array_equal(found, slow_levels(scores, counts))
    for j, count in enumerate(counts):
        threshold = values[count - 1] if count else -np.inf
        assert cuts.thresholds[j] == threshold
        assert cuts.counts[j] == count
        assert cuts.ties[j] == (np.sum(values[:count] == threshold) if count else 0)
        assert count == 0 or cuts.equal[j] == np.sum(values == threshold)
    return cuts


def some_counts(size: int, levels: int = 7) -> list[int]:
    """Counts from none to nearly all, with one level twice."""
    grid = [round(size * j / levels) for j in range(levels)]
    return sorted([*grid, grid[-1], max(0, size - 1)])


@st.composite
def bit_patterns(draw, dtype: torch.dtype, max_size: int = 40) -> Tensor:
    """Any numbers of a type: every bit pattern is as likely, NaN made 0."""
    width = dtype.itemsize * 8
    whole = st.integers(-(1 << (width - 1)), (1 << (width - 1)) - 1)
    patterns = draw(st.lists(whole, max_size=max_size))
    return torch.tensor(patterns, dtype=INTEGERS[dtype]).view(dtype).nan_to_num(0.0, float("inf"))


@st.composite
def problems(draw) -> tuple[dict[str, Tensor], list[int]]:
    """Several tensors of one or of mixed types, and counts."""
    types = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4))
    if draw(st.booleans()):
        types = types[:1] * len(types)
    scores = {}
    for index, dtype in enumerate(types):
        if draw(st.booleans()):
            scores[str(index)] = draw(bit_patterns(dtype))
        else:
            few = st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, torch.inf]), max_size=30)
            scores[str(index)] = torch.tensor(draw(few), dtype=dtype)
    size = sum(s.numel() for s in scores.values())
    counts = sorted(draw(st.lists(st.integers(0, size), min_size=1, max_size=9)))
    return scores, counts


@pytest.mark.parametrize("at_once", [0, 1, 1000, 1 << 20])
def test_prune_levels_do_not_depend_on_how_many_tensors_are_levelled_at_once(at_once, monkeypatch):
    monkeypatch.setattr(selection, "_AT_ONCE", {"cpu": at_once})
    sizes = [400, 500, 2000, 0, 10, 990, 1, 0]
    scores = {str(i): torch.randint(-4, 5, (size,)).float() for i, size in enumerate(sizes)}
    check(scores, list(range(0, sum(sizes) + 1, 300)))
    runs = [list(run) for run in selection._runs(scores, alone=False)]
    assert (
        runs
        == {
            0: [[name] for name in scores],
            1: [["0"], ["1"], ["2"], ["3"], ["4"], ["5"], ["6"], ["7"]],
            1000: [["0", "1"], ["2"], ["3", "4", "5"], ["6", "7"]],
            1 << 20: [list(scores)],
        }[at_once]
    )
    assert all(len(run) == 1 for run in selection._runs(scores, alone=True))


@given(problem=problems())
@settings(max_examples=200)
def test_selection_is_what_sorting_gives(problem):
    check(*problem)


@given(problem=problems())
@settings(max_examples=30)
def test_selection_by_counting_alone_is_what_sorting_gives(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_COLLECT", -1)  # no keys to spare: all digits are counted
        check(*problem)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=60)
def test_the_order_of_keys_is_the_order_of_magnitudes(dtype, data):
    numbers = data.draw(bit_patterns(dtype, max_size=2).filter(lambda t: len(t) == 2))
    first, second = numbers.double().abs().tolist()
    assert levels_of({"w": numbers}, [0.5]).levels["w"].tolist() == (
        [0, 1] if first <= second else [1, 0]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", [None, torch.float32, torch.float64])
def test_all_16_bit_numbers_are_ordered_exactly_also_among_wider_ones(dtype, key):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    scores = {"w": every[~every.isnan()]}
    if key is not None:
        scores["wide"] = torch.tensor([1.0, 2.0**-30], dtype=key)
    cuts = check(scores, some_counts(sum(s.numel() for s in scores.values()), 100))
    assert cuts.key == (key or dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4095, 4096, 4097, 65535, 65536, 65537, 131073])
def test_sizes_around_those_where_chunks_and_threads_begin(size, dtype):
    scores = {"a": torch.randn(size).to(dtype), "b": torch.randn(7).to(dtype)}
    check(scores, some_counts(size + 7))


@pytest.mark.parametrize("collect", [selection._COLLECT, -1], ids=["collected", "counted"])
@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_does_not_depend_on_the_number_of_threads(dtype, number, collect, monkeypatch):
    monkeypatch.setattr(selection, "_COLLECT", collect)
    scores = {
        "continuous": torch.randn(70_001).to(dtype),
        "rounded": (torch.randn(66_000) * 4).round().to(dtype),
        "small": torch.randn(10, 3).to(dtype),
        "sparse": torch.randn(80_000).to(dtype) * (torch.rand(80_000) < 0.1),
    }
    size = sum(s.numel() for s in scores.values())
    with threads(number):
        check(scores, some_counts(size, 50))


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_broken_by_position_across_tensors_and_threads(dtype, number):
    scores = {name: torch.full((66_000,), -0.25, dtype=dtype) for name in "ab"}
    counts = [0, 1, 65_999, 66_000, 66_001, 131_999]
    with threads(number):
        levels = assign(scores, select(scores, counts))
    found = torch.cat([levels["a"], levels["b"]]).numpy()
    expected = np.searchsorted(counts, np.arange(132_000), side="right")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuts_between_equals_that_are_far_apart(dtype, number):
    scores = {"w": torch.randn(40_001).to(dtype).repeat(2)}
    with threads(number):
        check(scores, [1601 * j for j in range(50)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [1, 2, 254, 255, 256, 1000])
def test_grids_of_any_size(levels, dtype):
    scores = {"w": torch.randn(3000).to(dtype), "v": torch.randn(500).to(dtype)}
    check(scores, [round(3500 * j / levels) for j in range(levels)])


@pytest.mark.parametrize("octaves", [4, 30, 250])
def test_magnitudes_over_many_octaves(octaves):
    scores = {"w": torch.exp2(torch.rand(70_001) * octaves - octaves / 2)}
    check(scores, some_counts(70_001, 50))


@pytest.mark.parametrize("size", [300, 70_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_collected_keys_are_those_from_end_to_end_of_their_brackets(dtype, size):
    scores = torch.randn(size).to(dtype)
    shift = selection.KEY_BITS[dtype] - 8
    keys = scores.abs().view(INTEGERS[dtype]).to(torch.int64).numpy()
    prefixes, first = np.unique(np.sort(keys) >> shift, return_index=True)
    start, some = prefixes << shift, np.sort(keys)[first]
    ends = {  # all of a bin, one key, none, and more than a key can be
        "whole": (start, start + (1 << shift) - 1),
        "one": (some, some),
        "none": (some + 1, some),
        "more": (start - (1 << 20), start + (1 << 61)),
    }
    for low, high in ends.values():
        below = np.full(len(prefixes), 3)
        found = selection.collect_keys(
            {"w": scores}, dtype, prefixes, shift, low, high, size, below
        )
        row = np.searchsorted(prefixes, keys >> shift)
        inside = (keys >= low[row]) & (keys <= high[row])
        np.testing.assert_array_equal(found, np.sort(keys[inside]))
        under = np.bincount(row[keys < low[row]], minlength=len(prefixes))
        np.testing.assert_array_equal(below, 3 + under)


def test_a_bin_may_hold_many_cuts():
    # Within 1 % of one another; every other weight is far away.
    near = 1 + torch.rand(40_000) / 100
    scores = {"w": torch.cat([near, torch.randn(30_000) * 1e-3])}
    check(scores, [30_000 + 100 * j for j in range(200)])


def test_the_longest_grid_uses_the_whole_of_int16():
    scores = {"w": torch.randn(40_000)}
    counts = list(range(32_767))
    levels = assign(scores, select(scores, counts))["w"]
    np.testing.assert_array_equal(levels.numpy(), slow_levels(scores, counts))
    assert levels.max() == 32_767


def test_zero_has_no_sign_and_infinity_is_the_largest():
    scores = {"w": torch.tensor([torch.inf, 0.0, -0.0, -torch.inf, 1e-45, -3e38])}
    cuts = check(scores, [1, 2, 3, 4, 5])
    assert cuts.thresholds.tolist()[1:] == [0.0, scores["w"][4], -scores["w"][5], torch.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_numbers_are_told_apart(dtype):
    small = torch.arange(200, 0, -1).to(INTEGERS[dtype]).view(dtype)
    assert small.abs().max() < torch.finfo(dtype).smallest_normal or dtype == torch.bfloat16
    check({"w": small}, some_counts(200, 20))


@pytest.mark.parametrize("collect", [selection._COLLECT, -1], ids=["collected", "counted"])
def test_magnitudes_that_differ_in_the_last_bit_are_told_apart(collect, monkeypatch):
    monkeypatch.setattr(selection, "_COLLECT", collect)
    for dtype, one in [(torch.float32, 0x3F800000), (torch.float64, 0x3FF0000000000000)]:
        bits = one + torch.randperm(500)
        check({"w": bits.to(INTEGERS[dtype]).view(dtype)}, some_counts(500, 50))


def test_empty_tensors_and_scalars_take_part():
    scores = {"none": torch.zeros(0, 3), "scalar": torch.tensor(-2.0), "w": torch.randn(5)}
    check(scores, [0, 1, 3, 6])
    check({"none": torch.zeros(0)}, [0, 0])
    check({"scalar": torch.tensor(1.0)}, [0, 1])


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1),
    "strided": lambda t: t[::2, 1::3],
    "flipped strides": lambda t: t.permute(3, 2, 1, 0),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "expanded": lambda t: t[:, :1].expand(-1, 9, -1, -1),
    "offset": lambda t: t.flatten()[3:],
    "one column": lambda t: t[..., 2],
    "unit dimensions": lambda t: t[:, None, :, None, 1:2],
}


@pytest.mark.parametrize("size", [(6, 10, 3, 5), (40, 50, 8, 9)], ids=["small", "threaded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_may_have_any_strides_and_position_is_logical(dtype, layout, size):
    # Rounded, so that the position decides between many equals.
    tensor = LAYOUTS[layout]((torch.randn(size) * 8).round().to(dtype))
    copy = tensor.clone(memory_format=torch.contiguous_format)
    scores = {"a": tensor, "b": torch.randn(11).to(dtype)}
    counts = some_counts(tensor.numel() + 11, 20)
    check(scores, counts)
    assert torch.equal(
        assign(scores, select(scores, counts))["a"],
        assign({"a": copy, "b": scores["b"]}, select({"a": copy, "b": scores["b"]}, counts))["a"],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [0, 1])
def test_nan_is_refused_by_name(dtype, sign):
    spoilt = torch.randn(70_000).to(dtype)
    bits = torch.tensor([0x7FFF if dtype.itemsize == 2 else (1 << (dtype.itemsize * 8 - 1)) - 1])
    nan = bits.to(INTEGERS[dtype]).view(dtype)
    spoilt[66_666] = -nan[0] if sign else nan[0]
    assert spoilt.isnan().any()
    for counts in ([0, 5], [0, 0]):
        with pytest.raises(ValueError, match=r"'second' holds NaN.*parameters="):
            select({"first": torch.tensor([torch.inf], dtype=dtype), "second": spoilt}, counts)


def test_the_key_is_the_narrowest_type_that_holds_all():
    def key(*types):
        return key_type({str(i): torch.zeros(1, dtype=t) for i, t in enumerate(types)})

    for dtype in DTYPES:
        assert key(dtype, dtype) == dtype
    assert key(torch.float16, torch.bfloat16) == torch.float32
    assert key(torch.float16, torch.float32) == torch.float32
    assert key(torch.bfloat16, torch.float64) == torch.float64


@given(size=st.integers(1, 3000), sparsity=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40)
def test_counts_are_the_rounded_share(size, sparsity):
    levels = levels_of({"w": torch.ones(size)}, [sparsity])
    assert levels.counts.tolist() == [round(sparsity * size)]
    assert int((levels.levels["w"] == 0).sum()) == round(sparsity * size)


AMOUNTS = [0.1, 0.25, 0.5, 0.77, 0.9, 0.99]


def test_global_masks_are_those_of_torch():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(36, 11))
    levels = prune_levels(model, AMOUNTS)
    for j, amount in enumerate(AMOUNTS):
        torch_pruned = prune_levels(model, [0.5]).prune(model, 0)  # a copy, to be overwritten
        torch_pruned.load_state_dict(model.state_dict())
        layers = [torch_pruned[index] for index in (0, 1, 3)]
        prune.global_unstructured(
            [(layer, "weight") for layer in layers], prune.L1Unstructured, amount=amount
        )
        for index, layer in zip((0, 1, 3), layers, strict=True):
            assert torch.equal(levels.mask(f"{index}.weight", j), layer.weight_mask.bool())


def test_layer_masks_are_those_of_torch():
    model = nn.Sequential(nn.Linear(17, 13), nn.Linear(13, 5))
    levels = prune_levels(model, AMOUNTS, scope="layer")
    for j, amount in enumerate(AMOUNTS):
        for index in (0, 1):
            layer = nn.Linear(1, 1)
            layer.weight = nn.Parameter(model[index].weight.detach().clone())
            prune.l1_unstructured(layer, "weight", amount=amount)
            assert torch.equal(levels.mask(f"{index}.weight", j), layer.weight_mask.bool())
