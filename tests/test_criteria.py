"""Criteria against the definitions of their papers, written out; names, settings and selection."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import confprune
from confprune import criteria, prune_levels
from confprune.criteria import Criterion, Scores, WeightObserver, resolve_criterion
from confprune.criteria import scores as scores_module
from confprune.levels import levels_of

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
GRID = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, (1, 5), bias=False), nn.Flatten(), nn.Linear(40, 11)
    )


def statistics_of(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What all criteria need, drawn at random."""
    return {
        "deviation": {n: torch.rand(t.shape).double() for n, t in tensors.items()},
        "input_norm": {n: torch.rand(1, *t.shape[1:]) + 0.1 for n, t in tensors.items()},
    }


def kept_by_layer(levels: confprune.PruneLevels, j: int) -> list[int]:
    return [int((level > j).sum()) for level in levels.levels.values()]


# The formulas.


def slow_lamp(weight: Tensor) -> list[float]:
    flat = weight.flatten().double().tolist()
    order = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), i))
    scores = [0.0] * len(flat)
    for u, index in enumerate(order):
        outliving = sum(flat[i] ** 2 for i in order[u:])
        scores[index] = flat[index] ** 2 / outliving if outliving else 0.0
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7, 5), (3, 2, 2, 3)])
def test_lamp_is_the_definition(shape, dtype):
    weight = (torch.randn(shape) * 4).round().to(dtype)  # with ties and zeros
    found = criteria.lamp(weight)
    assert found.shape == weight.shape
    np.testing.assert_allclose(found.flatten(), slow_lamp(weight), rtol=1e-12)


def test_lamp_takes_weights_whose_squares_overflow_or_vanish():
    large = criteria.lamp(torch.tensor([3.0, 4.0], dtype=torch.float64) * 1e300)
    small = criteria.lamp(torch.tensor([3.0, 4.0], dtype=torch.float64) * 1e-300)
    for scores in (large, small):
        np.testing.assert_allclose(scores, [9 / 25, 1], rtol=1e-6)
    assert criteria.lamp(torch.zeros(4)).tolist() == [0.0] * 4


def test_lamp_leaves_every_layer_a_weight():
    model = network()
    for index, layer in enumerate((model[0], model[1], model[3])):
        layer.weight.data.mul_(1000.0**index)
    levels = prune_levels(model, [0.99], criterion="lamp")
    assert min(kept_by_layer(levels, 0)) >= 1
    assert min(kept_by_layer(prune_levels(model, [0.6]), 0)) == 0  # unlike magnitude


def slow_erdos_renyi_kernel(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """Densities of the layers as RigL has them: epsilon, with full layers taken out in turn."""
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in full]
        wanted = density * sum(np.prod(s) for s in shapes) - sum(np.prod(shapes[i]) for i in full)
        epsilon = wanted / sum(sum(shapes[i]) for i in rest)
        densities = [epsilon * sum(s) / np.prod(s) for s in shapes]
        beyond = {i for i in rest if densities[i] > 1}
        if not beyond:
            return [1.0 if i in full else densities[i] for i in range(len(shapes))]
        full.add(max(beyond, key=lambda i: densities[i]))


def test_budgets_are_those_of_the_erdos_renyi_kernel_rule():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(128, 100), nn.Linear(100, 10)
    )
    grid = [j / 50 for j in range(50)]
    levels = prune_levels(model, grid, criterion="erdos_renyi_kernel")
    shapes = [tuple(level.shape) for level in levels.levels.values()]
    for j, s in enumerate(grid):
        kept = kept_by_layer(levels, j)
        assert sum(kept) == levels.total - round(s * levels.total)
        expected = slow_erdos_renyi_kernel(shapes, 1 - s)
        for k, density, shape in zip(kept, expected, shapes, strict=True):
            assert abs(k - density * np.prod(shape)) <= 1
    # Layers reached their cap on the way, and gave the excess to the others.
    assert kept_by_layer(levels, 10)[0] == np.prod(shapes[0])


def test_the_erdos_renyi_kernel_rule_keeps_the_largest_of_each_layer():
    model = network()
    levels = prune_levels(model, GRID, criterion="erdos_renyi_kernel")
    for name, level in levels.levels.items():
        weight = model.get_parameter(name).abs()
        for j in range(len(GRID)):
            pruned, kept = weight[level <= j], weight[level > j]
            assert not len(pruned) or not len(kept) or pruned.max() <= kept.min()


def test_magnitude_uncertainty_is_the_weight_over_damped_deviation():
    weight, deviation = torch.randn(4, 3).bfloat16(), torch.rand(4, 3)
    found = criteria.magnitude_uncertainty(weight, deviation=deviation, damping=0.25)
    assert found.dtype == torch.float32
    for index in range(12):
        w, d = float(weight.flatten()[index]), float(deviation.flatten()[index])
        assert abs(float(found.flatten()[index])) == pytest.approx(abs(w) / (0.25 + d), rel=1e-6)
    with pytest.raises(ValueError, match="damping must be above 0, got 0"):
        criteria.magnitude_uncertainty(weight, deviation=deviation, damping=0)


def test_magnitude_uncertainty_with_much_damping_is_magnitude():
    tensors = {"w": torch.randn(30, 20)}
    given = statistics_of(tensors)
    damped = levels_of(
        tensors, GRID, criterion="magnitude_uncertainty(damping=1e9)", statistics=given
    )
    assert torch.equal(damped.levels["w"], levels_of(tensors, GRID).levels["w"])


def test_wanda_prunes_each_row_alone_by_weight_times_input_norm():
    weight, norm = torch.randn(6, 10), torch.rand(1, 10)
    given = {"input_norm": {"w": norm}}
    levels = levels_of({"w": weight}, GRID, criterion="wanda", statistics=given)
    assert levels.scope == "row"
    for row in range(6):
        scores = [abs(float(weight[row, i])) * float(norm[0, i]) for i in range(10)]
        order = sorted(range(10), key=lambda i: (scores[i], i))
        for j, s in enumerate(GRID):
            pruned = {i for i in range(10) if not levels.mask("w", j)[row, i]}
            assert pruned == set(order[: round(s * 10)])


def test_random_scores_depend_on_seed_and_position_alone():
    one = criteria.random(torch.randn(40, 30), position=0)
    assert torch.equal(one, criteria.random(torch.zeros(40, 30), position=0))
    for other in ({"position": 1}, {"position": 0, "seed": 1}):
        assert not torch.equal(one, criteria.random(torch.zeros(40, 30), **other))
    assert 0 <= one.min() < 0.02 < 0.98 < one.max() < 1
    assert abs(float(one.mean()) - 0.5) < 0.03


# The minimum per layer.


def slow_min_per_layer(tensors: dict[str, Tensor], k: int, count: int) -> dict[str, list[bool]]:
    """Masks where the k largest of each layer survive and the rest competes globally."""
    weights = [
        (abs(value), layer, index, name)
        for layer, (name, tensor) in enumerate(tensors.items())
        for index, value in enumerate(tensor.flatten().tolist())
    ]
    spared = set()
    for name in tensors:
        spared |= set(sorted(w for w in weights if w[3] == name)[-k:] if k else [])
    pruned = sorted(w for w in weights if w not in spared)[:count]
    masks = {name: [True] * tensor.numel() for name, tensor in tensors.items()}
    for _, _, index, name in pruned:
        masks[name][index] = False
    return masks


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=60)
def test_the_largest_of_each_layer_are_spared(data, dtype):
    number = st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0, 3.0, torch.inf])
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    tensors = {
        str(i): torch.tensor(data.draw(st.lists(number, min_size=n, max_size=n)), dtype=dtype)
        for i, n in enumerate(sizes)
    }
    k = data.draw(st.integers(0, 4))
    most = sum(sizes) - sum(min(k, n) for n in sizes)
    count = data.draw(st.integers(0, most))
    if count == sum(sizes):
        return
    levels = levels_of(tensors, [count / sum(sizes)], criterion=f"magnitude(min_per_layer={k})")
    expected = slow_min_per_layer(tensors, k, count)
    assert {n: levels.mask(n, 0).tolist() for n in tensors} == expected


def test_sparing_too_much_is_refused_with_what_is_possible():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 2))
    spare = partial(criteria.magnitude, min_per_layer=15)
    assert int(prune_levels(model, [0.75], criterion=spare).counts[0]) == 90
    with pytest.raises(ValueError, match=r"0\.8 cannot .* 30 of 120 .* possible sparsity is 0\.75"):
        prune_levels(model, [0.1, 0.8, 0.9], criterion=spare)
    with pytest.raises(ValueError, match=r"0\.5 cannot .* 15 of 20 .* possible sparsity is 0\.25"):
        prune_levels(model, [0.5], criterion=spare, scope="layer")


@pytest.mark.parametrize("extra", [{"scope": "row"}, {"pattern": "rows"}, {"pattern": "N:2"}])
def test_sparing_is_for_single_weights_of_layers(extra):
    with pytest.raises(ValueError, match="spares single weights of each layer"):
        prune_levels(nn.Linear(4, 4), [0.5], criterion="magnitude(min_per_layer=1)", **extra)


@pytest.mark.parametrize("value", [-1, 0.5, None])
def test_the_minimum_is_a_number_of_weights(value):
    with pytest.raises(ValueError, match="min_per_layer must be an integer of at least 0"):
        criteria.magnitude(torch.ones(3), min_per_layer=value)


# What holds for all criteria.

ALL = {
    "magnitude": {},
    "magnitude(min_per_layer=2)": {},
    "magnitude_uncertainty": {},
    "lamp": {},
    "erdos_renyi_kernel": {},
    "wanda": {"scope": "global"},
    "random": {},
    "random(seed=3)": {},
}


def test_no_criterion_is_left_out_here():
    assert {resolve_criterion(text).name for text in ALL} == set(criteria.CRITERIA)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", ALL)
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_counts_are_exact_and_levels_independent_of_what_is_kept(
    criterion, scope, dtype, monkeypatch
):
    if scope == "row" and "min" in criterion:
        return
    tensors = {
        "a": (torch.randn(13, 7) * 3).round().to(dtype),  # ties
        "b": torch.randn(5, 3, 2, 2).to(dtype).transpose(0, 1),
        "c": torch.randn(9, 4).to(dtype)[:, ::2],
    }
    given = statistics_of(tensors)
    grid = GRID[:5]  # where min_per_layer is not in the way
    levels = levels_of(tensors, grid, criterion=criterion, scope=scope, statistics=given)
    for j, s in enumerate(grid):
        pruned = {name: int((~levels.mask(name, j)).sum()) for name in tensors}
        assert sum(pruned.values()) == int(levels.counts[j])
        if scope == "global":
            assert int(levels.counts[j]) == round(s * levels.total)
        elif scope == "layer":
            assert all(pruned[n] == round(s * t.numel()) for n, t in tensors.items())
        else:
            for name, tensor in tensors.items():
                by_row = (~levels.mask(name, j)).flatten(1).sum(1)
                assert set(by_row.tolist()) == {round(s * tensor[0].numel())}
    monkeypatch.setattr(scores_module, "KEEP_BYTES", 0)
    again = levels_of(tensors, grid, criterion=criterion, scope=scope, statistics=given)
    for name in tensors:
        assert torch.equal(again.levels[name], levels.levels[name])


@pytest.mark.parametrize("criterion", [text for text in ALL if "random" not in text])
def test_equal_scores_go_by_position(criterion):
    tensors = {"a": torch.full((4, 3), 0.5), "b": torch.full((4, 3), -0.5)}
    given = {
        "deviation": {n: torch.ones(4, 3) for n in tensors},
        "input_norm": {n: torch.ones(1, 3) for n in tensors},
    }
    for scope in ("global", "layer"):
        levels = levels_of(tensors, [0.25], criterion=criterion, scope=scope, statistics=given)
        for level in levels.levels.values():
            assert level.flatten().tolist() == sorted(level.flatten().tolist())


@pytest.mark.parametrize("criterion", ALL)
@pytest.mark.parametrize("scope", ["global", "row"])
def test_nan_weights_are_refused_by_name(criterion, scope):
    if "min" in criterion and scope == "row":
        return
    tensors = {"first": torch.randn(4, 3), "second": torch.randn(4, 3)}
    tensors["second"][2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"'second' holds NaN.*parameters="):
        levels_of(
            tensors, [0.5], criterion=criterion, scope=scope, statistics=statistics_of(tensors)
        )


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match=r"'lamp' gives NaN for parameter 'w'.*infinite weights"):
        levels_of({"w": torch.tensor([1.0, torch.inf, -torch.inf])}, [0.5], criterion="lamp")
    norm = {"input_norm": {"w": torch.tensor([[torch.inf, 1.0]])}}
    with pytest.raises(ValueError, match="'wanda' gives NaN for parameter 'w'"):
        levels_of({"w": torch.tensor([[0.0, 1.0]])}, [0.5], criterion="wanda", statistics=norm)


def test_infinite_weights_are_the_last_to_go_where_they_make_sense():
    tensors = {"w": torch.tensor([[torch.inf, 1.0, 2.0, -3.0]])}
    for criterion in ("magnitude", "erdos_renyi_kernel", "wanda", "magnitude_uncertainty"):
        given = {"input_norm": {"w": torch.ones(1, 4)}, "deviation": {"w": torch.ones(1, 4)}}
        levels = levels_of(tensors, [0.75], criterion=criterion, statistics=given)
        assert levels.mask("w", 0).tolist() == [[True, False, False, False]]


def test_only_what_fits_is_kept(monkeypatch):
    tensors = {"a": torch.randn(10), "b": torch.randn(20), "c": torch.randn(5)}
    monkeypatch.setattr(scores_module, "KEEP_BYTES", 15 * 8)
    scores = Scores(tensors, resolve_criterion("lamp"))
    assert scores.key == torch.float64
    assert [len(scores[name]) for name in scores] == [10, 20, 5]
    assert set(scores._kept) == {"a", "c"}
    assert scores["a"] is scores["a"]
    assert len(scores) == 3
    plain = Scores(tensors, resolve_criterion("magnitude"))
    assert plain["a"].data_ptr() == tensors["a"].data_ptr()  # never copied


def test_the_key_is_of_the_scores_not_of_the_weights():
    tensors = {"a": torch.randn(4, 2).bfloat16(), "b": torch.randn(9, 2).half()}
    for criterion, expected in (("magnitude", torch.float32), ("lamp", torch.float64)):
        assert Scores(tensors, resolve_criterion(criterion)).key == expected
    assert Scores({"a": tensors["a"]}, resolve_criterion("magnitude")).key == torch.bfloat16


# Names and settings.


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("magnitude", "magnitude"),
        ("magnitude()", "magnitude"),
        (" magnitude(min_per_layer = 3) ", "magnitude(min_per_layer=3)"),
        (criteria.lamp, "lamp"),
        (partial(criteria.random, seed=4), "random(seed=4)"),
        (partial(partial(criteria.random, seed=4), seed=5), "random(seed=5)"),
        (resolve_criterion("lamp"), "lamp"),
    ],
)
def test_a_criterion_is_text_or_a_function(given, text):
    found = resolve_criterion(given)
    assert str(found) == text
    assert resolve_criterion(str(found)) == found


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("size", ValueError, r"criterion 'size' is unknown; choose from \['magnitude'"),
        ("size(k=1)", ValueError, "criterion 'size' is unknown"),
        ("magnitude(k=1)", ValueError, r"'magnitude' has no setting 'k'; it has \['min_per_layer'"),
        ("lamp(k=1)", ValueError, "'lamp' has no setting 'k'; it has none"),
        ("magnitude(3)", ValueError, r"'magnitude\(3\)' cannot be read; write name\(setting=value"),
        ("magnitude(k=", ValueError, "cannot be read"),
        ("magnitude(k=x)", ValueError, "cannot be read"),
        ("wanda(input_norm=1)", ValueError, "'wanda' takes input_norm from statistics="),
        (partial(criteria.lamp, torch.ones(1)), ValueError, "settings of lamp by their names"),
        (torch.abs, ValueError, r"'abs' is a function without a name.*CRITERIA\['abs'\]"),
        (3, TypeError, "criterion must be a name or a function .* got int"),
    ],
)
def test_what_is_no_criterion_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        resolve_criterion(given)


def test_users_add_criteria_with_settings_and_needs(monkeypatch):
    def movement(weight: Tensor, *, start: Tensor, power: float = 1.0) -> Tensor:
        return (weight - start).abs() ** power

    monkeypatch.setitem(criteria.CRITERIA, "movement", movement)
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[5.0, 1.0]]))
    start = {"start": {"weight": torch.tensor([[5.0, 4.0]])}}
    levels = prune_levels(model, [0.5], criterion="movement(power=2.0)", statistics=start)
    assert levels.mask("weight", 0).tolist() == [[False, True]]
    assert levels.criterion == "movement(power=2.0)"
    assert levels.statistics is not start
    assert dict(levels.statistics) == start
    monkeypatch.setitem(criteria.CRITERIA, "wide", lambda w: w.unsqueeze(0))
    with pytest.raises(
        ValueError, match=r"'wide' gives scores of shape \[1, 1, 2\] for .*'weight'"
    ):
        prune_levels(model, [0.5], criterion="wide")


def test_missing_statistics_are_named_with_their_source():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match=r"'wanda' needs the statistic 'input_norm': .*score_data="
    ):
        prune_levels(model, [0.5], criterion="wanda")
    with pytest.raises(ValueError, match=r"'deviation': .*WeightObserver"):
        prune_levels(model, [0.5], criterion="magnitude_uncertainty")
    some = {"deviation": {"0.weight": torch.ones(3, 4)}}
    with pytest.raises(ValueError, match=r"'deviation' of parameter '1.weight'"):
        prune_levels(model, [0.5], criterion="magnitude_uncertainty", statistics=some)
    some["deviation"]["1.weight"] = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"'1.weight' has shape \[3, 2\], .* fit \[2, 3\]"):
        prune_levels(model, [0.5], criterion="magnitude_uncertainty", statistics=some)


def test_a_criterion_knows_what_it_needs():
    needs = {name: resolve_criterion(name).needs for name in criteria.CRITERIA}
    assert needs["magnitude"] == needs["lamp"] == needs["erdos_renyi_kernel"] == ()
    assert needs["wanda"] == ("input_norm",)
    assert needs["magnitude_uncertainty"] == ("deviation",)
    assert needs["random"] == ("position",)
    assert isinstance(resolve_criterion("lamp"), Criterion)


# The pseudo bootstrap.


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 5).to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        seen.append(model[0].weight.detach().clone())
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_observer_measures_the_deviation_of_each_weight(dtype):
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    train(model, optimizer, 3)  # before it looks
    with WeightObserver(model, optimizer) as observer:
        seen = train(model, optimizer, 20)
    train(model, optimizer, 2)  # after
    found = observer.deviations()
    assert list(found) == ["0.weight", "1.weight"]
    expected = torch.stack(seen).double().std(dim=0)
    torch.testing.assert_close(found["0.weight"].double(), expected, rtol=1e-3, atol=1e-7)
    assert found["0.weight"].dtype == torch.promote_types(dtype, torch.float32)
    before = copy.deepcopy(model.state_dict())
    prune_levels(model, GRID, criterion="magnitude_uncertainty", statistics={"deviation": found})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_observer_can_be_told_of_steps_and_of_parameters():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    observer = WeightObserver(model, parameters=["1.bias"])
    for value in (1.0, 2.0, 6.0):
        model[1].bias.data.fill_(value)
        observer.update()
    assert observer.deviations()["1.bias"].tolist() == pytest.approx([7**0.5] * 2)


def test_the_observer_stops_looking_after_an_exception():
    model = nn.Sequential(nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def interrupted(observer: WeightObserver) -> None:
        with observer:
            train(model, optimizer, 2)
            raise KeyboardInterrupt

    observer = WeightObserver(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        interrupted(observer)
    before = observer.deviations()["0.weight"]
    train(model, optimizer, 2)
    assert torch.equal(observer.deviations()["0.weight"], before)


def test_an_observer_that_can_see_nothing_says_so():
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(ValueError, match="trains none of the observed parameters"):
        WeightObserver(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"without an optimizer .* call update\(\)"):
        WeightObserver(model).__enter__()
    observer = WeightObserver(model)
    observer.update()
    with pytest.raises(ValueError, match="seen 1 steps, and a deviation takes at least 2"):
        observer.deviations()
