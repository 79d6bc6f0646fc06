"""Testing procedures: what they reject, and their family-wise error rate."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from risk import reference
from scipy import stats

from confprune.risk import procedures, pvalues, testing

some_pvalues = hnp.arrays(
    np.float64, st.integers(1, 8), elements=st.sampled_from([0.0, 0.004, 0.01, 0.03, 0.1, 0.5, 1.0])
)
deltas = st.sampled_from([0.01, 0.05, 0.1, 0.2])


@given(some_pvalues, deltas)
def test_fixed_sequence_stops_at_the_first_failure(values, delta):
    expected = []
    for value in values:
        if value > delta:
            break
        expected.append(True)
    expected += [False] * (len(values) - len(expected))
    np.testing.assert_array_equal(testing.fixed_sequence(values, delta), expected)


@given(some_pvalues, deltas)
def test_bonferroni_and_holm_by_definition(values, delta):
    levels = len(values)
    np.testing.assert_array_equal(testing.bonferroni(values, delta), values <= delta / levels)
    # Holm: H_j falls if every set of levels containing j falls by Bonferroni.
    uniform = np.full(levels, 1 / levels)
    graph = (np.ones((levels, levels)) - np.eye(levels)) / max(levels - 1, 1)
    np.testing.assert_array_equal(
        testing.holm(values, delta),
        reference.closed_test(values, delta * (1 + 1e-12), uniform, graph),
    )


@given(some_pvalues, deltas, st.data())
def test_fixed_sequence_with_several_starts_is_a_graph_of_chains(values, delta, data):
    levels = len(values)
    starts = data.draw(st.lists(st.integers(0, levels - 1), min_size=1, max_size=5))
    rejected = testing.fixed_sequence(values, delta, starts=starts)
    distinct = set(starts)
    weights = np.array([1 / len(distinct) if j in distinct else 0.0 for j in range(levels)])
    expected = reference.closed_test(values, delta * (1 + 1e-12), weights, np.eye(levels, k=1))
    np.testing.assert_array_equal(rejected, expected)
    for start in distinct:  # At least what separate chains reject.
        run = testing.fixed_sequence(values[start:], delta / len(distinct))
        assert np.all(rejected[start:] >= run)


def test_one_start_at_the_first_level_is_plain_fixed_sequence_testing():
    values = np.array([0.01, 0.1, 0.1000001, 0.0])
    np.testing.assert_array_equal(
        testing.fixed_sequence(values, 0.1, starts=[0, 0]), testing.fixed_sequence(values, 0.1)
    )


@given(some_pvalues.filter(lambda values: len(values) <= 5), deltas, st.integers(0, 2**32 - 1))
def test_graphical_testing_is_the_closed_test_it_abbreviates(values, delta, seed):
    rng = np.random.default_rng(seed)
    levels = len(values)
    weights = rng.dirichlet(np.ones(levels)) * rng.choice([1.0, 0.7])
    graph = rng.random((levels, levels)) * (rng.random((levels, levels)) < 0.7)
    np.fill_diagonal(graph, 0.0)
    graph /= np.maximum(graph.sum(axis=1, keepdims=True), 1.0)
    np.testing.assert_array_equal(
        testing.graphical(values, delta, weights=weights, transitions=graph),
        reference.closed_test(values, delta, weights, graph),
    )


@given(some_pvalues, deltas)
def test_a_chain_graph_is_fixed_sequence_testing(values, delta):
    levels = len(values)
    np.testing.assert_array_equal(
        testing.graphical(
            values, delta, weights=np.eye(levels)[0], transitions=np.eye(levels, k=1)
        ),
        testing.fixed_sequence(values, delta),
    )


def test_split_fixed_sequence_follows_the_order_and_leaves_out_the_rest():
    values = [0.9, 0.01, 0.02, 0.03, 0.001]
    rejected = testing.split_fixed_sequence(values, 0.1, order=[3, 1, 0, 2])
    np.testing.assert_array_equal(rejected, [False, True, False, True, False])


@given(st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_pareto_order_keeps_what_no_other_candidate_beats_in_both_respects(seed, risks):
    rng = np.random.default_rng(seed)
    losses = [(rng.random((30, 12)) < 0.3).astype(float) for _ in range(risks)]
    sparsities = rng.integers(0, 6, 12) / 6
    order = testing.pareto_order(losses, [0.2, 0.4][:risks], sparsities)
    if risks == 1:  # With one risk, evidence is the empirical risk.
        danger = losses[0].mean(axis=0)
        assert np.all(np.diff(danger[order]) >= 0)
        for candidate in range(12):
            beaten = np.any((danger < danger[candidate]) & (sparsities >= sparsities[candidate]))
            twin = (danger[order] == danger[candidate]) & (
                sparsities[order] == sparsities[candidate]
            )
            assert twin.any() != beaten
    assert np.all(np.diff(sparsities[order]) > 0)


def test_pareto_order_takes_the_worst_of_several_risks():
    safe_in_one = [np.zeros((50, 2)), np.zeros((50, 2))]
    safe_in_one[1][:30, 0] = 1.0
    order = testing.pareto_order(safe_in_one, [0.1, 0.1], [0.5, 0.4])
    np.testing.assert_array_equal(order, [1, 0])


def boundary_losses(rng, n, levels, alpha):
    """Binary losses, dependent between levels; the second half has its risk exactly at alpha."""
    risks = np.concatenate(
        [np.linspace(0.2, 0.6, levels // 2) * alpha, np.full(levels // 2, alpha)]
    )
    common = rng.random((n, 1))
    own = rng.random((n, levels))
    shared = rng.random((n, levels)) < 0.7
    return (np.where(shared, common, own) < risks).astype(float), risks >= alpha


PROCEDURES = {
    "fixed_sequence": {},
    "fixed_sequence with starts": {"starts": [0, 8, 13]},
    "bonferroni": {},
    "holm": {},
    "graphical": {
        "weights": np.full(16, 1 / 16),
        "transitions": (np.ones((16, 16)) - np.eye(16)) / 15,
    },
    "split_fixed_sequence": {"order": [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14]},
}


@pytest.mark.parametrize("name", PROCEDURES)
def test_family_wise_error_is_at_most_delta(name):
    procedure = procedures.resolve_procedure(name.split()[0]).test
    rng = np.random.default_rng(9)
    draws, delta, alpha, n = 1500, 0.1, 0.1, 250
    violations = power = 0
    for _ in range(draws):
        losses, true_null = boundary_losses(rng, n, 16, alpha)
        values = pvalues.binomial_from_sums(losses.sum(axis=0), n, alpha)
        rejected = procedure(values, delta, **PROCEDURES[name])
        violations += bool(np.any(rejected & true_null))
        power += np.count_nonzero(rejected & ~true_null)
    assert violations <= stats.binom.ppf(1 - 1e-5, draws, delta)
    assert power > draws


def test_the_order_learned_on_one_half_does_not_spoil_the_test_on_the_other():
    rng = np.random.default_rng(10)
    draws, delta, alpha, n, violations = 1000, 0.1, 0.1, 300, 0
    sparsities = np.linspace(0.1, 0.9, 16)
    for _ in range(draws):
        losses, true_null = boundary_losses(rng, n, 16, alpha)
        order = testing.pareto_order([losses[:100]], [alpha], sparsities)
        values = pvalues.binomial_from_sums(losses[100:].sum(axis=0), n - 100, alpha)
        rejected = testing.split_fixed_sequence(values, delta, order=order)
        violations += bool(np.any(rejected & true_null))
    assert violations <= stats.binom.ppf(1 - 1e-5, draws, delta)


def test_procedures_declare_what_they_need():
    assert procedures.PROCEDURES["graphical"].needs == ("weights", "transitions")
    assert procedures.PROCEDURES["split_fixed_sequence"].needs == ("order",)
    assert [name for name, p in procedures.PROCEDURES.items() if p.chain] == [
        "fixed_sequence",
        "split_fixed_sequence",
    ]
    with pytest.raises(ValueError, match=r"'hochberg'.*holm"):
        procedures.resolve_procedure("hochberg")


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (0.5, "float"),
        (True, "bool"),
        (None, "NoneType"),
        ([0.2, 0.1, 1.0], r"float64 \(3,\)"),  # p-values, of which none is 0
        ([1, 0, 0], r"int64 \(3,\)"),
        ([True, False], r"bool \(2,\)"),
        ([[True, False, True]], r"bool \(1, 3\)"),
    ],
)
def test_what_an_own_procedure_returns_is_checked(returned, got):
    def mine(pvalues, delta):
        return returned

    test = procedures.resolve_procedure(mine).test
    message = rf"procedure 'mine' must return which of the 3 levels .* bool \[3\], got {got}"
    with pytest.raises(ValueError, match=message):
        test(np.array([0.2, 0.1, 1.0]), 0.1)


def test_an_own_procedure_is_never_taken_for_one_of_ours():
    """By its name certificates are read again, and levels tested early."""

    def holm(pvalues, delta):
        return np.zeros(len(pvalues), dtype=bool)

    assert procedures.resolve_procedure(holm).name == "own holm"
    assert procedures.resolve_procedure(testing.holm) is procedures.PROCEDURES["holm"]
    fallback = functools.partial(testing.fixed_sequence, starts=[0, 1])
    assert procedures.resolve_procedure(fallback).name == "fixed_sequence(starts=...)"
    assert procedures.resolve_procedure(functools.partial(max)).name == "max()"


@pytest.mark.parametrize("of", [list, np.array, torch.tensor])
def test_an_own_procedure_may_return_any_array_of_bool(of):
    test = procedures.resolve_procedure(lambda pvalues, delta: of([True, False])).test
    np.testing.assert_array_equal(test([0.1, 0.2], 0.1), [True, False])


@pytest.mark.parametrize("name", list(procedures.PROCEDURES))
def test_bad_pvalues_and_delta_are_refused(name):
    extra = {
        "graphical": {"weights": [1, 0], "transitions": [[0, 1], [0, 0]]},
        "split_fixed_sequence": {"order": [0, 1]},
    }.get(name, {})
    test = procedures.PROCEDURES[name].test
    for bad in (np.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="at level 1"):
            test([0.5, bad], 0.1, **extra)
    with pytest.raises(ValueError, match=r"\[K\]"):
        test([[0.5, 0.1]], 0.1, **extra)
    for delta in (0.0, 1.0, np.nan):
        with pytest.raises(ValueError, match="delta"):
            test([0.5, 0.1], delta, **extra)


def test_bad_graphs_orders_and_starts_are_refused():
    with pytest.raises(ValueError, match="weights"):
        testing.graphical([0.1, 0.1], 0.1, weights=[0.7, 0.7], transitions=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="zero diagonal"):
        testing.graphical([0.1, 0.1], 0.1, weights=[0.5, 0.5], transitions=np.eye(2))
    with pytest.raises(ValueError, match=r"row 0 sums to 1\.5"):
        testing.graphical([0.1, 0.1], 0.1, weights=[1, 0], transitions=[[0, 1.5], [0, 0]])
    with pytest.raises(ValueError, match="order"):
        testing.split_fixed_sequence([0.1, 0.1], 0.1, order=[0, 0])
    with pytest.raises(ValueError, match="order"):
        testing.split_fixed_sequence([0.1, 0.1], 0.1, order=[2])
    for starts in ([], [-1], [2]):
        with pytest.raises(ValueError, match="starts"):
            testing.fixed_sequence([0.1, 0.1], 0.1, starts=starts)
    with pytest.raises(ValueError, match="one alpha per risk"):
        testing.pareto_order([np.zeros((3, 2))], [0.1, 0.2], [0.1, 0.2])
    with pytest.raises(ValueError, match="sparsities"):
        testing.pareto_order([np.zeros((3, 2))], [0.1], [0.1])
