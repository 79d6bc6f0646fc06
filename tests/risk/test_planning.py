"""Planning: simulated calibrations against exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from confprune.risk import planning
from confprune.risk.bounds import critical_sum, required_n

SPARSITIES = np.linspace(0, 0.9, 10)
RISKS = 0.1 * SPARSITIES**2


def test_probabilities_are_those_of_the_binomial():
    result = planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 800, draws=4000)
    critical = critical_sum(800, 0.05, 0.1, "binomial")
    # An increasing curve of nested failures: a level falls with all denser ones.
    expected = stats.binom.cdf(critical, 800, RISKS)
    np.testing.assert_allclose(result.probabilities, expected, atol=0.03)
    gains = np.diff(np.append(expected, 0.0)) * -1
    assert result.expected_sparsity == pytest.approx(gains @ SPARSITIES, abs=0.01)
    assert result.evaluated == 1.0


def test_the_number_needed_certifies_the_wished_sparsity():
    result = planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 100, draws=1000, wished=0.6)
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
    result = planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 3000, draws=40, looks=True)
    plain = planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 3000, draws=400)
    assert result.evaluated < 0.5
    assert abs(result.expected_sparsity - plain.expected_sparsity) < 0.04


@pytest.mark.parametrize("looks", [False, True])
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
    with pytest.raises(ValueError, match="draws"):
        planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 100, draws=0)
    with pytest.raises(ValueError, match=r"wished must be a sparsity in \[0, 1\), got 70"):
        planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 100, wished=70)
    with pytest.raises(ValueError, match="graphical"):
        planning.simulate(SPARSITIES, RISKS, 0.05, 0.1, 100, procedure="graphical")
    with pytest.raises(ValueError, match=r"1\.5"):
        planning.simulate(SPARSITIES, RISKS + 1.5, 0.05, 0.1, 100)
