"""Rows, N:M, blocks and whole outputs, in linear layers and convolutions of any kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import confprune
from confprune import patterns, prune_levels
from confprune.layout import as_before, inputs_first, outputs_first
from confprune.levels import levels_of
from confprune.patterns import resolve_pattern

GRID = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]

LAYERS = {
    "linear": lambda: nn.Linear(8, 6),
    "conv1d": lambda: nn.Conv1d(8, 6, 3),
    "conv2d": lambda: nn.Conv2d(8, 6, (2, 3)),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(4, 2, 2),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 2),
    "transposed in groups": lambda: nn.ConvTranspose1d(8, 6, 3, groups=2),
    "gpt2": lambda: Conv1D(6, 8),
}


def by_output(module: nn.Module, values: Tensor) -> list[list[Tensor]]:
    """For each output the values of its weights: a list over inputs, each [places]."""
    outputs = []
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        inputs, own = values.shape[:2]
        for group in range(module.groups):
            mine = range(group * inputs // module.groups, (group + 1) * inputs // module.groups)
            outputs += [[values[i, o].flatten() for i in mine] for o in range(own)]
    elif isinstance(module, Conv1D):
        outputs = [[values[i, o].flatten() for i in range(8)] for o in range(6)]
    else:
        outputs = [[value.flatten() for value in row] for row in values]
    return outputs


def ranked(module: nn.Module) -> Tensor:
    """Scores without ties: the magnitudes of a weight that is made of distinct integers."""
    weight = module.weight
    scores = torch.randperm(weight.numel()).view(weight.shape) + 1.0
    weight.data.copy_(scores * (torch.rand(weight.shape) - 0.5).sign())
    return scores


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_compete_alone(kind):
    module = LAYERS[kind]()
    scores = ranked(module)
    levels = prune_levels(module, GRID, scope="row")
    assert levels.sparsities == tuple(GRID)
    assert levels.thresholds.shape == (len(GRID), 0)
    for row, level in zip(
        by_output(module, scores), by_output(module, levels.levels["weight"]), strict=True
    ):
        values, found = torch.cat(row), torch.cat(level)
        order = values.argsort()
        for j, s in enumerate(GRID):
            assert set(values[found <= j].tolist()) == set(
                values[order[: round(s * len(values))]].tolist()
            )


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("m", [2, 4])
def test_n_of_m_inputs_are_pruned_at_each_place_of_the_kernel(kind, m):
    module = LAYERS[kind]()
    if by_output(module, module.weight)[0].__len__() % m:
        pytest.skip("not a multiple")
    scores = ranked(module)
    levels = prune_levels(module, GRID, pattern=f"N:{m}")
    assert levels.sparsities == tuple(n / m for n in range(m))
    assert levels.counts.tolist() == [levels.total * n // m for n in range(m)]
    for row, level in zip(
        by_output(module, scores), by_output(module, levels.levels["weight"]), strict=True
    ):
        values, found = torch.stack(row), torch.stack(level)  # [inputs, places]
        for begin, place in itertools.product(range(0, len(values), m), range(values.shape[1])):
            group, of = values[begin : begin + m, place], found[begin : begin + m, place]
            # The least goes at N = 1; the largest never does.
            assert of[group.argsort()].tolist() == list(range(1, m + 1))


def test_an_asked_for_n_of_m_is_reached_exactly():
    levels = prune_levels(nn.Linear(8, 4), [0.5], pattern="N:4")
    assert levels.sparsities == (0.5,)
    assert levels.mask("weight", 0).view(-1, 4).sum(1).tolist() == [2] * 8
    assert prune_levels(nn.Linear(8, 4), [0.4, 0.99], pattern="N:4").sparsities == (0.5, 0.75)


def test_inputs_that_m_does_not_divide_are_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 10), nn.Linear(10, 4))
    with pytest.raises(ValueError, match=r"multiple of 4 .* '0.weight' \(3\), '2.weight' \(10\);"):
        prune_levels(model, GRID, pattern="N:4")
    levels = prune_levels(model, GRID, pattern="N:4", parameters=["1.weight"])
    assert list(levels.levels) == ["1.weight"]


def slow_blocks(module: nn.Module, values: Tensor, r: int, c: int | None) -> list[list[Tensor]]:
    """The weights of each block, as flat tensors of values."""
    rows = by_output(module, values)
    if c is None:
        return [[torch.cat(row)] for row in rows]
    places = range(rows[0][0].numel())
    return [
        [
            torch.stack(
                [rows[o][i][p] for o in range(top, min(top + r, len(rows)))
                 for i in range(left, min(left + c, len(rows[0])))]
            )
        ]
        for top in range(0, len(rows), r)
        for p in places
        for left in range(0, len(rows[0]), c)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("block", [None, (1, 4), (4, 3), (5, 1), (2, 2), (100, 100)])
def test_blocks_go_by_their_root_mean_square(kind, block):
    module = LAYERS[kind]()
    scores = ranked(module)
    r, c = block or (1, None)
    text = "rows" if block is None else f"{r}x{c}"
    levels = prune_levels(module, GRID, pattern=text)
    blocks = [b[0] for b in slow_blocks(module, scores, r, c)]
    found = [b[0] for b in slow_blocks(module, levels.levels["weight"], r, c)]
    assert all(len(set(level.tolist())) == 1 for level in found)  # whole blocks
    order = sorted(range(len(blocks)), key=lambda b: float(blocks[b].square().mean().sqrt()))
    reached = [0, *itertools.accumulate(len(blocks[b]) for b in order)][:-1]
    nearest = {min(reached, key=lambda n, s=s: (abs(n - s * levels.total), n)) for s in GRID}
    assert levels.counts.tolist() == sorted(nearest)
    assert levels.sparsities == pytest.approx([n / levels.total for n in sorted(nearest)])
    for j, count in enumerate(sorted(nearest)):
        pruned = set(order[: reached.index(count)])
        assert [int(level[0]) <= j for level in found] == [b in pruned for b in range(len(found))]


@given(data=st.data())
@settings(max_examples=40)
def test_blocks_of_several_layers_compete_and_are_reached_again(data):
    shapes = data.draw(
        st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3)
    )
    pattern = data.draw(st.sampled_from(["rows", "2x3", "3x1", "1x2"]))
    scope = data.draw(st.sampled_from(["global", "layer"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    tensors = {str(i): (torch.randn(s) * 2).round() for i, s in enumerate(shapes)}
    levels = levels_of(tensors, np.linspace(0, 0.95, 12), scope=scope, pattern=pattern)
    assert int(levels.counts[-1]) < levels.total  # something survives
    for j, sparsity in enumerate(levels.sparsities):
        pruned = sum(int((~levels.mask(name, j)).sum()) for name in tensors)
        assert pruned == int(levels.counts[j]) == round(sparsity * levels.total)
        alone = levels_of(tensors, [sparsity], scope=scope, pattern=pattern)
        assert all(torch.equal(alone.mask(n, 0), levels.mask(n, j)) for n in tensors)


def test_the_scope_layer_prunes_all_layers_alike():
    model = nn.Sequential(nn.Linear(10, 40), nn.Linear(40, 20))
    model[1].weight.data.mul_(100)
    levels = prune_levels(model, GRID, pattern="rows", scope="layer")
    for j, sparsity in enumerate(levels.sparsities):
        for share in levels.sparsity_by_layer(j).values():
            assert abs(share - sparsity) <= 1 / 20
    alone = prune_levels(model, [0.5], pattern="rows")
    assert alone.sparsity_by_layer(0)["1.weight"] < alone.sparsity_by_layer(0)["0.weight"]


def test_large_and_small_blocks_are_judged_alike():
    tensors = {"wide": torch.full((3, 100), 0.9), "narrow": torch.full((3, 2), 1.0)}
    levels = levels_of(tensors, [0.5, 0.99], pattern="rows")
    assert levels.levels["wide"].max() < 2 == levels.levels["narrow"].max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", [{"scope": "row"}, {"pattern": "N:2"}, {"pattern": "2x2"}])
def test_patterns_take_all_types_ties_and_long_grids(dtype, how):
    tensors = {"w": (torch.randn(6, 4) * 2).round().to(dtype), "v": torch.zeros(4, 6, dtype=dtype)}
    grid = np.linspace(0, 0.99, 300)
    levels = levels_of(tensors, grid, **how)
    wide = levels_of({n: t.double() for n, t in tensors.items()}, grid, **how)
    for name in tensors:
        assert torch.equal(levels.levels[name], wide.levels[name])
    assert levels.levels["w"].dtype == (torch.int16 if len(levels) > 255 else torch.uint8)


def test_rows_are_sorted_in_chunks(monkeypatch):
    matrix = (torch.randn(50, 9) * 2).round()
    counts = np.array([0, 2, 5])
    whole = patterns.levels_in_rows(matrix, counts)
    monkeypatch.setattr(patterns, "_CHUNK", 20)
    assert torch.equal(patterns.levels_in_rows(matrix, counts), whole)


def test_vectors_are_a_single_output():
    tensors = {"bias": torch.tensor([3.0, 1.0, 2.0, 4.0]), "scalar": torch.tensor(1.0)}
    levels = levels_of(tensors, [0.5], scope="row")
    assert levels.mask("bias", 0).tolist() == [True, False, False, True]
    assert levels.mask("scalar", 0).item() is True
    assert levels_of(tensors, [0.0], pattern="rows").levels["scalar"].shape == ()


def test_empty_parameters_take_part():
    tensors = {"none": torch.zeros(0, 4), "narrow": torch.zeros(3, 0), "w": torch.randn(4, 4)}
    for how in ({"scope": "row"}, {"pattern": "N:4"}, {"pattern": "2x2"}, {"pattern": "rows"}):
        levels = levels_of(tensors, [0.5], **how)
        assert {n: level.shape for n, level in levels.levels.items()} == {
            n: t.shape for n, t in tensors.items()
        }
        assert levels.counts.tolist() == [8]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layout_is_undone(kind):
    module = LAYERS[kind]()
    groups = inputs_first(module, ["weight"]).get("weight", 0)
    assert (groups > 0) == ("transposed" in kind or kind == "gpt2")
    weight = module.weight.detach()
    forth = outputs_first(weight, groups)
    expected = torch.stack([torch.stack(row) for row in by_output(module, weight)])
    assert torch.equal(forth.flatten(2) if forth.ndim > 2 else forth.unsqueeze(2), expected)
    assert torch.equal(as_before(forth, weight.shape, groups), weight)


def test_tied_weights_of_a_transposed_layer_have_one_layout():
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(4, 2, 3), "again": nn.ConvTranspose1d(4, 2, 3)})
    model["again"].weight = model["up"].weight
    assert inputs_first(model, ["again.weight"]) == {"again.weight": 1}


# The words.


@pytest.mark.parametrize("text", ["", "N:1", "N:0", "n:4", "4", "0x4", "4x", "row", "N:4 ", "4:2"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match=r"is unknown; write 'N:4' .*, '4x4' .*, or 'rows'$"):
        resolve_pattern(text)


@pytest.mark.parametrize("value", [4, (2, 4), b"N:4", True])
def test_a_pattern_is_a_text(value):
    with pytest.raises(TypeError, match="pattern must be a text, such as 'N:4' or '4x4', got"):
        prune_levels(nn.Linear(4, 4), [0.5], pattern=value)


def test_blocks_larger_than_a_weight_are_the_whole_weight():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 5, 1))
    large = prune_levels(model, [0.0, 0.3, 0.6], pattern=f"{10**30}x{10**12}")
    whole = prune_levels(model, [0.0, 0.3, 0.6], pattern="5x3")
    assert large.sparsities == whole.sparsities
    for name, found in large.levels.items():
        assert torch.equal(found, whole.levels[name])


def test_a_fixed_pattern_is_told_apart():
    with pytest.raises(ValueError, match=r"for 2:4 alone, 'N:4' with sparsities=\[2/4\] of zeros"):
        prune_levels(nn.Linear(4, 4), [0.5], pattern="2:4")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"pattern": "N:4", "scope": "global"}, "every 4 inputs .* leave scope='global' out"),
        ({"pattern": "rows", "scope": "row"}, "leave scope='row' out"),
        ({"pattern": "rows", "scope": "rows"}, "scope 'rows' is unknown"),
    ],
)
def test_scopes_that_contradict_a_pattern_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        prune_levels(nn.Linear(4, 4), [0.5], **how)


def test_levels_say_their_pattern():
    levels = prune_levels(nn.Linear(4, 4), [0.5], pattern="2x2")
    assert "criterion='magnitude', pattern='2x2')" in repr(levels)
    assert (levels.scope, levels.pattern) == ("global", "2x2")


# From pattern to certificate.


@pytest.mark.parametrize("pattern", ["N:4", "2x2", "rows"])
def test_patterns_are_certified_pruned_and_verified(pattern, tmp_path, one_thread):
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    data = torch.randn(400, 8)
    certificate = confprune.calibrate(
        model, data, loss="disagreement", alpha=0.4, delta=0.1, pattern=pattern, progress=False
    )
    assert 0 < certificate.sparsity < 0.75
    certificate.save(tmp_path / "certificate.json")
    loaded = confprune.Certificate.load(tmp_path / "certificate.json")
    assert loaded == certificate
    assert f"criterion magnitude, pattern {pattern})" in " ".join(str(loaded).split())
    sparse = loaded.prune(model)
    zeros = sum(int((layer.weight == 0).sum()) for layer in (sparse[0], sparse[2]))
    assert zeros == round(loaded.sparsity * loaded.pruning.total)
    loaded.verify(model, data, progress=False)


def test_several_patterns_are_candidates_of_one_choice(one_thread):
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    certificate = confprune.calibrate(
        model,
        torch.randn(600, 8),
        loss="soft_disagreement",
        alpha=0.2,
        delta=0.1,
        criterion=["magnitude", "lamp"],
        pattern=[None, "N:2", "rows"],
        progress=False,
    )
    assert certificate.pruning.pattern is None  # the loss of structure costs sparsity
    assert any("among magnitude (global), magnitude (row, N:2)" in n for n in certificate.notes)
    with pytest.raises(ValueError, match="pattern must name at least one, each once"):
        confprune.calibrate(
            model,
            torch.randn(600, 8),
            loss="disagreement",
            alpha=0.2,
            delta=0.1,
            pattern=["rows", "rows"],
        )
