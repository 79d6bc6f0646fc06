"""Prune levels of a model: nested masks, exact counts, scopes, which parameters, and refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import orthogonal, weight_norm

import confprune
from confprune import criteria, prune_levels
from confprune.levels import levels_of
from confprune.parameters import prunable_parameters
from confprune.sparse import compress

GRID = [0.0, 0.1, 0.35, 0.5, 0.9, 0.99]


def convolutional_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@given(
    sparsities=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8, unique=True),
    scope=st.sampled_from(["global", "layer"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    width=st.integers(1, 9),
)
@settings(max_examples=60)
def test_masks_are_nested_and_counts_exact(sparsities, scope, dtype, width):
    model = nn.Sequential(nn.Linear(width, 7), nn.Linear(7, 3)).to(dtype)
    grid = sorted(sparsities)
    levels = prune_levels(model, grid, scope=scope)
    sizes = {name: p.numel() for name, p in prunable_parameters(model).items()}
    for j, sparsity in enumerate(grid):
        masks = {name: levels.mask(name, j) for name in levels.levels}
        pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
        assert int(levels.counts[j]) == sum(pruned.values())
        if scope == "global":
            assert sum(pruned.values()) == round(sparsity * sum(sizes.values()))
        else:
            assert pruned == {name: round(sparsity * size) for name, size in sizes.items()}
        if j:
            assert all((levels.mask(name, j - 1) >= mask).all() for name, mask in masks.items())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_what_is_pruned_is_never_larger_than_what_stays(scope):
    model = convolutional_network()
    levels = prune_levels(model, GRID, scope=scope)
    weights = {name: p.detach().abs() for name, p in prunable_parameters(model).items()}
    groups = [list(weights)] if scope == "global" else [[name] for name in weights]
    assert levels.thresholds.shape == ((6,) if scope == "global" else (6, 2))
    for j in range(1, len(GRID)):
        for index, names in enumerate(groups):
            masks = {name: levels.mask(name, j) for name in names}
            pruned = torch.cat([weights[name][~mask] for name, mask in masks.items()])
            stay = torch.cat([weights[name][mask] for name, mask in masks.items()])
            assert pruned.max() <= stay.min()
            threshold = levels.thresholds[j] if scope == "global" else levels.thresholds[j, index]
            assert threshold == pruned.max()


def test_thresholds_where_nothing_is_pruned_are_minus_infinity():
    levels = prune_levels(nn.Linear(3, 3), [0.0, 0.01, 0.5])
    assert levels.thresholds.dtype == torch.float64
    assert levels.thresholds[:2].tolist() == [-torch.inf, -torch.inf]


def test_prune_gives_a_masked_copy_and_leaves_the_model_untouched():
    model = convolutional_network().train()
    model[1].eval()
    before = state_of(model)
    levels = prune_levels(model, GRID)
    for j in range(len(GRID)):
        pruned = levels.prune(model, j)
        assert [m.training for m in pruned.modules()] == [m.training for m in model.modules()]
        for name, parameter in pruned.named_parameters():
            mask = levels.mask(name, j) if name in levels.levels else True
            assert torch.equal(parameter, torch.where(torch.as_tensor(mask), before[name], 0))
            assert parameter.requires_grad
    assert_same_state(model, before)


def test_pruned_infinite_weights_become_zero():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(torch.inf)
    assert prune_levels(model, [0.5]).prune(model, 0).weight.tolist() == [[0.0, torch.inf]]


def test_the_sparsity_of_each_layer_is_told():
    model = convolutional_network()
    levels = prune_levels(model, GRID)
    for j in range(len(GRID)):
        pruned = levels.prune(model, j)
        expected = {
            name: float((pruned.get_parameter(name) == 0).double().mean())
            for name in ("0.weight", "4.weight")
        }
        assert levels.sparsity_by_layer(j) == pytest.approx(expected)


def test_the_object_tells_what_it_is():
    several = prune_levels(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), [0.5])
    assert repr(several) == (
        "PruneLevels(sparsity 0.5, 18 weights in 2 parameters, scope='global', "
        "criterion='magnitude')"
    )
    levels = prune_levels(nn.Linear(40, 30), GRID)
    assert len(levels) == 6
    assert levels.sparsities == tuple(GRID)
    assert levels.total == 1200
    assert repr(levels) == (
        "PruneLevels(6 sparsities from 0 to 0.99, 1,200 weights in 1 parameter, "
        "scope='global', criterion='magnitude')"
    )


@pytest.mark.parametrize(
    "grid", [GRID, tuple(GRID), np.array(GRID), torch.tensor(GRID, dtype=torch.float64)]
)
def test_a_grid_may_be_any_sequence(grid):
    assert prune_levels(nn.Linear(2, 2), grid).sparsities == tuple(GRID)


@pytest.mark.parametrize(("levels", "dtype"), [(255, torch.uint8), (256, torch.int16)])
def test_prune_levels_take_one_byte_where_they_can(levels, dtype):
    model = nn.Linear(50, 50)
    found = prune_levels(model, np.arange(levels) / levels)
    assert found.levels["weight"].dtype == dtype
    assert int(found.levels["weight"].max()) == levels
    assert int((~found.mask("weight", levels - 1)).sum()) == round(2500 * (levels - 1) / levels)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "non-empty one-dimensional"),
        (0.5, r"one-dimensional grid, got shape \(\)"),
        ([[0.1, 0.2]], r"got shape \(1, 2\)"),
        ([0.5, 0.1], "strictly increasing, got 0.1 after 0.5; sort them"),
        ([0.1, 0.1], "remove duplicates"),
        ([0.5, 1.0], r"in \[0, 1\), got 1"),
        ([-0.1, 0.5], r"in \[0, 1\), got -0.1"),
        ([0.1, float("nan")], r"in \[0, 1\), got nan"),
        (np.arange(40_000) / 40_000, "40000 levels; at most 32767"),
    ],
)
def test_what_is_no_grid_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        prune_levels(nn.Linear(2, 2), grid)


def test_unknown_names_are_refused_with_the_valid_ones():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"scope 'local' is unknown; choose from \['global', 'l"):
        prune_levels(model, GRID, scope="local")
    with pytest.raises(ValueError, match=r"criterion 'size' is unknown; choose from \['magnitude"):
        prune_levels(model, GRID, criterion="size")
    levels = prune_levels(model, GRID)
    with pytest.raises(ValueError, match=r"no prune levels for 'bias'; there are \['weight'\]"):
        levels.mask("bias", 0)


@pytest.mark.parametrize("method", ["mask", "prune", "sparsity_by_layer"])
@pytest.mark.parametrize("j", [-1, 6])
def test_a_level_off_the_grid_is_refused(method, j):
    model = nn.Linear(2, 2)
    levels = prune_levels(model, GRID)
    first = {"mask": ["weight"], "prune": [model], "sparsity_by_layer": []}[method]
    with pytest.raises(ValueError, match=f"level {j} is not on the grid: .* from 0 to 5"):
        getattr(levels, method)(*first, j)
    with pytest.raises(TypeError):
        getattr(levels, method)(*first, 0.5)


def test_another_model_is_refused_by_name_and_shape():
    levels = prune_levels(nn.Sequential(nn.Linear(2, 3)), GRID)
    with pytest.raises(ValueError, match=r"no parameter '0.weight'"):
        levels.prune(nn.Linear(2, 3), 0)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[2, 3\] .* but \[3, 2\]"):
        levels.prune(nn.Sequential(nn.Linear(3, 2)), 0)


def test_a_new_criterion_is_one_function(monkeypatch):
    monkeypatch.setitem(criteria.CRITERIA, "smallest last", lambda w: w.abs().max() - w.abs())
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
    levels = prune_levels(model, [0.5], criterion="smallest last")
    assert levels.mask("weight", 0).tolist() == [[False, True, True, False]]
    assert levels.criterion == "smallest last"


def test_bare_tensors_have_levels_too():
    tensors = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor(2.0)}
    levels = levels_of(tensors, [1 / 3, 2 / 3])
    assert levels.levels["a"].tolist() == [0, 2]
    assert levels.levels["b"].item() == 1


class Tied(nn.Module):
    """Input and output embeddings that share one weight, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(tokens)))


def test_tied_weights_count_once_and_are_pruned_in_both_places():
    model = Tied()
    levels = prune_levels(model, GRID)
    assert list(levels.levels) == ["embedding.weight", "middle.weight"]
    assert levels.total == 11 * 6 + 6 * 6
    pruned = levels.prune(model, 3)
    assert pruned.head.weight is pruned.embedding.weight
    assert torch.equal(pruned.head.weight == 0, ~levels.mask("embedding.weight", 3))


def test_ties_do_not_depend_on_how_the_parameters_were_chosen():
    model = Tied()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    by_default = prune_levels(model, GRID)
    by_name = prune_levels(model, GRID, parameters=["middle.weight", "head.weight"])
    assert list(by_name.levels) == list(by_default.levels)
    for name, levels in by_name.levels.items():
        assert torch.equal(levels, by_default.levels[name])


def test_a_tied_weight_answers_to_each_of_its_names():
    assert list(prune_levels(Tied(), GRID, parameters=["head.weight"]).levels) == [
        "embedding.weight"
    ]


def test_by_default_linear_and_convolution_weights_are_pruned():
    model = nn.ModuleDict(
        {
            "conv1": nn.Conv1d(2, 3, 2),
            "conv2": nn.Conv2d(2, 3, 2),
            "conv3": nn.Conv3d(2, 3, 2),
            "transposed": nn.ConvTranspose2d(2, 3, 2),
            "linear": nn.Linear(2, 3),
            "norm": nn.LayerNorm(3),
            "embedding": nn.Embedding(4, 3),
            "recurrent": nn.LSTM(2, 3),
            "bilinear": nn.Bilinear(2, 2, 3),
        }
    )
    assert list(prunable_parameters(model)) == [
        f"{name}.weight" for name in ("conv1", "conv2", "conv3", "transposed", "linear")
    ]


def test_names_and_predicates_choose_parameters_in_the_order_of_the_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    names = ["2.weight", "0.bias", "0.weight"]
    assert list(prunable_parameters(model, names)) == ["0.weight", "0.bias", "2.weight"]
    assert list(prunable_parameters(model, (name for name in names))) == sorted(
        names, key=["0.weight", "0.bias", "2.weight"].index
    )
    large = prunable_parameters(model, lambda name, parameter: parameter.numel() > 6)
    assert list(large) == ["0.weight"]


def test_an_unknown_parameter_is_refused_with_those_there_are():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)])
    with pytest.raises(ValueError, match=r"'0.wait', which .* 0.weight, 0.bias, .*\(4 more\)"):
        prune_levels(model, GRID, parameters=["0.wait"])
    with pytest.raises(TypeError, match=r"collection of names, got the string '0.weight'"):
        prune_levels(model, GRID, parameters="0.weight")
    with pytest.raises(TypeError, match=r"parameters must be names, or a predicate .*, got int"):
        prune_levels(model, GRID, parameters=3)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (nn.BatchNorm1d(3), None),
        (nn.Linear(2, 2), []),
        (nn.Linear(2, 2), lambda name, parameter: False),
    ],
)
def test_nothing_to_prune_is_refused(model, parameters):
    with pytest.raises(ValueError, match=r"no prunable weights: .* parameters="):
        prune_levels(model, GRID, parameters=parameters)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per")
@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda m: nn.Sequential(nn.ReLU(), torch.jit.script(m)), "layer '1' is TorchScript"),
        (
            lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}),
            r"layer '0' is quantized \(Linear of torch.ao\), .* and quantize the pruned one",
        ),
        (
            lambda m: compress(prune_levels(m, [0.9]).prune(m, 0), kernel="sparse"),
            "layer '0' is compressed: .* confprune.sparse.decompress",
        ),
    ],
)
def test_networks_whose_weights_cannot_be_masked_are_told_what_they_are(convert, message):
    model = nn.Sequential(nn.Linear(128, 128)).eval()
    with pytest.raises(ValueError, match=f"no prunable weights: {message}"):
        prune_levels(convert(model), GRID)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "convert", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(2, 8))]
)
@pytest.mark.parametrize("use", [lambda m: prune_levels(m, GRID), compress])
def test_torchscript_is_refused(convert, use):
    with pytest.raises(TypeError, match="model is TorchScript: give the module that was scripted"):
        use(convert(nn.Sequential(nn.Linear(8, 8))))


class WithEmpty(nn.Module):
    """A layer whose every output has been taken away beside ones that are whole."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.empty, self.head = nn.Linear(8, 6), nn.Linear(8, 0), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.cat([self.whole(x), self.empty(x)], dim=-1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("criterion", ["magnitude", "lamp", "erdos_renyi_kernel", "random"])
def test_empty_weights_are_left_out(scope, criterion):
    model = WithEmpty()
    levels = prune_levels(model, GRID, scope=scope, criterion=criterion)
    assert list(levels.levels) == ["whole.weight", "head.weight"]
    certificate = confprune.calibrate(
        model,
        torch.randn(60, 8),
        loss="disagreement",
        alpha=0.3,
        delta=0.3,
        scope=scope,
        criterion=criterion,
        progress=False,
    )
    assert certificate.prune(model).empty.weight.shape == (0, 8)
    with pytest.raises(ValueError, match="no Linear or Conv layer with weights"):
        prune_levels(nn.Linear(8, 0), GRID)


def test_only_modules_have_levels():
    with pytest.raises(TypeError, match=r"torch.nn.Module, got function"):
        prune_levels(lambda x: x, GRID)


def test_nan_weights_are_refused_by_name():
    model = convolutional_network()
    model[4].weight.data[2, 3] = torch.nan
    for scope in ("global", "layer"):
        with pytest.raises(ValueError, match=r"parameter '4.weight' holds NaN"):
            prune_levels(model, GRID, scope=scope)
    assert prune_levels(model, GRID, parameters=["0.weight"]).total == 108


def test_integer_and_complex_parameters_are_refused():
    model = nn.Linear(2, 2)
    model.table = nn.Parameter(torch.arange(4), requires_grad=False)
    assert list(prunable_parameters(model)) == ["weight"]
    with pytest.raises(
        TypeError, match=r"'table' is torch.int64; .* leave it out with parameters="
    ):
        prune_levels(model, GRID, parameters=["table"])
    with pytest.raises(TypeError, match=r"'weight' is torch.complex64"):
        prune_levels(nn.Linear(2, 2, dtype=torch.complex64), GRID)


def layer_with(change: str) -> nn.Module:
    layer = nn.Linear(4, 4)
    if change == "weight_norm":
        return weight_norm(layer)
    if change == "old weight_norm":
        with pytest.warns(FutureWarning):
            return nn.utils.weight_norm(layer)
    if change == "orthogonal":
        return orthogonal(layer)
    return torch_prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", ["weight_norm", "old weight_norm", "orthogonal", "pruned"])
def test_layers_that_compute_their_weight_are_refused_with_the_way_out(change):
    model = nn.Sequential(nn.Linear(4, 4), layer_with(change))
    with pytest.raises(
        ValueError, match=r"layer '1' computes its weight .*remove_parametrizations"
    ):
        prune_levels(model, GRID)
    if change == "pruned":
        torch_prune.remove(model[1], "weight")
    elif change == "old weight_norm":
        nn.utils.remove_weight_norm(model[1])
    else:
        nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert list(prune_levels(model, GRID).levels) == ["0.weight", "1.weight"]


@pytest.mark.parametrize("grid", [["half"], (s for s in [0.5]), {0.5}])
def test_sparsities_that_are_no_list_of_numbers_are_refused(grid):
    with pytest.raises(TypeError, match=r"sparsities must be a list of numbers, such as \[0.5,"):
        prune_levels(nn.Linear(2, 2), grid)


def test_weights_without_values_are_refused():
    with pytest.raises(ValueError, match=r"'weight' is on the meta device, .* load the weights"):
        prune_levels(nn.Linear(2, 2, device="meta"), GRID)


def test_lazy_layers_are_refused_until_they_have_run():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'0.weight' is lazy: run the model once"):
        prune_levels(model, GRID)
    with pytest.raises(ValueError, match="lazy"):
        prune_levels(model, GRID, parameters=["0.weight"])
    model(torch.zeros(1, 4))
    assert prune_levels(model, GRID).total == 12


def test_the_linear_layer_of_gpt2_is_one():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert list(prunable_parameters(nn.Sequential(Conv1D(3, 4)))) == ["0.weight"]


def test_a_class_of_the_same_name_is_not():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

    with pytest.raises(ValueError, match="no prunable weights"):
        prunable_parameters(Conv1D())


def test_subclasses_of_layers_are_layers():
    class Scaled(nn.Linear):
        pass

    assert list(prunable_parameters(Scaled(2, 2))) == ["weight"]


def test_a_layer_used_twice_is_pruned_once():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    levels = prune_levels(model, GRID)
    assert list(levels.levels) == ["0.weight"]
    assert levels.prune(model, 3)[2].weight.count_nonzero() == 9 - round(0.5 * 9)


def test_frozen_and_channels_last_weights_are_pruned_as_any():
    model = convolutional_network()
    expected = prune_levels(model, GRID)
    frozen = copy.deepcopy(model).to(memory_format=torch.channels_last).requires_grad_(False)
    levels = confprune.prune_levels(frozen, GRID)
    for name, found in levels.levels.items():
        assert torch.equal(found, expected.levels[name])
    assert torch.equal(levels.prune(frozen, 3)[0].weight, expected.prune(model, 3)[0].weight)
