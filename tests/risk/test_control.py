"""Conformal risk control and risk-controlling selection."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from confprune.risk import bounds, control

RISKS = np.array([0.0, 0.02, 0.05, 0.08, 0.1, 0.12, 0.2])


def test_monotonised_losses_are_the_running_maximum():
    losses = np.random.default_rng(0).random((20, 9))
    expected = [[max(row[: j + 1]) for j in range(9)] for row in losses]
    np.testing.assert_array_equal(control.monotonise(losses), expected)
    assert control.monotonise(losses.astype(np.float32)).dtype == np.float32


def test_conformal_risk_control_by_definition():
    rng = np.random.default_rng(1)
    for _ in range(50):
        losses = rng.random((40, 7)) * RISKS * 2
        result = control.conformal_risk_control(losses, 0.1)
        monotone = control.monotonise(losses)
        level = None
        for j in range(7):
            adjusted = 40 / 41 * monotone[:, j].mean() + 1 / 41
            assert result.bounds[j] == pytest.approx(adjusted)
            if adjusted <= 0.1:
                level = j
        assert result.level == level


def test_expected_loss_is_controlled_and_nearly_used_up():
    rng = np.random.default_rng(2)
    n, alpha, draws = 60, 0.1, 4000
    total = 0.0
    for _ in range(draws):
        losses = (rng.random((n + 1, 1)) < np.linspace(0, 0.3, 31)).astype(float)
        level = control.conformal_risk_control(losses[:n], alpha).level
        total += 0.0 if level is None else losses[n, level]
    spread = np.sqrt(alpha * (1 - alpha) / draws)
    assert alpha - 0.02 - 4 * spread < total / draws < alpha + 4 * spread


def test_rcps_stops_before_the_bound_first_exceeds_alpha():
    rng = np.random.default_rng(3)
    losses = (rng.random((300, 1)) < RISKS).astype(float)
    result = control.rcps(losses, 0.1, 0.1)
    expected = bounds.upper_bound(control.monotonise(losses), 0.1)
    np.testing.assert_array_equal(result.bounds, expected)
    assert result.level == np.flatnonzero(expected <= 0.1)[-1]


@pytest.mark.parametrize("pvalue", ["auto", "betting"])
def test_rcps_exceeds_alpha_with_probability_at_most_delta(pvalue):
    rng = np.random.default_rng(4)
    draws, delta, alpha = 300, 0.1, 0.1
    violations = 0
    for _ in range(draws):
        losses = (rng.random((200, 1)) < RISKS).astype(float)
        level = control.rcps(losses, alpha - 1e-9, delta, pvalue).level
        violations += level is not None and RISKS[level] >= alpha
    assert violations <= stats.binom.ppf(1 - 1e-4, draws, delta)


def test_nothing_to_choose_is_an_ordinary_outcome():
    losses = np.ones((50, 3))
    assert control.conformal_risk_control(losses, 0.1).level is None
    assert control.rcps(losses, 0.1, 0.1).level is None
    assert control.conformal_risk_control(np.zeros((5, 3)), 0.1).level is None


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="alpha"):
        control.conformal_risk_control(np.zeros((5, 2)), 1.0)
    with pytest.raises(ValueError, match="delta"):
        control.rcps(np.zeros((5, 2)), 0.1, 0.0)
    with pytest.raises(ValueError, match="nan"):
        control.conformal_risk_control([[np.nan]], 0.1)
