"""Planning: simulated calibrations against exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import confprune
from confprune.risk import planning
from confprune.risk.bounds import critical_sum, required_n

SPARSITIES = np.linspace(0, 0.9, 10)
RISKS = 0.1 * SPARSITIES**2


def own(pvalues, delta):
    return pvalues <= delta / len(pvalues)


def test_probabilities_are_those_of_the_binomial():
    result = planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 800, draws=4000, looks=None)
    critical = critical_sum(800, 0.05, 0.1, "binomial")
    # An increasing curve of nested failures: a level falls with all denser ones.
    expected = stats.binom.cdf(critical, 800, RISKS)
    np.testing.assert_allclose(result.probabilities, expected, atol=0.03)
    gains = np.diff(np.append(expected, 0.0)) * -1
    assert result.expected_sparsity == pytest.approx(gains @ SPARSITIES, abs=0.01)
    assert result.evaluated == 1.0


def test_the_number_needed_certifies_the_wished_sparsity():
    result = planning.simulate(
        SPARSITIES, RISKS, 0.05, 0.1, 100, draws=1000, wished=0.6, looks=None
    )
    chance = stats.binom.cdf(
        critical_sum(result.needed_n, 0.05, 0.1, "binomial"), result.needed_n, RISKS[6]
    )
    assert 0.87 < chance < 0.95


def test_what_no_number_of_examples_can_certify():
    result = planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 100, draws=10, wished=0.8)
    assert result.needed_n is None
    assert "no number of examples" in repr(result)
    barred = RISKS.copy()
    barred[3] = 0.06  # The chain cannot pass this level; Bonferroni need not.
    assert (
        planning.simulate(SPARSITIES, barred, 0.05, 0.1, 100, draws=10, wished=0.6).needed_n is None
    )
    free = planning.simulate(
        SPARSITIES, barred, 0.05, 0.1, 100, draws=50, wished=0.6, procedure="bonferroni"
    )
    assert free.needed_n > required_n(0.05, 0.01)


def test_early_looks_save_evaluations():
    result = planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 3000, draws=40)
    plain = planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 3000, draws=400, looks=None)
    assert result.evaluated < 0.5
    assert abs(result.expected_sparsity - plain.expected_sparsity) < 0.04


def test_what_is_simulated_is_what_calibrate_does():
    """Early looks where calibrate would take them, and the same share of certified sparsities."""
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 2, bias=False)
    grid = [0.0, 0.25, 0.5, 0.75]
    levels = confprune.prune_levels(model, grid)
    population = torch.randn(6000, 12)
    risks = confprune.loss_matrix(model, population, levels, "disagreement", progress=False).mean(
        0, dtype=torch.float64
    )
    planned = planning.simulate(grid, risks, 0.22, 0.1, 150, draws=300)
    found = [
        confprune.calibrate(
            model,
            population[begin : begin + 150],
            loss="disagreement",
            alpha=0.22,
            delta=0.1,
            sparsities=grid,
            progress=False,
        )
        for begin in range(0, len(population), 150)
    ]
    shares = np.mean([certificate.rejected for certificate in found], axis=0)
    np.testing.assert_allclose(planned.probabilities, shares, atol=0.15)
    evaluated = np.mean([1 - certificate.looks.saved for certificate in found])
    assert planned.evaluated == pytest.approx(evaluated, abs=0.1)


@pytest.mark.parametrize("settings", [{"pvalue": "clt"}, {"procedure": own}])
def test_one_test_on_all_examples_where_calibrate_would_not_look_early(settings):
    results = [
        planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 500, draws=20, looks=looks, **settings)
        for looks in ("auto", None)
    ]
    np.testing.assert_array_equal(results[0].probabilities, results[1].probabilities)
    assert results[0].evaluated == 1.0


@pytest.mark.parametrize("looks", [None, "auto"])
@pytest.mark.parametrize("pvalue", ["auto", "convex", "betting"])
def test_pilot_losses_are_resampled(looks, pvalue):
    rng = np.random.default_rng(0)
    pilot = rng.beta(0.3, 3, (150, 10)) * SPARSITIES
    result = planning.simulate(
        SPARSITIES, pilot, 0.06, 0.1, 600, draws=30, looks=looks, pvalue=pvalue
    )
    safe = pilot.mean(axis=0) < 0.03
    assert np.all(result.probabilities[safe] > 0.9)
    assert np.all(result.probabilities[pilot.mean(axis=0) > 0.07] < 0.1)
    again = planning.simulate(
        SPARSITIES, pilot, 0.06, 0.1, 600, draws=30, looks=looks, pvalue=pvalue
    )
    np.testing.assert_array_equal(again.probabilities, result.probabilities)


def test_asymptotic_and_binary_pilots():
    pilot = np.random.default_rng(1).random((200, 10)) < RISKS
    assert planning.simulate(SPARSITIES, pilot, 0.05, 0.1, 500, draws=20).probabilities[1] == 1.0
    assert (
        planning.simulate(SPARSITIES, pilot, 0.05, 0.1, 500, draws=20, pvalue="clt").probabilities[
            1
        ]
        == 1.0
    )


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="one column per sparsity"):
        planning.simulate(SPARSITIES, RISKS[:5], 0.05, 0.1, 100)
    for wrong in (0, "100", 100.5):
        with pytest.raises(ValueError, match=f"n must be a positive integer, got {wrong!r}"):
            planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, wrong)
        with pytest.raises(ValueError, match=f"draws must be a positive integer, got {wrong!r}"):
            planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 100, draws=wrong)
    with pytest.raises(ValueError, match="sparsities must be strictly increasing"):
        planning.simulate(SPARSITIES[::-1], RISKS, 0.05, 0.1, 100)
    with pytest.raises(ValueError, match=r"wished must be a sparsity in \[0, 1\), got 70"):
        planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 100, wished=70)
    with pytest.raises(ValueError, match="looks must be 'auto' or None, got True"):
        planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 100, looks=True)
    with pytest.raises(ValueError, match="graphical"):
        planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 100, procedure="graphical")
    with pytest.raises(ValueError, match=r"1\.5"):
        planning.simulate(SPARSITIES, RISKS + 1.5, 0.05, 0.1, 100)
