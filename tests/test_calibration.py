"""From a network and data to a certificate, through the public functions alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import confprune
from confprune import (
    LookPlan,
    Loss,
    Risk,
    calibrate,
    calibrate_losses,
    loss_matrix,
    prune_levels,
)
from confprune.risk.testing import fixed_sequence, graphical

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = {"alpha": 0.1, "delta": 0.1, "progress": False}


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A perceptron trained on a third of the digits, and two sets of others."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x))
    train, calibration, test = order[:600], order[600:1200], order[1200:]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[train]), y[train]).backward()
        optimizer.step()
    return model, (x[calibration], y[calibration]), (x[test], y[test])


def test_a_certificate_keeps_its_promise_on_other_data(digits):
    model, calibration, (x, _) = digits
    certificate = calibrate(model, calibration, loss="disagreement", **SETTINGS)
    assert certificate.certified
    assert certificate.sparsity > 0.3
    assert len(certificate.sparsities) == 100
    assert certificate.sparsity == certificate.sparsities[certificate.level]
    assert certificate.n == 600
    sparse = certificate.prune(model)
    weights = torch.cat([sparse[0].weight.flatten(), sparse[2].weight.flatten()])
    assert int((weights == 0).sum()) == round(certificate.sparsity * weights.numel())
    with torch.no_grad():
        disagree = int((sparse(x).argmax(-1) != model(x).argmax(-1)).sum())
    assert disagree <= stats.binom.ppf(0.9999, len(x), 0.1)


@pytest.mark.parametrize("loss", ["disagreement", "error", "harm", "soft_disagreement"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_certificates_verify(digits, loss, scope):
    model, data, _ = digits
    certificate = calibrate(model, data, loss=loss, scope=scope, **SETTINGS)
    assert certificate.certified
    assert certificate.loss == loss
    certificate.verify(model, data, progress=False)
    with pytest.raises(ValueError, match="weight"):
        certificate.verify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), data)


def test_one_test_on_all_examples_is_that_of_the_loss_matrix(digits):
    model, data, _ = digits
    grid = [0.0, 0.2, 0.4, 0.6, 0.8, 0.9]
    matrix = loss_matrix(
        model, data, prune_levels(model, grid), "soft_disagreement", progress=False
    )
    for pvalue in ("auto", "hoeffding_bentkus"):
        whole = calibrate(
            model,
            data,
            loss="soft_disagreement",
            sparsities=grid,
            pvalue=pvalue,
            looks=None,
            **SETTINGS,
        )
        bare = calibrate_losses(matrix, grid, 0.1, 0.1, pvalue=pvalue)
        assert whole.pvalue == bare.pvalue
        np.testing.assert_allclose(whole.pvalues, bare.pvalues, rtol=1e-4)
        np.testing.assert_allclose(whole.risks, matrix.double().mean(0), rtol=1e-5)
        assert whole.rejected == bare.rejected
        assert whole.sparsity == bare.sparsity


def test_every_form_of_data_gives_the_same_certificate(digits):
    model, (x, y), _ = digits
    dataset = TensorDataset(x, y)
    forms = [
        (x, y),
        dataset,
        DataLoader(dataset, batch_size=97),
        [(x[:250], y[:250]), (x[250:], y[250:])],
        (part for part in zip(x.split(100), y.split(100), strict=True)),
    ]
    found = [calibrate(model, data, loss="error", looks=None, **SETTINGS) for data in forms]
    assert len({(c.n, c.sparsity, c.risks, c.pvalues) for c in found}) == 1
    assert found[0].pvalue == "binomial"


def test_the_seed_repeats_the_result(digits):
    model, data, _ = digits
    first, second, other = (
        calibrate(model, data, loss="disagreement", seed=seed, **SETTINGS) for seed in (3, 3, 4)
    )
    assert first == second
    assert first.seed == 3
    assert other.seed == 4


def test_nothing_certified_is_an_ordinary_outcome(digits):
    model, data, _ = digits
    certificate = calibrate(
        model, data, loss="error", alpha=0.001, delta=0.9, sparsities=[0.98, 0.99], progress=False
    )
    assert not certificate.certified
    assert certificate.sparsity == 0
    assert "more examples" in str(certificate) or "larger" in str(certificate)


def test_names_of_parameters_are_passed_on(digits):
    model, data, _ = digits
    certificate = calibrate(model, data, loss="error", parameters=["2.weight"], **SETTINGS)
    assert torch.equal(certificate.prune(model)[0].weight, model[0].weight)


def test_a_custom_loss_and_forward_are_used(digits):
    model, (x, y), _ = digits

    def nine_missed(outputs: Tensor, reference: confprune.Reference) -> Tensor:
        return ((outputs.argmax(-1) != 9) & (reference.targets == 9)).float()

    certificate = calibrate(
        model,
        [{"pixels": x, "labels": y}],
        loss=nine_missed,
        forward=lambda model, batch: model(batch["pixels"]),
        looks=None,
        **SETTINGS,
    )
    assert certificate.certified
    assert certificate.loss == "nine_missed"


def test_the_device_may_be_named(digits):
    model, data, _ = digits
    certificate = calibrate(model, data, loss="error", device="cpu", **SETTINGS)
    assert certificate.certified


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99", torch.device("cuda:99")])
def test_a_device_that_is_not_there_is_refused(digits, device):
    model, data, _ = digits
    with pytest.raises(ValueError, match=r"device '\w+:99' cannot be used here \(.*device='cpu'"):
        calibrate(model, data, loss="error", device=device, **SETTINGS)


def test_what_is_no_model_or_no_levels_is_refused(digits):
    model, data, _ = digits
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        calibrate(None, data, loss="error", **SETTINGS)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        loss_matrix(lambda x: x, data, prune_levels(model, [0.5]), "error")
    with pytest.raises(TypeError, match=r"levels must be the PruneLevels .* got list"):
        loss_matrix(model, data, [0.5], "error")


def test_no_progress_bar_unless_wanted(digits, capsys):
    model, data, _ = digits
    calibrate(model, data, loss="error", sparsities=[0.5], **SETTINGS)
    assert capsys.readouterr() == ("", "")
    calibrate(model, data, loss="error", sparsities=[0.5], **SETTINGS | {"progress": True})
    assert "example" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the levels are evaluated one by one")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 5, 9])
def test_an_interrupted_run_leaves_the_model_as_it_was(digits, error, call):
    trained, (x, y), _ = digits
    model = nn.Sequential(*trained, nn.Dropout()).train()
    model[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    calls = 0

    def forward(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise error("now")
        return model(batch[0])

    with pytest.raises(error):
        calibrate(model, (x, y), loss="error", forward=forward, batch_size=50, **SETTINGS)
    assert [m.training for m in model.modules()] == flags
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "alpha 0": ({"alpha": 0.0}, "alpha must lie strictly between 0 and 1, got 0"),
    "alpha 1": ({"alpha": 1}, "alpha must lie strictly between 0 and 1, got 1"),
    "alpha nan": ({"alpha": math.nan}, "alpha must lie .* got nan"),
    "delta 0": ({"delta": 0}, "delta must lie strictly between 0 and 1, got 0"),
    "delta 2": ({"delta": 2.0}, "delta must lie .* got 2"),
    "alpha text": ({"alpha": "small"}, "alpha must be a number, got 'small'"),
    "no delta": ({"delta": None}, "give delta="),
    "no loss": ({"loss": None}, "give loss= and alpha="),
    "loss": ({"loss": "accuracy"}, "unknown loss 'accuracy': use 'disagreement', 'error'"),
    "pvalue": ({"pvalue": "exact"}, "pvalue .*'exact'.*hoeffding"),
    "procedure": ({"procedure": "sidak"}, "procedure .*'sidak'.*fixed_sequence"),
    "scalar procedure": (
        {"procedure": lambda pvalues, delta: 0.5},
        r"procedure '<lambda>' must return which of the 100 levels .* got float",
    ),
    "p-values for a procedure": ({"procedure": lambda p, delta: p}, r"must return .* got float64"),
    "graph of another grid": (
        {
            "procedure": functools.partial(
                graphical, weights=[1.0, 0.0], transitions=[[0.0, 1.0], [0.0, 0.0]]
            )
        },
        "weights must be 100 non-negative numbers",
    ),
    "looks of an own procedure": (
        {
            "procedure": functools.partial(fixed_sequence, starts=[0, 50]),
            "looks": LookPlan((600,), (0.1,), 0.1),
        },
        r"looks cannot be taken with procedure 'fixed_sequence\(starts=...\)' and pvalue 'auto'",
    ),
    "asymptotic looks": (
        {"pvalue": "clt", "looks": LookPlan((600,), (0.1,), 0.1)},
        "looks cannot be taken with procedure 'fixed_sequence' and pvalue 'clt'",
    ),
    "scopes": ({"scope": 3}, "scope must be a name, or a list of several, got 3"),
    "no criterion": ({"criterion": None}, "criterion must be a name, .* got None"),
    "seed": ({"seed": "lucky"}, "seed must be an integer of at most 64 bits, got 'lucky'"),
    "large seed": ({"seed": 2**64}, "seed must be an integer of at most 64 bits"),
    "scope": (
        {"scope": "block"},
        r"scope 'block' is unknown; choose from \['global', 'layer', 'row'\]",
    ),
    "criterion": ({"criterion": "size"}, "criterion 'size' is unknown; choose from .*magnitude"),
    "unsorted": ({"sparsities": [0.5, 0.2]}, "strictly increasing, got 0.2 after 0.5; sort"),
    "duplicate": ({"sparsities": [0.5, 0.5]}, "strictly increasing, got 0.5 after 0.5"),
    "outside": ({"sparsities": [0.5, 1.0]}, r"sparsities must be in \[0, 1\), got 1"),
    "no sparsities": ({"sparsities": []}, "sparsities must be a non-empty"),
    "parameters": ({"parameters": ["3.weight"]}, "parameters names '3.weight', .* 0.weight"),
    "no parameters": ({"parameters": []}, "no prunable weights"),
    "text for alpha": ({"alpha": "0.1"}, "alpha must be a number, got '0.1'"),
    "text for delta": ({"delta": "0.1"}, "delta must be a number, got '0.1'"),
    "one risk": (
        {"risks": Risk("error", 0.1), "loss": None, "alpha": None},
        "risks must be a list, .* got Risk",
    ),
    "statistics": ({"statistics": 3}, "statistics must be a mapping .* got int"),
    "batch size": ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
    "device": ({"device": "foo"}, "device must be one that torch knows, .* got 'foo'"),
    "no device": ({"device": 3.5}, "device must be one that torch knows, .* got 3.5"),
    "budget": ({"activation_bytes": 0}, "activation_bytes must be positive, got 0"),
    "text budget": (
        {"activation_bytes": "1G"},
        "activation_bytes must be a whole number of bytes, such as 1 << 30, got '1G'",
    ),
    "fractional budget": ({"activation_bytes": 1e9}, "whole number of bytes, .*, got 1000000000.0"),
    "forward": ({"forward": 3}, "forward must be a callable .* got 3"),
    "too few": (
        {"alpha": 0.001},
        r"600 examples cannot .* alpha=0.001, .* at least 2302 are needed",
    ),
    "binomial": ({"loss": "soft_disagreement", "pvalue": "binomial"}, "binomial"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_settings_are_refused_before_any_work(digits, case):
    model, data, _ = digits
    changes, message = CASES[case]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("the model was run")

    settings = {"loss": "disagreement", "forward": forward} | SETTINGS | changes
    with pytest.raises((ValueError, TypeError), match=message):
        calibrate(model, data, **settings)


def test_nan_weights_are_refused_before_any_work(digits):
    model, data, _ = digits
    spoilt = nn.Sequential(*(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    spoilt.load_state_dict(model.state_dict())
    spoilt[2].weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"parameter '2.weight' holds NaN"):
        calibrate(spoilt, data, loss="error", **SETTINGS)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(0, 64), ValueError, "data is empty"),
        ([], ValueError, "data is empty"),
        ("digits.csv", TypeError, "data must be a Dataset, a DataLoader, .* got str"),
        ((torch.zeros(50, 64), torch.zeros(49)), ValueError, "as many rows"),
        (torch.zeros(20, 64), ValueError, "20 examples cannot .* at least 22 are needed"),
        (iter([torch.zeros(20, 64)]), ValueError, "20 examples cannot .* at least 22"),
        (iter([]), ValueError, "data is empty"),
        ([(torch.zeros(60, 64),) * 3], ValueError, "got 3 values: pass forward="),
    ],
)
def test_data_that_does_not_do_is_refused(digits, data, error, message):
    with pytest.raises(error, match=message):
        calibrate(digits[0], data, loss="disagreement", **SETTINGS)


@pytest.mark.parametrize("loss", ["error", "harm"])
def test_a_loss_that_needs_labels_is_refused_without(digits, loss):
    model, (x, _), _ = digits
    with pytest.raises(ValueError, match=f"'{loss}' compares with labels and the batch has none"):
        calibrate(model, x, loss=loss, **SETTINGS)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, b: m(b[0]).sum(-1), r"takes class scores \[B, C\] .* outputs of shape \[4\]"),
        (lambda m, b: m(b[0])[:, None], r"outputs of shape \[4, 1, 10\]"),
        (lambda m, b: m(b[0]).argmax(-1, keepdim=True) + torch.arange(9), "takes floating-point"),
        (lambda m, b: m(b[0]).mean(), "its first dimension must be the batch"),
    ],
)
def test_outputs_the_loss_cannot_take_are_refused_with_their_shape(digits, forward, message):
    model, data, _ = digits
    with pytest.raises(ValueError, match=message):
        calibrate(model, data, loss="disagreement", forward=forward, **SETTINGS)


def test_losses_outside_their_range_stop_the_run(digits):
    model, data, _ = digits
    too_large = Loss("too_large", lambda y, r: torch.full((len(y),), 1.5))
    with pytest.raises(ValueError, match=r"loss 'too_large' is 1.5 for example \d+ at level 0"):
        calibrate(model, data, loss=too_large, **SETTINGS)


def test_nan_outputs_stop_the_run(digits):
    model, (x, y), _ = digits
    spoilt = x.clone()
    spoilt[77] = torch.nan
    with pytest.raises(
        ValueError, match=r"'error' is nan for example \d+ at level \d+ .*outputs are"
    ):
        calibrate(model, (spoilt, y), loss="error", **SETTINGS)


def test_the_number_of_examples_named_is_the_smallest_that_does():
    zeros = np.zeros((45, 1))
    assert calibrate_losses(zeros, [0.5], 0.05, 0.1).certified
    with pytest.raises(ValueError, match=r"44 examples cannot .* at least 45 are needed"):
        calibrate_losses(zeros[:44], [0.5], 0.05, 0.1)


@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16", "list"])
def test_losses_may_be_any_array(kind):
    losses = np.zeros((100, 3))
    losses[::4, 1] = 0.5
    losses[:, 2] = 1
    given = {
        "numpy": losses,
        "torch": torch.tensor(losses, requires_grad=True),
        "bfloat16": torch.tensor(losses).bfloat16(),
        "list": losses.tolist(),
    }[kind]
    certificate = calibrate_losses(given, [0.1, 0.2, 0.3], 0.25, 0.1)
    assert certificate.rejected == (True, True, False)
    assert certificate.risks == (0.0, 0.125, 1.0)
    assert certificate.sparsity == 0.2
    assert certificate.pvalue == "convex"


@pytest.mark.parametrize(
    ("losses", "sparsities", "settings", "message"),
    [
        (np.zeros(100), [0.5], {}, "losses"),
        (np.zeros((0, 1)), [0.5], {}, "losses must not be empty"),
        (np.full((100, 1), 1.2), [0.5], {}, "1.2"),
        (np.full((100, 1), np.nan), [0.5], {}, "nan|NaN"),
        (np.zeros((100, 2)), [0.5], {}, "losses has 2 columns for 1 sparsities"),
        (np.zeros((100, 2)), [0.5, 0.4], {}, "strictly increasing"),
        (np.zeros((100, 1)), [0.5], {"alpha": 0}, "alpha must lie"),
        (np.zeros((100, 1)), [0.5], {"delta": 1}, "delta must lie"),
        (np.zeros((100, 1)), [0.5], {"pvalue": "t"}, "pvalue .*'t'"),
        (np.zeros((100, 1)), [0.5], {"procedure": "sidak"}, "procedure .*'sidak'"),
        (np.zeros((100, 1)), [0.5], {"procedure": "graphical"}, "needs .* pass functools.partial"),
        (np.full((100, 1), 0.5), [0.5], {"pvalue": "binomial"}, "binomial"),
    ],
)
def test_losses_that_cannot_be_certified_are_refused(losses, sparsities, settings, message):
    settings = {"alpha": 0.1, "delta": 0.1} | settings
    with pytest.raises(ValueError, match=message):
        calibrate_losses(losses, sparsities, **settings)


@pytest.mark.parametrize(
    ("kind", "procedure"),
    [("binary", "fixed_sequence"), ("binary", "bonferroni"), ("uniform", "fixed_sequence")],
)
def test_false_certificates_are_rarer_than_delta(kind, procedure):
    """300 calibrations of losses whose risks are known, just above alpha at the last levels."""
    alpha, delta, n, runs = 0.1, 0.2, 60, 300
    risks = np.array([0.001, 0.02, 0.05, 0.1 + 1e-9, 0.1 + 1e-9, 0.11])
    sparsities = np.linspace(0.1, 0.6, 6)
    generator = np.random.default_rng(0)
    violations = certified = 0
    for _ in range(runs):
        if kind == "binary":
            losses = generator.random((n, 6)) < risks
        else:
            losses = 2 * risks * generator.random((n, 6))
        certificate = calibrate_losses(
            losses.astype(float), sparsities, alpha, delta, procedure=procedure
        )
        certified += certificate.certified
        if certificate.certified:
            violations += risks[certificate.level] > alpha
    assert certified > runs / 3
    assert violations <= stats.binom.ppf(0.999, runs, delta)


def test_false_certificates_of_whole_networks_are_rarer_than_delta():
    """A network whose risk at each level is known exactly: P(x > quantile)."""
    alpha, delta, n, runs = 0.1, 0.2, 120, 100
    # Pruning the weight of a level flips the answer where the input, uniform, is below its risk.
    risks = torch.tensor([0.02, 0.05, 0.1 + 1e-6, 0.12])

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1, bias=False)
            self.layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))

        def forward(self, x: Tensor) -> Tensor:
            present = (self.layer(torch.eye(4)[None] * torch.ones(len(x), 1, 1)) > 0).squeeze(-1)
            wrong = (~present & (x < risks)).any(-1, keepdim=True).float()
            return torch.cat([1 - wrong, wrong], dim=-1)

    model = Known()
    violations = certified = 0
    for run in range(runs):
        x = torch.rand(n, 1, generator=torch.Generator().manual_seed(run))
        certificate = calibrate(
            model,
            x,
            loss="disagreement",
            sparsities=[0.25, 0.5, 0.75, 0.9999],
            alpha=alpha,
            delta=delta,
            progress=False,
        )
        certified += certificate.certified
        violations += certificate.certified and float(risks[certificate.level]) > alpha
    assert certified > runs / 2
    assert violations <= stats.binom.ppf(0.999, runs, delta)
