"""Plans for early looks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from confprune.risk import looks, pvalues, testing
from confprune.risk.bounds import required_n
from confprune.risk.sequential import RiskTarget, SequentialTest

SPARSITIES = np.arange(100) / 100
CURVES = {
    "steep": 0.002 + 0.6 / (1 + np.exp(-(SPARSITIES - 0.9) / 0.02)),
    "shallow": 0.002 + 0.12 * SPARSITIES**3,
    "non-monotone": 0.004 + 0.02 * np.sin(25 * SPARSITIES) ** 2 + 0.25 * SPARSITIES**6,
}


@given(
    n=st.integers(1, 10**6),
    alpha=st.floats(0.001, 0.5),
    delta=st.floats(0.001, 0.3),
    pvalue=st.sampled_from(["binomial", "convex", "betting"]),
)
def test_default_plans_end_at_n_and_spend_delta(n, alpha, delta, pvalue):
    plan = looks.default_looks(n, alpha, delta, pvalue)
    plan.check_n(n)
    assert sum(plan.spending) == pytest.approx(delta)
    if len(plan.sizes) > 1:
        assert plan.sizes[0] >= 1.5 * required_n(alpha, delta)
    else:
        assert n < 3 * required_n(alpha, delta)


def test_plans_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="more than delta"):
        looks.LookPlan((10, 20), (0.06, 0.05), 0.1)
    with pytest.raises(ValueError, match="increase"):
        looks.LookPlan((20, 20), (0.05, 0.05), 0.1)
    with pytest.raises(ValueError, match="increase"):
        looks.LookPlan((0, 20), (0.05, 0.05), 0.1)
    with pytest.raises(ValueError, match="one spending per size"):
        looks.LookPlan((10, 20), (0.05,), 0.1)
    with pytest.raises(ValueError, match="one spending per size"):
        looks.LookPlan((), (), 0.1)
    with pytest.raises(ValueError, match="nothing negative"):
        looks.LookPlan((10, 20), (-0.05, 0.05), 0.1)
    with pytest.raises(ValueError, match="futility"):
        looks.LookPlan((10,), (0.05,), 0.1, futility=0.6)
    with pytest.raises(ValueError, match="delta"):
        looks.LookPlan((10,), (0.05,), 1.5)
    with pytest.raises(ValueError, match="20 examples but there are 15"):
        looks.LookPlan((10, 20), (0.05, 0.05), 0.1).check_n(15)


@pytest.mark.parametrize("curve", CURVES)
def test_default_plans_save_most_of_the_work_at_little_cost_in_sparsity(curve):
    rng = np.random.default_rng(0)
    n, alpha, delta, draws = 5000, 0.05, 0.1, 60
    risks = CURVES[curve]
    order = np.argsort(risks)
    bins = np.diff(np.concatenate([[0], risks[order], [1]]))
    plan = looks.default_looks(n, alpha, delta)
    evaluations = loss = violations = 0
    for _ in range(draws):
        test = SequentialTest(plan, 100, [RiskTarget(alpha)])
        sums = np.zeros(100)
        for size in np.diff([0, *plan.sizes]):
            more = np.empty(100)
            more[order] = rng.multinomial(size, bins)[:-1].cumsum()
            sums += more
            if not test.finished:
                test.update_sums(int(size), more[None, test.active])
        result = test.result()
        fixed = testing.fixed_sequence(pvalues.binomial_from_sums(sums, n, alpha), delta)
        evaluations += result.evaluations
        loss += (fixed.sum() - result.rejected.sum()) / 100
        violations += result.rejected[risks > alpha].any()
    assert evaluations / draws < n * 100 / 8
    assert loss / draws < 0.015  # Half a grid step, and three standard errors.
    assert violations <= 15
