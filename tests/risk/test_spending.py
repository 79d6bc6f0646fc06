"""Evidence at several looks: exact boundaries, and validity whatever is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from risk import reference
from scipy import stats

from confprune.risk import spending

PVALUES = ["binomial", "hoeffding", "bentkus", "hoeffding_bentkus", "convex", "betting"]


@given(
    increments=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    alpha=st.floats(0.01, 0.6),
    shares=st.lists(st.floats(0.0, 0.1), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_boundaries_spend_exactly_what_is_allowed(increments, alpha, shares):
    counts = np.cumsum(increments)
    allowed = np.cumsum(shares)[: len(counts)] + 1e-9
    path, critical = spending.ErrorSpending(alpha), []
    for count, limit in zip(counts, allowed, strict=True):
        boundary, path = path.after(int(count)).reject(limit)
        critical.append(boundary)
    expected, rejected = reference.error_spending(counts, allowed, alpha)
    assert critical == expected
    assert path.spent == pytest.approx(rejected, rel=1e-9, abs=1e-15)
    assert path.spent <= allowed[-1] + 1e-15
    # A level whose risk is larger is rejected less often.
    assert reference.error_spending(counts, allowed, alpha, risk=min(1, 1.2 * alpha))[1] <= (
        rejected + 1e-12
    )


def test_one_look_is_the_binomial_test():
    path = spending.ErrorSpending(0.05).after(1000)
    errors = np.arange(0, 1001)
    np.testing.assert_allclose(path.pvalue(errors), stats.binom.cdf(errors, 1000, 0.05), rtol=1e-10)
    critical, _ = path.reject(0.1)
    assert critical == stats.binom.ppf(0.1, 1000, 0.05) - 1


def test_boundaries_of_large_samples_lose_nothing_to_the_window():
    path = spending.ErrorSpending(0.01)
    rng = np.random.default_rng(0)
    errors, crossed = np.zeros(200_000, dtype=int), np.zeros(200_000, dtype=bool)
    previous = 0
    for count, allowed in [(10_000, 0.03), (30_000, 0.06), (100_000, 0.1)]:
        critical, path = path.after(count).reject(allowed)
        errors += rng.binomial(count - previous, 0.01, errors.shape)
        crossed |= errors <= critical
        previous = count
    assert path.spent == pytest.approx(0.1, abs=0.004)
    assert path.spent <= 0.1
    assert abs(crossed.mean() - path.spent) < 4 * np.sqrt(0.09 / 200_000)


def boundary_losses(rng, shape, mean, binary):
    if binary:
        return (rng.random(shape) < mean).astype(np.float64)
    return np.where(rng.random(shape) < 0.5, rng.beta(4 * mean, 4 - 4 * mean, shape), mean)


def observe(tracker, losses, levels, counted):
    """Losses of one part, a column for each of `levels`."""
    [part] = tracker.split(losses, counted, np.array([0, len(losses)]))
    tracker.observe(part, np.arange(len(levels)), levels)


def everything(rng, losses):
    return losses, np.ones(losses.shape, dtype=bool)


def group(rng, losses):
    """A fifth of the examples, the same for all levels; the others have other losses."""
    members = np.broadcast_to(rng.random((len(losses), 1)) < 0.2, losses.shape)
    return np.where(members, losses, 1.0), members


def accepted(rng, losses):
    """Each level accepts its own examples; those it declines, it would mostly get wrong."""
    mask = rng.random(losses.shape) < np.linspace(0.3, 1.0, losses.shape[1])
    return np.where(mask, losses, rng.random(losses.shape) < 0.9), mask


@pytest.mark.parametrize("counting", [everything, group, accepted])
@pytest.mark.parametrize("name", PVALUES)
def test_pvalues_are_super_uniform_over_all_looks(name, counting):
    """Levels are independent repetitions here, each with its risk exactly at alpha."""
    rng = np.random.default_rng(1)
    repetitions, alpha = (1500 if counting is accepted else 4000), 0.1
    sizes, shares = [60, 100, 170, 300], np.array([0.02, 0.03, 0.03, 0.02])
    tracker = spending.make_tracker(name, alpha, repetitions, sizes[-1], shares)
    levels = np.arange(repetitions)
    for look, (first, last) in enumerate(zip([0, *sizes], sizes, strict=False)):
        losses = boundary_losses(rng, (last - first, repetitions), alpha, name == "binomial")
        losses, counted = counting(rng, losses)
        observe(tracker, losses, levels, counted)
        waiting = levels[tracker.pvalues > 0.1]
        tracker.look(look, waiting)
    for level in (0.01, 0.05, 0.1, 0.4):
        allowed = stats.binom.ppf(1 - 1e-5, repetitions, level)
        assert np.count_nonzero(tracker.pvalues <= level) <= allowed
    if name == "binomial" and counting is everything:  # Exact: nearly all of delta is used.
        assert np.count_nonzero(tracker.pvalues <= 0.1) > stats.binom.ppf(1e-5, repetitions, 0.08)


@pytest.mark.parametrize("name", ["binomial", "convex", "betting"])
def test_futility_gives_up_few_levels_that_would_have_been_rejected(name):
    rng = np.random.default_rng(2)
    repetitions, alpha, n, futility = 3000, 0.1, 600, 0.03
    # A risk at which the last look rejects about half of the time.
    risk = {"binomial": 0.0835, "convex": 0.081, "betting": 0.08}[name]
    tracker = spending.make_tracker(name, alpha, repetitions, n, np.array([0, 0, 0, 0.1]))
    levels = np.arange(repetitions)
    given_up = np.zeros(repetitions, dtype=bool)
    for look in range(4):
        losses = (rng.random((n // 4, repetitions)) < risk).astype(float)
        observe(tracker, losses, levels, np.ones(losses.shape, dtype=bool))
        tracker.look(look, levels)
        if look < 3:
            hope = tracker.hope(levels, n // 4 * (look + 1), 0.1)
            given_up |= (hope <= futility) & (tracker.pvalues > 0.1)
    rejected = tracker.pvalues <= 0.1
    assert 0.2 < rejected.mean() < 0.8
    assert np.mean(given_up & rejected) <= 3 * futility * rejected.mean()
    assert np.mean(given_up) > 0.15


def test_without_futility_only_certain_losers_are_given_up():
    tracker = spending.make_tracker("binomial", 0.1, 3, 300, np.array([0.05, 0.05]))
    critical = spending.critical_sum(300, 0.1, 0.1, "binomial")
    tracker.add(np.array([critical, critical + 1, 0.0]), np.arange(3), np.array([100, 100, 100]))
    hopeless = tracker.beyond_reach(np.arange(3), 100, 0.1)
    np.testing.assert_array_equal(hopeless, [False, True, False])
    # If only half of the examples counted so far, all of the others may still do.
    tracker.counts[:] = 50
    fewer = spending.critical_sum(250, 0.1, 0.1, "binomial")
    tracker.sums[:] = [fewer, fewer + 1, 0.0]
    hopeless = tracker.beyond_reach(np.arange(3), 100, 0.1)
    np.testing.assert_array_equal(hopeless, [False, True, False])
    betting = spending.make_tracker("betting", 0.1, 1, 300, np.array([0.1]))
    assert not betting.beyond_reach(np.arange(1), 100, 0.1).any()


def test_unsuitable_pvalues_and_losses_are_refused():
    with pytest.raises(ValueError, match=r"'clt'.*looks=None"):
        spending.make_tracker("clt", 0.1, 1, 100, np.array([0.1]))
    tracker = spending.make_tracker("binomial", 0.1, 1, 100, np.array([0.1]))
    with pytest.raises(ValueError, match="0 or 1"):
        observe(tracker, np.full((5, 1), 0.5), np.arange(1), np.ones((5, 1), dtype=bool))
