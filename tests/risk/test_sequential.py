"""Sequential testing: the same answers as on the full matrix, for less, and as valid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from risk import reference
from scipy import stats

from confprune.risk import looks, procedures, pvalues
from confprune.risk.sequential import RiskTarget, SequentialTest

N, LEVELS = 240, 8
SIZES = (40, 90, 150, 240)
SHARES = (0.03, 0.02, 0.02, 0.03)


def run(test, losses, counted=None, batch=50, stop_at_looks=True):
    """Feed whole matrices [n, K], one per risk, in batches."""
    while not test.finished:
        end = min(test.seen + batch, len(losses[0]))
        rows = slice(test.seen, min(end, test.next_look) if stop_at_looks else end)
        masks = None
        if counted is not None:
            masks = [
                None
                if mask is None
                else mask[rows]
                if mask.ndim == 1
                else mask[rows][:, test.active]
                for mask in counted
            ]
        test.update([matrix[rows][:, test.active] for matrix in losses], masks)
    return test.result()


def passes(name, losses, counted, alpha, spending):
    """Whether each level of the full matrix is rejected at some look, look by look."""
    rejected = np.zeros(losses.shape[1], dtype=bool)
    for j in range(losses.shape[1]):
        mask = counted if counted.ndim == 1 else counted[:, j]
        counts = [int(mask[:size].sum()) for size in SIZES]
        sums = [losses[:size, j][mask[:size]].sum() for size in SIZES]
        if name == "binomial":
            critical, _ = reference.error_spending(counts, np.cumsum(spending), alpha)
            rejected[j] = np.any(np.array(sums) <= critical)
        elif name == "betting":
            rejected[j] = reference.betting(losses[:, j], alpha, mask) <= sum(spending)
        else:
            for total, count, spent in zip(sums, counts, spending, strict=True):
                value = pvalues.PVALUES[name].from_sums([total], count, alpha)[0]
                rejected[j] |= value <= spent
    return rejected


@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(["binomial", "convex", "betting"]),
    counting=st.sampled_from(["all", "group", "accepted"]),
    procedure=st.sampled_from(["fixed_sequence", "bonferroni"]),
    batch=st.integers(7, 300),
    stop_at_looks=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_without_futility_the_full_matrix_gives_the_same(
    seed, name, counting, procedure, batch, stop_at_looks
):
    rng = np.random.default_rng(seed)
    losses = (rng.random((N, 1)) < np.linspace(0, 0.25, LEVELS)).astype(np.float32)
    if name == "convex":
        losses *= rng.random(losses.shape).astype(np.float32)
    counted = {
        "all": np.ones(N, dtype=bool),
        "group": rng.random(N) < 0.6,
        "accepted": rng.random((N, LEVELS)) < 0.8,
    }[counting]
    plan = looks.LookPlan(SIZES, SHARES, delta=0.1, futility=0.0)
    test = SequentialTest(plan, LEVELS, [RiskTarget(0.2, name)], procedure=procedure)
    result = run(test, [losses], [counted], batch, stop_at_looks)
    scale = 1 if procedure == "fixed_sequence" else LEVELS
    expected = passes(name, losses.astype(float), counted, 0.2, np.array(SHARES) / scale)
    if procedure == "fixed_sequence":
        expected = np.logical_and.accumulate(expected)
    if name == "betting" and procedure == "bonferroni":
        return  # Its stakes are tuned to delta / K there.
    np.testing.assert_array_equal(result.rejected, expected)
    assert result.evaluations == result.seen.sum() <= N * LEVELS
    assert result.saved == 1 - result.evaluations / (N * LEVELS)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_several_risks_and_groups_must_all_pass_but_not_at_the_same_look(seed):
    rng = np.random.default_rng(seed)
    whole = (rng.random((N, 1)) < np.linspace(0, 0.2, LEVELS)).astype(float)
    part = (rng.random((N, 1)) < np.linspace(0, 0.3, LEVELS)).astype(float)
    members = rng.random(N) < 0.5
    targets = [RiskTarget(0.15, "binomial"), RiskTarget(0.3, "convex")]
    plan = looks.LookPlan(SIZES, SHARES, delta=0.1, futility=0.0)
    result = run(SequentialTest(plan, LEVELS, targets), [whole, part], [None, members])
    everyone = np.ones(N, dtype=bool)
    expected = passes("binomial", whole, everyone, 0.15, SHARES)
    expected &= passes("convex", part, members, 0.3, SHARES)
    np.testing.assert_array_equal(result.rejected, np.logical_and.accumulate(expected))
    np.testing.assert_array_equal(result.pvalues, result.pvalues_by_risk.max(axis=0))


def test_one_look_at_the_end_is_the_fixed_n_test():
    rng = np.random.default_rng(0)
    losses = (rng.random((N, 1)) < np.linspace(0, 0.3, LEVELS)).astype(float)
    plan = looks.LookPlan((N,), (0.1,), delta=0.1)
    for procedure in ("fixed_sequence", "bonferroni", "holm", "split_fixed_sequence"):
        for name in ("binomial", "convex", "hoeffding_bentkus", "betting"):
            test = SequentialTest(plan, LEVELS, [RiskTarget(0.2, name)], procedure=procedure)
            result = run(test, [losses])
            values = getattr(pvalues, name)(losses, 0.2)
            extra = {"order": range(LEVELS)} if procedure == "split_fixed_sequence" else {}
            if not (name == "betting" and procedure in ("bonferroni", "holm")):
                np.testing.assert_allclose(result.pvalues, values, rtol=1e-10)
            expected = procedures.PROCEDURES[procedure].test(result.pvalues, 0.1, **extra)
            np.testing.assert_array_equal(result.rejected, expected)
            assert result.saved == 0.0


def test_holm_under_looks_rejects_at_least_what_bonferroni_does():
    rng = np.random.default_rng(1)
    plan = looks.LookPlan(SIZES, SHARES, delta=0.1)
    more = 0
    for _ in range(40):
        losses = (rng.random((N, LEVELS)) < np.linspace(0, 0.2, LEVELS)).astype(float)
        rejected = {
            name: run(
                SequentialTest(plan, LEVELS, [RiskTarget(0.2)], procedure=name), [losses]
            ).rejected
            for name in ("bonferroni", "holm")
        }
        assert np.all(rejected["holm"] >= rejected["bonferroni"])
        more += np.count_nonzero(rejected["holm"] & ~rejected["bonferroni"])
    assert more > 0


def test_sums_and_losses_may_be_fed_alike():
    rng = np.random.default_rng(2)
    losses = (rng.random((N, 1)) < np.linspace(0, 0.3, LEVELS)).astype(float)
    plan = looks.LookPlan(SIZES, SHARES, delta=0.1)
    by_loss = run(SequentialTest(plan, LEVELS, [RiskTarget(0.2)]), [losses])
    test = SequentialTest(plan, LEVELS, [RiskTarget(0.2)])
    while not test.finished:
        rows = losses[test.seen : test.next_look][:, test.active]
        test.update_sums(len(rows), rows.sum(axis=0)[None])
    np.testing.assert_array_equal(test.result().pvalues, by_loss.pvalues)
    assert test.result().evaluations == by_loss.evaluations


@pytest.mark.parametrize("procedure", ["fixed_sequence", "bonferroni"])
@pytest.mark.parametrize("name", ["binomial", "convex", "hoeffding_bentkus", "betting"])
def test_nothing_is_rejected_before_the_first_look_that_may(name, procedure):
    spending = tuple(np.linspace(0.001, 0.015, 10))
    plan = looks.LookPlan(tuple(range(20, 220, 20)), spending, delta=sum(spending))
    targets = [RiskTarget(0.05, name), RiskTarget(0.08, name)]
    test = SequentialTest(plan, 3, targets, procedure=procedure)
    first = test.first_rejection
    run(test, [np.zeros((200, 3))] * 2)
    assert np.all(test.evaluated >= first)
    if name in ("binomial", "convex"):  # exact for zero losses, if the first look spends anything
        alone = SequentialTest(plan, 1, [RiskTarget(0.05)], procedure=procedure)
        run(alone, [np.zeros((200, 1))])
        assert alone.evaluated[0] == alone.first_rejection
        assert 20 < alone.first_rejection < 200


def test_where_zero_losses_are_not_enough_there_is_no_first_rejection():
    test = SequentialTest(looks.LookPlan((5, 10), (0.05, 0.05), delta=0.1), 1, [RiskTarget(0.05)])
    assert test.first_rejection == 10


def test_a_doubtful_level_before_a_promising_one_is_kept():
    n = 400
    plan = looks.LookPlan((200, n), (0.02, 0.08), delta=0.1, futility=0.05)
    losses = np.zeros((n, 3))
    losses[:22, 1] = 1.0  # Doubtful at the first look, fine at the last.
    doubtful_last = SequentialTest(plan, 2, [RiskTarget(0.1)])
    doubtful_last.update([losses[:200, :2]])
    assert doubtful_last.finished
    np.testing.assert_array_equal(doubtful_last.result().rejected, [True, False])
    before_good = SequentialTest(plan, 3, [RiskTarget(0.1)])
    before_good.update([losses[:200]])
    np.testing.assert_array_equal(before_good.active, [1])
    before_good.update([losses[200:, 1:2]])
    np.testing.assert_array_equal(before_good.result().rejected, [True, True, True])


def test_a_lost_level_ends_the_chain_for_good():
    plan = looks.LookPlan((200, 400), (0.02, 0.08), delta=0.1)
    losses = np.zeros((200, 3))
    losses[:100, 1] = 1.0
    test = SequentialTest(plan, 3, [RiskTarget(0.1)])
    test.update([losses])
    assert test.finished
    np.testing.assert_array_equal(test.result().rejected, [True, False, False])
    assert test.result().evaluations == 600


CASES = {
    "one risk": [RiskTarget(0.1, "binomial")],
    "one risk, convex": [RiskTarget(0.1, "convex")],
    "one risk, betting": [RiskTarget(0.1, "betting")],
    "two risks": [RiskTarget(0.1, "binomial"), RiskTarget(0.3, "convex")],
    "groups": [RiskTarget(0.1, "binomial"), RiskTarget(0.1, "binomial")],
    "selective": [RiskTarget(0.1, "binomial")],
}


@pytest.mark.parametrize(
    ("case", "procedure"),
    [(case, "fixed_sequence") for case in CASES]
    + [("one risk", "bonferroni"), ("groups", "bonferroni"), ("one risk", "holm")],
)
def test_family_wise_error_under_looks_is_at_most_delta(case, procedure):
    """From level 3 on, some risk is exactly at its alpha: the worst case."""
    rng = np.random.default_rng(3)
    draws, n, delta = 300, 400, 0.1
    good, bad = 3, 3
    risks = np.array([0.0, 0.01, 0.03] + [0.1] * bad)
    name = CASES[case][0].pvalue
    plan = looks.default_looks(n, 0.1, delta, name)
    assert len(plan.sizes) > 3
    violations = power = 0
    for _ in range(draws):
        first = (rng.random((n, 1)) < risks).astype(float)
        rare = (rng.random((n, 1)) < 0.1 * risks).astype(float)
        losses, counted = [first], None
        if case == "two risks":
            losses = [rare, (rng.random((n, 1)) < 3 * risks).astype(float)]
        elif case == "groups":
            minority = rng.random(n) < 0.3
            losses, counted = [rare, first], [~minority, minority]
        elif case == "selective":
            mask = rng.random((n, len(risks))) < np.linspace(1, 0.5, len(risks))
            losses, counted = [np.where(mask, first, 1.0)], [mask]
        test = SequentialTest(plan, len(risks), CASES[case], procedure=procedure)
        result = run(test, losses, counted, batch=1000)
        violations += result.rejected[good:].any()
        power += result.rejected[:good].sum()
    assert violations <= stats.binom.ppf(1 - 1e-4, draws, delta)
    assert power > draws


def test_misuse_is_refused():
    plan = looks.LookPlan((50, 100), (0.05, 0.05), delta=0.1)
    test = SequentialTest(plan, 2, [RiskTarget(0.1)])
    with pytest.raises(ValueError, match="last look is at 100"):
        test.update([np.zeros((101, 2))])
    with pytest.raises(ValueError, match="next look is at 50"):
        test.update_sums(51, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="per active level"):
        test.update([np.zeros((50, 3))])
    with pytest.raises(ValueError, match="as many losses"):
        test.update([np.zeros((50, 2))] * 2)
    with pytest.raises(ValueError, match="counted must be"):
        test.update([np.zeros((10, 2))], [np.ones(9, dtype=bool)])
    with pytest.raises(ValueError, match="sums must be"):
        test.update_sums(10, [[11.0, 0.0]])
    with pytest.raises(ValueError, match="at most 10"):
        test.update_sums(10, [[1.0, 0.0]], [[11, 10]])
    with pytest.raises(ValueError, match="0 or 1"):
        test.update_sums(10, [[0.5, 0.0]])
    with pytest.raises(ValueError, match="procedure='graphical'"):
        SequentialTest(plan, 2, [RiskTarget(0.1)], procedure="graphical")
    with pytest.raises(ValueError, match="a level and a risk"):
        SequentialTest(plan, 2, [])
    with pytest.raises(ValueError, match="alpha"):
        SequentialTest(plan, 2, [RiskTarget(1.1)])
    betting = SequentialTest(plan, 2, [RiskTarget(0.1, "betting")])
    with pytest.raises(ValueError, match="call update"):
        betting.update_sums(10, [[1.0, 0.0]])
    done = SequentialTest(plan, 1, [RiskTarget(0.1)])
    done.update([np.ones((50, 1))])
    with pytest.raises(ValueError, match="finished"):
        done.update([np.ones((50, 1))])


def test_a_small_group_with_tiny_losses_is_not_given_up():
    """A group of 2 % of the examples, whose bets start late, passes as it would with no loss."""
    rejected = []
    for loss in (0.0, 1e-9):
        rng = np.random.default_rng(0)
        plan = looks.default_looks(6000, 0.05, 0.1, "betting")
        test = SequentialTest(plan, levels=2, targets=[RiskTarget(0.05, "betting")] * 2)
        while not test.finished:
            m = test.next_look - test.seen
            losses = np.full((m, len(test.active)), loss)
            test.update([losses, losses], [rng.random(m) < 0.02, None])
        rejected.append(test.result().rejected.all())
    assert rejected == [True, True]
