"""Verification: the plain pruned network has the stated risks on the examples tested, or fails."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from certificates import certify, controlled, of_parts, part, pruning_of, small_network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import confprune
from confprune import Risk, VerificationError
from confprune.certificate import Certificate
from confprune.certificate.verification import plain_risk
from confprune.risk.testing import fixed_sequence, split_fixed_sequence

ALPHA, DELTA = 0.2, 0.1
AT_TWO_STARTS = functools.partial(fixed_sequence, starts=[0, 3])
IN_OTHER_ORDER = functools.partial(split_fixed_sequence, order=[0, 2, 1, *range(3, 20)])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_network()


@pytest.fixture(scope="module")
def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(600, 6, generator=generator)
    return inputs, torch.randint(3, (600,), generator=generator)


def calibrate(model, data, **settings) -> Certificate:
    given = {"loss": "disagreement", "alpha": ALPHA} if "risks" not in settings else {}
    grid = [j / 20 for j in range(20)]
    settings = {**given, "delta": DELTA, "sparsities": grid, "progress": False, **settings}
    return confprune.calibrate(model, data, **settings)


def verify(certificate, model, data, **settings) -> float:
    return certificate.verify(model, data, progress=False, **settings)


def sure(outputs, reference):
    """Accepts where the pruned network is clear."""
    return outputs.softmax(-1).amax(-1) > 0.4


def parity(batch):
    return ["odd" if label % 2 else "even" for label in batch[1].tolist()]


def gap(outputs, reference):
    """A loss of one's own: what the largest class lost in probability, halved."""
    return (outputs.softmax(-1) - reference.outputs.softmax(-1)).abs().amax(-1) / 2


@pytest.mark.parametrize("looks", ["auto", None])
@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, ()),
        ({"loss": gap, "alpha": 0.1}, ("loss",)),
        ({"risks": [Risk("disagreement", 0.3), Risk("error", 0.9), Risk(gap, 0.2)]}, ("loss",)),
        ({"groups": "targets"}, ("groups",)),
        ({"groups": parity, "risks": [Risk("disagreement", 0.3), Risk("error", 0.9)]}, ("groups",)),
        ({"accept": sure}, ("accept",)),
        ({"accept": confprune.confident(0.4, of="full"), "groups": parity}, ("accept", "groups")),
        ({"scope": ["global", "layer"]}, ()),
        ({"procedure": AT_TWO_STARTS, "pvalue": "hoeffding"}, ()),
        ({"procedure": IN_OTHER_ORDER}, ()),
        ({"guarantee": "expectation"}, ()),
        ({"guarantee": "monotone"}, ()),
    ],
)
def test_what_calibrate_certifies_verifies_to_the_last_example(
    model, examples, settings, needed, looks
):
    certificate = calibrate(model, examples, looks=looks, **settings)
    assert certificate.certified
    again = {"loss": gap, "groups": None, "accept": None, **settings}
    risk = verify(certificate, model, examples, **{name: again[name] for name in needed})
    assert risk == pytest.approx(certificate.risk, abs=1e-6)


def test_after_early_looks_only_the_examples_that_were_tested_count(model, examples):
    certificate = calibrate(model, examples)
    seen = certificate.looks.seen[certificate.level]
    order = torch.randperm(600, generator=torch.Generator().manual_seed(certificate.seed))
    assert seen < 600
    # Spoilt labels change nothing, but spoilt inputs do: first where the level was not tested.
    inputs, labels = examples
    elsewhere, here = inputs.clone(), inputs.clone()
    elsewhere[order[seen:]] = -3 * elsewhere[order[seen:]].flip(-1)
    here[order[:seen]] = -3 * here[order[:seen]].flip(-1)
    sparse = certificate.prune(model)
    risk_of_all, _ = plain_risk(model, sparse, elsewhere, "disagreement", progress=False)
    assert abs(risk_of_all - certificate.risk) > 0.02
    assert verify(certificate, model, (elsewhere, labels)) == pytest.approx(certificate.risk)
    with pytest.raises(VerificationError, match="states a risk of"):
        verify(certificate, model, (here, labels))


@pytest.mark.parametrize("looks", ["auto", None])
def test_examples_that_ordered_the_candidates_are_left_out(model, examples, looks):
    certificate = calibrate(model, examples, scope=["global", "layer"], looks=looks)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(certificate.seed))
    spoilt = examples[0].clone()
    spoilt[order[:120]] = torch.nan
    assert certificate.n == 480
    assert verify(certificate, model, spoilt) == pytest.approx(certificate.risk)
    with pytest.raises(VerificationError, match="rests on 480 examples, the data has 440"):
        verify(certificate, model, spoilt[:550])


def test_examples_in_the_order_given_are_taken_in_it(model, examples):
    batches = list(examples[0].split(70))
    plan = confprune.LookPlan((150, 300, 600), (0.03, 0.03, 0.04), DELTA)
    with pytest.warns(UserWarning, match="taken as given"):
        certificate = calibrate(model, batches, looks=plan, order="given", sparsities=[0.0])
    seen = certificate.looks.seen[certificate.level]
    assert (seen, certificate.looks.order) == (150, "given")
    for data in (batches, iter(batches), examples[0]):
        assert verify(certificate, model, data) == pytest.approx(certificate.risk)
    # A loader that shuffles is not asked for its own order.
    shuffling = DataLoader(TensorDataset(*examples), batch_size=64, shuffle=True)
    assert verify(certificate, model, shuffling) == pytest.approx(certificate.risk)
    with pytest.raises(VerificationError, match="tested on 150 examples, the data has 70"):
        verify(certificate, model, iter(batches[:1]))
    with pytest.raises(VerificationError, match="rests on 600 examples, the data has 70"):
        verify(certificate, model, batches[:1])


def test_a_loader_is_read_in_the_order_of_the_test(model, examples):
    loader = DataLoader(TensorDataset(*examples), batch_size=64, shuffle=True, drop_last=True)
    certificate = calibrate(model, loader)
    assert verify(certificate, model, loader) == pytest.approx(certificate.risk)


def test_data_that_cannot_be_permuted_cannot_give_a_random_part(model, examples):
    certificate = calibrate(model, examples)
    with pytest.raises(ValueError, match=r"random part .* map-style Dataset or the tensors"):
        verify(certificate, model, [examples[0]])
    # Without early looks every example counts, in any order.
    whole = calibrate(model, examples, looks=None)
    assert verify(whole, model, iter([examples[0]])) == pytest.approx(whole.risk)
    with pytest.raises(VerificationError, match="rests on 600 examples, the data has 500"):
        verify(whole, model, iter([examples[0][:500]]))


# By hand: what does not agree is named.


def stated(model, examples, **fields) -> Certificate:
    """A certificate of all examples at 50 % sparsity, with the true risk."""
    pruned = confprune.prune_levels(model, [0.5]).prune(model, 0)
    risk, n = plain_risk(model, pruned, examples, "disagreement", progress=False)
    pruning = pruning_of(model)
    return certify([risk * n], n, sparsities=[0.5], alpha=0.5, pruning=pruning, seed=0, **fields)


def test_the_loss_matrix_and_the_plain_network_agree(model, examples):
    levels = confprune.prune_levels(model, [0.5])
    losses = confprune.loss_matrix(model, examples, levels, "disagreement", progress=False)
    assert stated(model, examples).risk == pytest.approx(float(losses.mean()))


@pytest.mark.parametrize("change", [0.02, -0.02])
def test_a_risk_that_does_not_reproduce_fails_verification(model, examples, change):
    certificate = stated(model, examples)
    risk = certificate.risk
    other = dataclasses.replace(certificate, risks=(risk + change,))
    message = rf"states a risk of {risk + change:.6g} at 0.5 sparsity, the pruned .* has {risk:.6g}"
    with pytest.raises(VerificationError, match=message):
        verify(other, model, examples)


@pytest.mark.parametrize("looks", ["auto", None])
def test_an_edited_alpha_fails_verification(model, examples, looks):
    certificate = calibrate(model, examples, looks=looks)
    strict = dataclasses.replace(certificate, alpha=certificate.risk)
    with pytest.raises(VerificationError, match=r"does not show one of at most .* was changed"):
        verify(strict, model, examples)


def test_an_edited_delta_fails_verification(model, examples):
    certificate = calibrate(model, examples, looks=None)
    surer = dataclasses.replace(certificate, delta=certificate.pvalues[certificate.level] / 2)
    with pytest.raises(VerificationError, match=r"does not show one of at most 0.2 with delta"):
        verify(surer, model, examples)


def test_what_one_of_several_risks_promises_may_not_be_edited(model, examples):
    risks = [Risk("disagreement", ALPHA), Risk("harm", ALPHA)]
    certificate = calibrate(model, examples, risks=risks, looks=None)
    alpha = max(part.risks[certificate.level] for part in certificate.parts)
    strict = tuple(dataclasses.replace(part, alpha=alpha) for part in certificate.parts)
    with pytest.raises(VerificationError, match=r"does not show one of at most"):
        verify(dataclasses.replace(certificate, parts=strict, alpha=alpha), model, examples)


def test_near_ties_that_fall_the_other_way_pass_verification(model, examples):
    certificate = stated(model, examples)
    near = dataclasses.replace(certificate, risks=(certificate.risk + 2 / 600,))
    assert verify(near, model, examples) == pytest.approx(certificate.risk)
    half = small_network().bfloat16()
    inputs = examples[0].bfloat16()
    certificate = stated(half, inputs)
    further = dataclasses.replace(certificate, risks=(certificate.risk + 0.012,))
    assert verify(further, half, inputs) == pytest.approx(certificate.risk)


def test_a_network_that_computes_nothing_fails_verification(model, examples):
    spoilt = examples[0].clone()
    spoilt[5] = torch.nan
    with pytest.raises(VerificationError, match="has nan on this data"):
        verify(stated(model, examples), model, spoilt)


def test_other_data_fails_verification(model, examples):
    with pytest.raises(VerificationError, match="rests on 600 examples, the data has 599"):
        verify(stated(model, examples), model, examples[0][:599])


def test_verifying_takes_the_losses_that_were_calibrated(model, examples):
    certificate = stated(model, examples)
    with pytest.raises(ValueError, match="about the loss 'disagreement', not 'harm'"):
        verify(certificate, model, examples, loss="harm")
    own = dataclasses.replace(certificate, loss="gap")
    with pytest.raises(ValueError, match="'gap' is not built in: pass it as loss="):
        verify(own, model, examples)
    several = of_parts(
        part([0], 600, loss="gap"), part([0], 600, loss="error"), pruning=pruning_of(model), n=600
    )
    with pytest.raises(ValueError, match="about the loss 'gap', 'error', not 'harm'"):
        verify(several, model, examples, loss=[gap, "harm"])


def test_the_part_that_does_not_reproduce_is_named(model, examples):
    certificate = calibrate(model, examples, groups=parity, looks=None)
    odd = next(one for one in certificate.parts if one.group == "odd")
    at = certificate.level
    counts = tuple(count - (j == at) for j, count in enumerate(odd.counts))
    risks = tuple(risk / 2 if j == at else risk for j, risk in enumerate(odd.risks))
    for change, message in (
        ({"counts": counts}, f"counts {odd.counts[at] - 1} examples of disagreement, group odd, "),
        ({"risks": risks}, "states a risk of disagreement, group odd of "),
    ):
        spoilt = dataclasses.replace(odd, **change)
        parts = [spoilt if one is odd else one for one in certificate.parts]
        same = {name: getattr(spoilt, name) for name in ("risks", "bounds")}
        other = dataclasses.replace(certificate, parts=parts, **same)
        with pytest.raises(VerificationError, match=message):
            verify(other, model, examples, groups=parity)


def test_groups_and_the_acceptance_rule_must_be_given_again(model, examples):
    grouped = calibrate(model, examples, groups="targets")
    with pytest.raises(ValueError, match="by group: pass groups= as given to calibrate"):
        verify(grouped, model, examples)
    selective = calibrate(model, examples, accept=sure)
    with pytest.raises(ValueError, match=r"accepted predictions \(sure\): pass accept="):
        verify(selective, model, examples)
    with pytest.raises(ValueError, match="about 'sure', not 'gap'"):
        verify(selective, model, examples, accept=gap)
    with pytest.raises(ValueError, match="about all predictions, not 'sure'"):
        verify(calibrate(model, examples), model, examples, accept=sure)


def test_an_acceptance_rate_that_does_not_reproduce_fails_verification(model, examples):
    certificate = calibrate(model, examples, accept=sure, looks=None)
    rates = tuple(rate * 0.9 for rate in certificate.acceptance)
    other = dataclasses.replace(certificate, acceptance=rates)
    with pytest.raises(VerificationError, match=r"counts \d+ examples, the data has \d+ of them"):
        verify(other, model, examples, accept=sure)


def test_accepting_nothing_has_no_risk_to_agree(model, examples):
    def never(outputs, reference):
        return torch.zeros(len(outputs), dtype=torch.bool)

    certificate = stated(model, examples, accept="never", acceptance=[0.0])
    with pytest.raises(VerificationError, match="has nan on this data"):
        verify(certificate, model, examples, accept=never)


@pytest.mark.parametrize("guarantee", ["expectation", "monotone"])
def test_a_monotonised_risk_is_verified_over_all_denser_levels(model, examples, guarantee):
    levels = confprune.prune_levels(model, [j / 10 for j in range(1, 8)])
    losses = confprune.loss_matrix(model, examples, levels, "disagreement", progress=False).numpy()
    monotone = np.maximum.accumulate(losses, axis=1).sum(0)
    assert monotone[-1] > losses[:, -1].sum() + 6
    certificate = controlled(monotone, guarantee, n=600, alpha=0.9, pruning=pruning_of(model))
    certificate = dataclasses.replace(certificate, sparsities=levels.sparsities)
    assert certificate.level == 6
    assert verify(certificate, model, examples) == pytest.approx(monotone[-1] / 600)
    plain = dataclasses.replace(certificate, risks=losses.mean(0))
    with pytest.raises(VerificationError, match="states a risk"):
        verify(plain, model, examples)
    with pytest.raises(ValueError, match="give data that can be read again"):
        verify(certificate, model, iter([examples[0]]))


def test_the_network_is_left_as_it_was(model, examples):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    verify(stated(model, examples), model, examples)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_forward_and_batch_size_are_used(model, examples):
    sizes = []

    def forward(network, batch):
        sizes.append(len(batch["x"]))
        return network(batch["x"])

    certificate = stated(model, examples)
    risk = verify(certificate, model, {"x": examples[0]}, forward=forward, batch_size=250)
    assert risk == pytest.approx(certificate.risk)
    assert set(sizes) == {250, 100}


def test_nothing_certified_leaves_nothing_to_verify(model, examples):
    certificate = certify([60], pruning=pruning_of(model))
    with pytest.raises(ValueError, match="there is no risk to verify"):
        verify(certificate, model, examples)
    assert math.isclose(certificate.sparsity, 0)
