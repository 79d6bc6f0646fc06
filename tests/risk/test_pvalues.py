"""p-values: their values, and their validity."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from risk import reference
from scipy import stats

from confprune.risk import pvalues
from confprune.risk.binomial_tail import binomial_tail

SUM_BASED = ["hoeffding", "bentkus", "hoeffding_bentkus", "binomial", "convex"]
ALPHAS = [1e-6, 1e-3, 0.05, 0.5, 0.9, 1 - 1e-6]


def from_sums(name, sums, n, alpha):
    return getattr(pvalues, f"{name}_from_sums")(np.asarray(sums, dtype=float), n, alpha)


def sums_down_to(n: int, alpha: float, fractional: bool) -> list[float]:
    """Sums whose p-values run from about 1 to 1e-300."""
    targets = np.array([-690.0, -200.0, -40.0, -2.0])
    grid = np.unique(
        np.concatenate([np.arange(min(n, 60) + 1), n * alpha * np.linspace(0, 1, 999)])
    )
    grid = grid[grid <= n * alpha] if n * alpha >= 1 else grid[:1]
    with np.errstate(divide="ignore"):
        logs = np.log(from_sums("hoeffding", grid, n, alpha))
    picked = np.floor(grid[np.minimum(np.searchsorted(logs, targets), len(grid) - 1)])
    if fractional:
        picked = np.minimum(picked + 0.3, n)
    return sorted(set(picked.tolist()))


@pytest.mark.parametrize("n", [1, 10, 100, 5000, 10**5, 10**7])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_sum_based_pvalues_are_accurate_to_1e_10_down_to_1e_300(n, alpha):
    references = {
        "hoeffding": reference.hoeffding,
        "bentkus": reference.bentkus,
        "binomial": lambda s, n, alpha: reference.binomial_cdf(int(s), n, alpha),
    }
    for name, exact in references.items():
        for total in sums_down_to(n, alpha, fractional=name != "binomial"):
            expected = exact(total, n, alpha)
            if expected < mpmath.mpf(10) ** -300:
                continue
            value = float(from_sums(name, [total], n, alpha)[0])
            assert abs(mpmath.mpf(value) - expected) <= expected * mpmath.mpf(10) ** -10


@pytest.mark.parametrize("n", [1, 2, 10, 40])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_convex_is_the_minimum_over_all_hinges(n, alpha):
    totals = np.unique(np.concatenate([np.arange(n + 1), np.linspace(0, n, 7), [n * alpha * 0.99]]))
    expected = [float(reference.convex(total, n, alpha)) for total in totals]
    np.testing.assert_allclose(from_sums("convex", totals, n, alpha), expected, rtol=1e-10)


@pytest.mark.parametrize(("n", "alpha"), [(5000, 0.05), (10**5, 1e-3), (10**7, 0.05)])
def test_convex_is_accurate_far_in_the_tail_of_large_samples(n, alpha):
    for total in sums_down_to(n, alpha, fractional=True):
        value = float(from_sums("convex", [total], n, alpha)[0])
        if not 1e-300 < value < 1.0:
            continue
        # The best a lies where the tangents cross; scan its neighbourhood at high precision.
        table = binomial_tail(n, alpha)
        centre = table.start + 1 + int(np.searchsorted(table.tangents[1:], total))
        bounds = [
            reference.hinge(a, n, alpha) / (a - mpmath.mpf(total))
            for a in range(max(int(total) + 1, centre - 2), centre + 3)
        ]
        expected = min(bounds)
        assert abs(mpmath.mpf(value) - expected) <= expected * mpmath.mpf(10) ** -10
        assert expected not in (bounds[0], bounds[-1]) or centre - 2 <= int(total)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 40, 10**5])
def test_a_table_says_the_same_of_one_count_as_of_many(n, alpha):
    table = binomial_tail(n, alpha)
    counts = np.arange(max(table.start - 2, -1), table.stop + 3)
    assert [table.up_to(count) for count in counts] == table.below(counts).tolist()


def test_closed_forms_at_zero_loss():
    for n, alpha in [(45, 0.05), (1000, 0.01), (3, 0.5)]:
        for name in ("hoeffding", "binomial", "convex"):
            np.testing.assert_allclose(from_sums(name, [0.0], n, alpha), (1 - alpha) ** n)
        np.testing.assert_allclose(
            from_sums("bentkus", [0.0], n, alpha), min(1, np.e * (1 - alpha) ** n)
        )


def test_binomial_and_bentkus_agree_with_scipy():
    totals = np.arange(0, 80)
    cdf = stats.binom.cdf(totals, 1000, 0.05)
    np.testing.assert_allclose(from_sums("binomial", totals, 1000, 0.05), cdf, rtol=1e-11)
    np.testing.assert_allclose(
        from_sums("bentkus", totals + 0.5, 1000, 0.05),
        np.minimum(1, np.e * stats.binom.cdf(totals + 1, 1000, 0.05)),
        rtol=1e-11,
    )


@given(
    n=st.integers(1, 3000),
    alpha=st.floats(1e-4, 1 - 1e-4),
    share=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_convex_is_never_worse_than_hoeffding_or_bentkus(n, alpha, share):
    total = [share * n]
    best = from_sums("convex", total, n, alpha)[0]
    older = from_sums("hoeffding_bentkus", total, n, alpha)[0]
    assert best <= older * (1 + 1e-10) + 1e-300
    if float(total[0]).is_integer():
        assert from_sums("binomial", total, n, alpha)[0] <= best * (1 + 1e-10)


@given(n=st.integers(1, 500), alpha=st.floats(1e-3, 1 - 1e-3), name=st.sampled_from(SUM_BASED))
@settings(max_examples=100, deadline=None)
def test_pvalues_rise_with_the_sum_and_fall_with_alpha(n, alpha, name):
    totals = np.arange(n + 1) if name == "binomial" else np.linspace(0, n, 60)
    values = from_sums(name, totals, n, alpha)
    assert np.all(np.diff(values) >= -1e-12 * values[1:])
    assert values[-1] == 1.0
    assert np.all(from_sums(name, totals, n, alpha / 2) >= values * (1 - 1e-12))


def test_a_rounding_error_above_an_integer_does_not_reach_the_next_one():
    exact = from_sums("bentkus", [3.0], 100, 0.1)
    np.testing.assert_allclose(from_sums("bentkus", [3.0000000000000004], 100, 0.1), exact)
    # A tenth thirty times is a little more than 3, and the p-value a little more than at 3.
    tenths = np.zeros((100, 1))
    tenths[:30] = 0.1
    assert exact[0] <= pvalues.bentkus(tenths, 0.1)[0] <= exact[0] * (1 + 1e-12)
    assert from_sums("bentkus", [3.001], 100, 0.1) == from_sums("bentkus", [4.0], 100, 0.1)


def test_float32_losses_are_summed_in_float64():
    losses = np.full((200_000, 2), 0.1, dtype=np.float32)
    losses[::3] = 0.0
    expected = from_sums("convex", losses.astype(np.float64).sum(axis=0), len(losses), 0.068)
    np.testing.assert_allclose(pvalues.convex(losses, 0.068), expected, rtol=1e-9)


@pytest.mark.parametrize("name", SUM_BASED)
def test_losses_and_sums_give_the_same_and_n_may_differ_by_level(name):
    rng = np.random.default_rng(0)
    losses = (rng.random((300, 5)) < 0.05).astype(np.float32)
    whole = getattr(pvalues, name)(losses, 0.1)
    np.testing.assert_array_equal(whole, from_sums(name, losses.sum(axis=0), 300, 0.1))
    counts = np.array([300, 200, 0, 200, 7])
    totals = np.array([losses[:c, j].sum() for j, c in enumerate(counts)])
    by_level = from_sums(name, totals, counts, 0.1)
    assert by_level[2] == 1.0
    for j, count in enumerate(counts):
        assert by_level[j] == from_sums(name, totals[j : j + 1], count, 0.1)[0]


def test_betting_matches_the_step_by_step_process():
    rng = np.random.default_rng(1)
    losses = np.stack([rng.beta(0.2, 4, 500), rng.random(500) < 0.04, np.zeros(500)], axis=1)
    expected = [reference.betting(column, 0.05) for column in losses.T]
    np.testing.assert_allclose(pvalues.betting(losses, 0.05), expected, rtol=1e-9)


def test_betting_in_parts_and_with_examples_that_do_not_count():
    rng = np.random.default_rng(2)
    losses = rng.beta(0.3, 6, (6000, 4))
    counted = rng.random((6000, 4)) < [0.2, 0.7, 0.0, 1.0]
    process = pvalues.BettingProcess(0.06, levels=4, n=6000)
    for part in np.array_split(np.arange(6000), [10, 17, 5000]):
        process.update(losses[part], levels=[0, 1, 2, 3], counted=counted[part])
    for j in range(4):
        expected = reference.betting(losses[:, j], 0.06, counted[:, j])
        np.testing.assert_allclose(process.pvalues()[j], expected, rtol=1e-9)
    np.testing.assert_array_equal(process.count, counted.sum(axis=0))


def test_betting_falls_with_alpha():
    losses = np.random.default_rng(3).beta(0.3, 6, (400, 4))
    values = [pvalues.betting(losses, alpha) for alpha in np.linspace(0.01, 0.99, 40)]
    assert np.all(np.diff(values, axis=0) <= 1e-12)


def test_betting_beats_the_sums_where_the_variance_is_small():
    losses = np.random.default_rng(4).uniform(0, 0.1, (2000, 1))
    assert pvalues.betting(losses, 0.055)[0] < 1e-3 < 0.1 < pvalues.convex(losses, 0.055)[0]


def test_clt_agrees_with_the_formula_and_stays_cautious_without_spread():
    losses = np.random.default_rng(5).random((50, 3)).astype(np.float32)
    losses[:, 1], losses[:, 2] = 0.0, 0.3
    values = pvalues.clt(losses, 0.5)
    column = losses[:, 0].astype(np.float64)
    score = np.sqrt(50) * (column.mean() - 0.5) / column.std(ddof=1)
    np.testing.assert_allclose(values[0], stats.norm.cdf(score), rtol=1e-10)
    np.testing.assert_allclose(values[1:], pvalues.hoeffding(losses[:, 1:], 0.5))


LAWS = {
    "zero or one": lambda rng, shape, mean: (rng.random(shape) < mean).astype(np.float64),
    "beta": lambda rng, shape, mean: rng.beta(2 * mean, 2 * (1 - mean), shape),
    "narrow beta": lambda rng, shape, mean: rng.beta(60 * mean, 60 * (1 - mean), shape),
    "two points": lambda rng, shape, mean: np.where(rng.random(shape) < 0.9, mean / 2, 5.5 * mean),
    "constant": lambda rng, shape, mean: np.full(shape, mean),
}


@pytest.mark.parametrize(
    ("law", "name"),
    [
        (law, name)
        for law in LAWS
        for name, kind in pvalues.PVALUES.items()
        if not kind.asymptotic and (law == "zero or one" or not kind.binary_only)
    ],
)
@pytest.mark.parametrize(("n", "alpha"), [(60, 0.1), (300, 0.15)])
def test_pvalues_are_super_uniform_at_the_boundary_and_beyond(law, name, n, alpha):
    draws = 4000
    rng = np.random.default_rng(6)
    for mean in (alpha, 1.1 * alpha):
        losses = LAWS[law](rng, (n, draws), mean)
        values = getattr(pvalues, name)(losses, alpha)
        for level in (0.01, 0.05, 0.1, 0.3):
            allowed = stats.binom.ppf(1 - 1e-5, draws, level)
            assert np.count_nonzero(values <= level) <= allowed


def test_every_pvalue_declares_its_properties():
    kinds = pvalues.PVALUES
    assert {name for name, kind in kinds.items() if kind.from_sums} == set(SUM_BASED)
    assert [name for name, kind in kinds.items() if kind.binary_only] == ["binomial"]
    assert [name for name, kind in kinds.items() if kind.anytime] == ["betting"]
    assert [name for name, kind in kinds.items() if kind.asymptotic] == ["clt"]
    losses = np.zeros((50, 2))
    for name, kind in kinds.items():
        assert kind.name == name
        assert kind.from_losses(losses, 0.1).shape == (2,)


def test_auto_is_binomial_for_zero_one_losses_and_convex_otherwise():
    assert pvalues.resolve_pvalue("auto", losses_are_binary=True).name == "binomial"
    assert pvalues.resolve_pvalue("auto", losses_are_binary=False).name == "convex"
    with pytest.raises(ValueError, match=r"'student'.*hoeffding_bentkus"):
        pvalues.resolve_pvalue("student", losses_are_binary=True)
    with pytest.raises(ValueError, match=r"binomial.*convex"):
        pvalues.resolve_pvalue("binomial", losses_are_binary=False)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([[0.1, np.nan]], "nan for example 0 at level 1"),
        ([[0.0], [1.5]], "1.5 for example 1 at level 0"),
        ([[-0.1]], "rescale"),
        ([0.1, 0.2], r"\[n, K\]"),
        (np.zeros((0, 3)), "empty"),
    ],
)
@pytest.mark.parametrize("name", list(pvalues.PVALUES))
def test_bad_losses_are_refused_with_the_place(name, losses, message):
    with pytest.raises(ValueError, match=message):
        getattr(pvalues, name)(losses, 0.1)


def test_a_bad_value_deep_in_the_matrix_is_found():
    losses = np.zeros((10_000, 3), dtype=np.float32)
    losses[9_123, 2] = np.inf
    with pytest.raises(ValueError, match="inf for example 9123 at level 2"):
        pvalues.convex(losses, 0.1)


def test_other_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="dtype"):
        pvalues.convex(np.array([["a"]]), 0.1)
    with pytest.raises(ValueError, match=r"binomial.*'convex'"):
        pvalues.binomial([[0.5]], 0.1)
    with pytest.raises(ValueError, match=r"sum 2\.5"):
        pvalues.binomial_from_sums([2.5], 10, 0.1)
    for alpha in (0.0, 1.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="alpha"):
            pvalues.hoeffding([[0.0]], alpha)
    with pytest.raises(ValueError, match="sums"):
        pvalues.convex_from_sums([11.0], 10, 0.1)
    with pytest.raises(ValueError, match="n must be"):
        pvalues.convex_from_sums([1.0], -3, 0.1)


def test_integer_and_boolean_losses_are_accepted():
    losses = np.random.default_rng(7).random((100, 2)) < 0.05
    np.testing.assert_array_equal(
        pvalues.binomial(losses, 0.1), pvalues.binomial(losses.astype(np.int32), 0.1)
    )
