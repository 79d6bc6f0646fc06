"""Calibration beyond one risk: looks, several risks, groups, selection, candidates, guarantees."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import confprune
from confprune import LookPlan, Loss, Risk
from confprune.risk.testing import graphical

GRID = [j / 20 for j in range(20)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


@pytest.fixture(scope="module")
def data(model):
    torch.manual_seed(1)
    x = torch.randn(900, 20)
    return x, model(x).argmax(1)


def calibrate(model, data, **settings):
    defaults = {"delta": 0.1, "sparsities": GRID, "progress": False}
    if "risks" not in settings:
        defaults |= {"loss": "disagreement", "alpha": 0.1}
    return confprune.calibrate(model, data, **(defaults | settings))


def losses_of(model, data, loss="disagreement", **settings):
    levels = confprune.prune_levels(model, GRID, **settings)
    return confprune.loss_matrix(model, data, levels, loss, progress=False).double().numpy()


class TestLooks:
    def test_they_are_the_default_and_save_evaluations(self, model, data):
        certificate = calibrate(model, data)
        assert certificate.looks.saved > 0.3
        assert certificate.looks.order == "permuted"
        assert certificate.looks.evaluations == sum(certificate.looks.seen)
        assert abs(certificate.sparsity - calibrate(model, data, looks=None).sparsity) <= 0.1

    def test_each_level_is_judged_on_the_first_examples_of_the_recorded_order(self, model, data):
        certificate = calibrate(model, data, seed=5)
        matrix = losses_of(model, data)
        order = torch.randperm(900, generator=torch.Generator().manual_seed(5)).numpy()
        seen = certificate.looks.seen
        means = [matrix[order[:n], j].mean() for j, n in enumerate(seen)]
        np.testing.assert_allclose(certificate.risks, means, atol=1e-6)

    def test_without_them_every_example_counts_at_every_level(self, model, data):
        certificate = calibrate(model, data, looks=None)
        assert certificate.looks is None
        np.testing.assert_allclose(certificate.risks, losses_of(model, data).mean(0), atol=1e-6)

    def test_batches_and_loaders_do_not_change_the_certificate(self, model, data):
        dataset = TensorDataset(*data)
        one = calibrate(model, data, batch_size=64)
        for other in (
            calibrate(model, data, batch_size=7),
            calibrate(model, dataset),
            calibrate(model, DataLoader(dataset, batch_size=33)),
            calibrate(model, DataLoader(dataset, batch_size=50, shuffle=True)),
        ):
            assert other == one

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"loss": "soft_disagreement", "alpha": 0.2},
            {"risks": [Risk("disagreement", 0.1), Risk("error", 0.3)]},
            {"groups": "targets", "alpha": 0.3, "loss": "disagreement"},
            {"accept": confprune.confident(0.5, of="pruned")},
            {"criterion": ["magnitude", "random"]},
        ],
        ids=lambda settings: next(iter(settings), "plain"),
    )
    def test_evaluating_ahead_of_them_changes_nothing(self, model, data, settings):
        ahead = calibrate(model, data, **settings)
        step_by_step = calibrate(model, data, activation_bytes=1, **settings)
        assert ahead.looks.seen == step_by_step.looks.seen
        assert ahead.rejected == step_by_step.rejected
        for values in ("risks", "pvalues", "bounds", "acceptance"):
            both = (getattr(certificate, values) for certificate in (ahead, step_by_step))
            found, expected = (np.array(value, dtype=np.float64) for value in both)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_small_networks_are_evaluated_ahead_of_them_but_not_far(self, model, data):
        sizes = []

        def noting_its_examples(outputs, reference):
            sizes.append(len(reference.outputs))
            return confprune.losses.disagreement(outputs, reference)

        loss = Loss("noting", noting_its_examples, binary=True, vmappable=True)
        certificate = calibrate(model, data, loss=loss)
        _, *chunks = sizes  # the first is the check before the work
        last = max(certificate.looks.seen)
        looks = [size for size in certificate.looks.sizes if size <= last]
        assert len(chunks) < len(looks) / 2
        assert last <= sum(chunks) <= 2 * last

    def test_a_plan_of_ones_own_is_followed(self, model, data):
        plan = LookPlan((300, 900), (0.05, 0.05), 0.1)
        certificate = calibrate(model, data, looks=plan)
        assert certificate.looks.sizes == (300, 900)
        assert set(certificate.looks.seen) <= {300, 900}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"looks": LookPlan((300, 800), (0.05, 0.05), 0.1)}, "last look is at 800 .* 900"),
            ({"looks": LookPlan((900,), (0.05,), 0.05)}, "looks were planned for delta=0.05"),
            ({"looks": "often"}, "looks must be"),
            ({"order": "sorted"}, "order 'sorted' is unknown"),
            ({"looks": LookPlan((900,), (0.1,), 0.1), "pvalue": "clt"}, "looks=None"),
        ],
    )
    def test_plans_that_do_not_fit_are_refused(self, model, data, settings, message):
        with pytest.raises(ValueError, match=message):
            calibrate(model, data, **settings)

    def test_spending_beyond_delta_is_refused(self):
        with pytest.raises(ValueError, match="more than delta"):
            LookPlan((100, 200), (0.1, 0.1), 0.1)


class TestStreams:
    def batches(self, data):
        return list(zip(data[0].split(100), data[1].split(100), strict=True))

    def test_a_stream_is_tested_once_on_all_its_examples(self, model, data):
        certificate = calibrate(model, iter(self.batches(data)))
        assert certificate.looks is None
        assert certificate.n == 900
        np.testing.assert_allclose(certificate.risks, losses_of(model, data).mean(0), atol=1e-6)

    def test_looking_early_at_a_stream_needs_consent(self, model, data):
        plan = LookPlan((300, 900), (0.05, 0.05), 0.1)
        with pytest.raises(ValueError, match="order='given'"):
            calibrate(model, self.batches(data), looks=plan)
        with pytest.warns(UserWarning, match="taken as given"):
            certificate = calibrate(model, self.batches(data), looks=plan, order="given")
        assert certificate.looks.order == "given"
        assert any("taken as given" in note for note in certificate.notes)

    def test_betting_on_a_stream_needs_consent(self, model, data):
        with pytest.raises(ValueError, match="order='given'"):
            calibrate(model, self.batches(data), pvalue="betting", looks=None)
        assert calibrate(model, self.batches(data), pvalue="betting", looks=None, order="given")

    def test_a_stream_that_ends_before_the_last_look_is_an_error(self, model, data):
        plan = LookPlan((300, 1000), (0.05, 0.05), 0.1)
        with pytest.raises(ValueError, match="ended after 900"):
            calibrate(model, iter(self.batches(data)), looks=plan, order="given")

    def test_iterable_datasets_are_streams(self, model, data):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(zip(*data, strict=True))

        assert calibrate(model, Stream()).n == 900


class TestSeveralRisks:
    def test_each_is_tested_and_the_largest_pvalue_decides(self, model, data):
        risks = [Risk("disagreement", 0.1), Risk("harm", 0.05)]
        certificate = calibrate(model, data, risks=risks, looks=None)
        assert [part.name for part in certificate.parts] == ["disagreement", "harm"]
        by_part = np.array([part.pvalues for part in certificate.parts])
        np.testing.assert_array_equal(certificate.pvalues, by_part.max(0))
        alone = [
            calibrate(model, data, loss=risk.loss, alpha=risk.alpha, looks=None) for risk in risks
        ]
        assert certificate.sparsity == min(one.sparsity for one in alone)

    def test_the_top_of_the_certificate_is_the_part_that_binds(self, model, data):
        risks = [Risk("disagreement", 0.3), Risk("soft_disagreement", 0.01)]
        certificate = calibrate(model, data, risks=risks)
        assert (certificate.loss, certificate.alpha) == ("soft_disagreement", 0.01)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss": None, "alpha": None}, "give loss= and alpha="),
            ({"loss": "harm", "risks": [Risk("harm", 0.1)]}, "beside loss="),
            ({"risks": []}, "risks is empty"),
            ({"risks": [Risk("harm", 0.1), Risk("harm", 0.2)]}, "'harm' twice"),
        ],
    )
    def test_contradictions_are_refused(self, model, data, settings, message):
        with pytest.raises(ValueError, match=message):
            calibrate(model, data, **settings)

    def test_risks_must_be_risks(self, model, data):
        with pytest.raises(TypeError, match="must hold Risk"):
            calibrate(model, data, risks=["harm"])


class TestGroups:
    def groups(self, batch):
        return (batch[0][:, 0] > 0.5).long()

    def test_no_group_may_exceed_alpha(self, model, data):
        certificate = calibrate(model, data, groups=self.groups, looks=None)
        matrix, member = losses_of(model, data), self.groups(data).numpy()
        assert [part.group for part in certificate.parts] == ["0", "1"]
        for group, part in enumerate(certificate.parts):
            own = matrix[member == group]
            assert set(part.counts) == {len(own)}
            np.testing.assert_allclose(part.risks, own.mean(0), atol=1e-6)
            alone = confprune.calibrate_losses(own, GRID, 0.1, 0.1)
            assert certificate.sparsity <= alone.sparsity

    def test_under_early_looks_each_group_is_counted_apart(self, model, data):
        certificate = calibrate(model, data, groups=self.groups)
        totals = np.sum([part.counts for part in certificate.parts], axis=0)
        np.testing.assert_array_equal(totals, certificate.looks.seen)

    def test_they_may_be_labels_or_a_key_of_the_batch(self, model, data):
        certificate = calibrate(model, data, groups="targets", alpha=0.3)
        assert [part.group for part in certificate.parts] == ["0", "1", "2", "3"]
        batch = {"x": data[0], "domain": self.groups(data)}
        keyed = calibrate(
            model, batch, groups="domain", forward=lambda model, batch: model(batch["x"])
        )
        assert [part.group for part in keyed.parts] == ["0", "1"]

    def test_a_group_that_is_too_small_is_named_with_what_it_needs(self, model, data):
        few = torch.zeros(900, dtype=torch.long)
        few[:5] = 7
        with pytest.raises(ValueError, match=r"5 examples of group '7' .* at least 22 are needed"):
            calibrate(model, {"x": data[0], "g": few}, groups="g", forward=lambda m, b: m(b["x"]))

    def test_in_a_stream_they_are_found_on_the_way(self, model, data):
        stream = iter([(data[0][:450], data[1][:450]), (data[0][450:], data[1][450:])])
        certificate = calibrate(model, stream, groups=self.groups)
        whole = calibrate(model, data, groups=self.groups, looks=None)
        assert certificate.parts == whole.parts

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ("site", "groups='site' names a key"),
            (lambda batch: [1, 2], "one group per example"),
            (lambda batch: batch[0], r"one group per example, \[\d+\], got \[\d+, \d+\]"),
            (lambda batch: None, "groups returned None"),
        ],
    )
    def test_groups_that_cannot_be_read_are_refused(self, model, data, groups, message):
        with pytest.raises(ValueError, match=message):
            calibrate(model, data, groups=groups)


class TestSelection:
    def test_only_accepted_predictions_count(self, model, data):
        accept = confprune.confident(0.32)
        certificate = calibrate(model, data, accept=accept, looks=None)
        kept = (model(data[0]).softmax(1).amax(1) >= 0.32).numpy()
        assert 0.1 < kept.mean() < 0.95
        np.testing.assert_allclose(certificate.acceptance, kept.mean(), atol=1e-6)
        np.testing.assert_allclose(
            certificate.risks, losses_of(model, data)[kept].mean(0), atol=1e-6
        )

    def test_the_pruned_network_may_decide_for_itself(self, model, data):
        certificate = calibrate(model, data, accept=confprune.confident(0.3, of="pruned"))
        assert len(set(certificate.acceptance)) > 1
        levels = confprune.prune_levels(model, GRID)
        j = certificate.level
        order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
        x = data[0][order[: certificate.looks.seen[j]]]
        rate = (levels.prune(model, j)(x).softmax(1).amax(1) >= 0.3).float().mean()
        assert certificate.acceptance[j] == pytest.approx(float(rate), abs=0.01)

    def test_any_callable_may_accept(self, model, data):
        def large_margin(outputs, reference):
            top = reference.outputs.topk(2).values
            return top[:, 0] - top[:, 1] > 0.2

        certificate = calibrate(model, data, accept=large_margin)
        assert certificate.accept == "large_margin"

    def test_where_nothing_is_accepted_nothing_is_certified(self, model, data):
        certificate = calibrate(
            model, data, accept=lambda outputs, reference: outputs[:, 0] > 1e9, looks=None
        )
        assert not certificate.certified
        assert certificate.acceptance == (0.0,) * len(GRID)

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            (lambda y, r: y, r"accept returned shape \[4, \d+\] for 4 examples; it must return"),
            (lambda y, r: None, "accept returned a NoneType for 4 examples"),
            (lambda y, r: (y[:, 0] > 0).numpy(), "accept returned a ndarray for 4 examples"),
            (lambda y, r: y[:, 0] * 0 + 0.25, "accept returned 0.25 .* with a threshold"),
            (lambda y, r: y[:, 0] * torch.nan, "accept returned nan for 4 examples"),
        ],
    )
    def test_rules_that_say_neither_yes_nor_no_are_refused(self, model, data, rule, message):
        with pytest.raises(ValueError, match=message):
            calibrate(model, data, accept=rule)

    def test_wrong_rules_are_refused(self, model, data):
        with pytest.raises(TypeError, match="confident"):
            calibrate(model, data, accept=0.9)
        with pytest.raises(ValueError, match="'full' or 'pruned'"):
            confprune.confident(0.9, of="both")

    @pytest.mark.parametrize("value", [0.25, torch.nan])
    def test_a_measure_in_place_of_a_rule_gives_0_or_1(self, model, data, value):
        measure = Loss("half-hearted", lambda y, r: y[:, 0] * 0 + value, binary=True)
        with pytest.raises(ValueError, match=f"accept 'half-hearted' is {value} for example"):
            calibrate(model, data, accept=measure)


class TestCandidates:
    def test_the_best_of_several_scopes_is_certified_on_data_the_order_never_saw(self, model, data):
        certificate = calibrate(model, data, scope=["global", "layer"])
        assert certificate.procedure == "split_fixed_sequence"
        assert certificate.n == 900 - 180
        assert certificate.pruning.scope in ("global", "layer")
        assert any("180 other examples" in note for note in certificate.notes)
        assert certificate.certified
        certificate.verify(model, data, progress=False)

    def test_bonferroni_tests_all_candidates_without_an_order(self, model, data):
        certificate = calibrate(model, data, scope=["global", "layer"], procedure="bonferroni")
        assert (certificate.procedure, certificate.n) == ("bonferroni", 900)

    def test_streams_cannot_be_split(self, model, data):
        with pytest.raises(ValueError, match=r"random order|map-style"):
            calibrate(model, [data], scope=["global", "layer"])

    def test_a_procedure_may_be_a_callable(self, model, data):
        K = len(GRID)
        chain = functools.partial(
            graphical,
            weights=np.eye(K)[0],
            transitions=np.eye(K, k=1),
        )
        by_graph = calibrate(model, data, procedure=chain, looks=None)
        by_chain = calibrate(model, data, looks=None)
        assert by_graph.procedure == "graphical(weights=..., transitions=...)"
        four = functools.partial(graphical, weights=np.eye(4)[0], transitions=np.eye(4, k=1))
        by_pattern = calibrate(model, data, procedure=four, pattern="N:4", sparsities=GRID)
        assert len(by_pattern.sparsities) == 4  # 0 to 3 of each 4
        assert by_graph.rejected == by_chain.rejected


class TestGuarantees:
    def test_monotone_bounds_hold_for_the_largest_loss_so_far(self, model, data):
        certificate = calibrate(model, data, guarantee="monotone")
        worst = np.maximum.accumulate(losses_of(model, data), axis=1)
        assert certificate.guarantee == "monotone"
        np.testing.assert_allclose(certificate.risks, worst.mean(0), atol=1e-6)
        assert certificate.bound <= 0.1

    def test_expectation_needs_no_delta(self, model, data):
        certificate = calibrate(model, data, guarantee="expectation", delta=None)
        worst = np.maximum.accumulate(losses_of(model, data), axis=1).sum(0)
        assert certificate.level == np.flatnonzero((worst + 1) / 901 <= 0.1)[-1]
        assert certificate.delta is None

    @pytest.mark.parametrize(
        "settings",
        [
            {"groups": "targets"},
            {"accept": confprune.confident(0.5)},
            {"scope": ["global", "layer"]},
            {"risks": [Risk("harm", 0.1), Risk("error", 0.1)]},
            {"looks": LookPlan((900,), (0.1,), 0.1)},
        ],
    )
    def test_they_are_for_one_risk_on_all_examples(self, model, data, settings):
        with pytest.raises(ValueError, match="guarantee='monotone' is for one risk"):
            calibrate(model, data, guarantee="monotone", **settings)

    def test_unknown_ones_and_missing_delta_are_refused(self, model, data):
        with pytest.raises(ValueError, match="guarantee 'sure' is unknown"):
            calibrate(model, data, guarantee="sure")
        with pytest.raises(ValueError, match="give delta="):
            calibrate(model, data, delta=None)


def test_no_certified_level_exceeds_alpha_more_often_than_delta(one_thread):
    """300 calibrations with early looks of a network whose risks are known exactly."""
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.4, 0.2], [-1.0, -0.4, -0.2]])
    # Pruned of its smaller weights the network errs where these alone decide the sign.
    rate, violations = 0.06, 0
    alpha, delta = 0.06, 0.2
    generator = torch.Generator().manual_seed(0)
    for seed in range(300):
        deciding = torch.rand(200, generator=generator) < rate
        x = torch.stack([torch.where(deciding, 0.1, 1.0), -torch.ones(200), torch.zeros(200)], 1)
        certificate = confprune.calibrate(
            model,
            x,
            loss="disagreement",
            alpha=alpha,
            delta=delta,
            sparsities=[0.0, 0.67],
            seed=seed,
            progress=False,
        )
        violations += certificate.sparsity > 0
    assert violations <= 300 * delta + 3 * np.sqrt(300 * delta * (1 - delta))
    assert violations > 0
