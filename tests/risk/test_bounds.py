"""Critical sums, confidence bounds and the smallest useful sample."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from confprune.risk import bounds, pvalues

SUM_BASED = ["hoeffding", "bentkus", "hoeffding_bentkus", "binomial", "convex"]


def from_sums(name, total, n, alpha):
    return pvalues.PVALUES[name].from_sums(np.array([total], dtype=float), n, alpha)[0]


@given(
    n=st.integers(1, 20_000),
    alpha=st.floats(1e-4, 1 - 1e-4),
    delta=st.floats(1e-6, 0.5),
    name=st.sampled_from(SUM_BASED),
)
@settings(max_examples=150, deadline=None)
def test_the_critical_sum_is_rejected_and_anything_larger_is_not(n, alpha, delta, name):
    critical = bounds.critical_sum(n, alpha, delta, name)
    if critical == -np.inf:
        assert from_sums(name, 0.0, n, alpha) > delta
        return
    assert from_sums(name, critical, n, alpha) <= delta
    step = 1.0 if name == "binomial" else max(1e-9 * critical, 1e-9)
    if critical + step <= n:
        assert from_sums(name, critical + step, n, alpha) > delta * (1 - 1e-6)


@pytest.mark.parametrize("name", SUM_BASED)
@pytest.mark.parametrize("n", [100, 2000])
def test_critical_sums_by_scanning(name, n):
    totals = np.arange(n + 1) if name in ("binomial", "bentkus") else np.linspace(0, n, 20 * n + 1)
    for alpha, delta in [(0.05, 0.1), (0.3, 0.01)]:
        values = pvalues.PVALUES[name].from_sums(totals, n, alpha)
        expected = totals[np.flatnonzero(values <= delta)[-1]]
        critical = bounds.critical_sum(n, alpha, delta, name)
        assert expected <= critical < expected + totals[1]


def test_critical_sums_for_many_counts_at_once():
    counts = np.array([[0, 10, 44], [45, 5000, 45]])
    together = bounds.critical_sum(counts, 0.05, 0.1)
    assert together.shape == (2, 3)
    one_by_one = [bounds.critical_sum(int(n), 0.05, 0.1) for n in counts.ravel()]
    np.testing.assert_array_equal(together.ravel(), one_by_one)
    np.testing.assert_array_equal(together.ravel()[:3], -np.inf)


def test_the_binomial_bound_is_clopper_pearson():
    totals = np.arange(0, 1001, 50)
    expected = np.append(stats.beta.ppf(0.9, totals[:-1] + 1, 1000 - totals[:-1]), 1.0)
    np.testing.assert_allclose(
        bounds.upper_bound_from_sums(totals, 1000, 0.1, "binomial"), expected, rtol=1e-11
    )


@given(
    n=st.integers(1, 5000),
    share=st.floats(0, 1),
    delta=st.floats(1e-6, 0.5),
    name=st.sampled_from(SUM_BASED),
)
@settings(max_examples=150, deadline=None)
def test_at_the_bound_the_pvalue_has_just_reached_delta(n, share, delta, name):
    total = np.floor(share * n) if name == "binomial" else share * n
    bound = bounds.upper_bound_from_sums([total], n, delta, name)[0]
    assert total / n <= bound <= 1.0
    if bound < 1.0:
        assert from_sums(name, total, n, bound) <= delta
    below = bound * (1 - 1e-9)
    assert bound == 0.0 or from_sums(name, total, n, below) > delta * (1 - 1e-5)


def test_bounds_of_many_levels_with_their_own_counts():
    totals, counts = np.array([0.0, 3.5, 3.5, 10.0]), np.array([0, 100, 50, 10])
    together = bounds.upper_bound_from_sums(totals, counts, 0.1, "convex")
    for j in range(4):
        alone = bounds.upper_bound_from_sums(totals[j : j + 1], counts[j], 0.1, "convex")[0]
        np.testing.assert_allclose(together[j], alone, rtol=1e-11)
    assert together[0] == together[3] == 1.0


def test_bounds_from_losses_for_every_pvalue():
    rng = np.random.default_rng(0)
    losses = rng.beta(0.5, 9, (800, 3)).astype(np.float32)
    losses[:, 2] = 0.0
    for name, kind in pvalues.PVALUES.items():
        matrix = (losses > 0.2).astype(float) if kind.binary_only else losses
        bound = bounds.upper_bound(matrix, 0.1, name)
        for j in range(3):
            column = matrix[:, [j]]
            betting = {"delta": 0.1} if name == "betting" else {}
            assert kind.from_losses(column, bound[j] + 1e-12, **betting)[0] <= 0.1
            assert kind.from_losses(column, bound[j] * (1 - 1e-6), **betting)[0] > 0.1
    np.testing.assert_array_equal(
        bounds.upper_bound(losses, 0.1), bounds.upper_bound(losses, 0.1, "convex")
    )


@pytest.mark.filterwarnings("error")
def test_pvalues_that_are_too_small_for_a_number_pass_in_silence():
    losses = np.zeros((5000, 1))
    assert 0 < bounds.upper_bound(losses, 0.1, "betting")[0] < 0.001


@pytest.mark.parametrize("name", [name for name in pvalues.PVALUES if name != "clt"])
def test_bounds_cover_the_risk(name):
    rng = np.random.default_rng(1)
    draws, delta, risk, n = 1000, 0.1, 0.08, 150
    losses = (rng.random((n, draws)) < risk).astype(float)
    missed = np.count_nonzero(bounds.upper_bound(losses, delta, name) < risk)
    assert missed <= stats.binom.ppf(1 - 1e-5, draws, delta)


@given(
    alpha=st.one_of(st.floats(1e-3, 0.999), st.sampled_from([0.5, 0.75, 0.25, 0.125, 0.1, 0.9])),
    delta=st.one_of(st.floats(1e-9, 0.999), st.sampled_from([2.0**-k for k in range(1, 30)])),
)
@settings(max_examples=150, deadline=None)
def test_required_n_is_exactly_the_smallest_that_can_certify(alpha, delta):
    n = bounds.required_n(alpha, delta)
    if n <= 2000:
        keep = 1 - Fraction(alpha)
        assert keep**n <= Fraction(delta)
        assert n == 1 or keep ** (n - 1) > Fraction(delta)
    assert bounds.critical_sum(n, alpha, delta) >= 0 or n > 1000
    assert n == 1 or bounds.critical_sum(n - 1, alpha, delta) == -np.inf


def test_required_n_at_known_points():
    assert bounds.required_n(0.05, 0.1) == 45
    assert bounds.required_n(0.5, 0.25) == 2
    assert bounds.required_n(0.5, 2.0**-40) == 40
    assert bounds.required_n(0.9, 0.5) == 1
    assert bounds.required_n(1e-6, 0.1) == 2_302_584


def test_settings_without_a_bound_are_refused():
    with pytest.raises(ValueError, match=r"'betting'.*convex"):
        bounds.critical_sum(100, 0.1, 0.1, "betting")
    with pytest.raises(ValueError, match="upper_bound"):
        bounds.upper_bound_from_sums([1.0], 10, 0.1, "clt")
    with pytest.raises(ValueError, match="binomial"):
        bounds.upper_bound(np.full((10, 1), 0.5), 0.1, "binomial")
    with pytest.raises(ValueError, match="delta"):
        bounds.upper_bound(np.zeros((10, 1)), 1.5)
