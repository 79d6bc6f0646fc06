"""The report: what it says, in words, for every kind of certificate."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from certificates import certify, controlled, of_parts, part, pruning_of, small_network
from torch import nn

import confprune
from confprune.certificate import Certificate, Looks
from confprune.risk.pvalues import PVALUES


def unwrapped(certificate: Certificate) -> str:
    return re.sub(r"\s+", " ", str(certificate))


def test_the_report_states_the_promise_and_what_it_rests_on():
    certificate = certify(
        [0, 5, 60],
        sparsities=[0.3, 0.6, 0.9],
        pruning=pruning_of(small_network()),
        notes=["The order of the examples was taken as given."],
        versions={"confprune": "0.1.0"},
    )
    text = unwrapped(certificate)
    assert (
        "With probability at least 90 %, the network pruned to 60.0 % sparsity has, on new data, "
        "an expected disagreement with the full network of at most 0.1." in text
    )
    assert "200 independent examples" in text
    assert "convex p-values (finite-sample, distribution-free)" in text
    assert "fixed_sequence testing of 3 levels" in text
    assert "72 weights of 2 parameters (scope global, criterion magnitude)" in text
    assert "Note: The order of the examples was taken as given." in text
    assert "Made with confprune 0.1.0." in text
    assert "What would help" not in text
    assert max(map(len, str(certificate).splitlines())) <= 88


def test_the_report_shows_the_levels_around_the_certified_one():
    sums = [0.0] * 10 + [100.0] * 10
    sparsities = [0.05 * j for j in range(20)]
    table = [
        line for line in str(certify(sums, sparsities=sparsities)).splitlines() if "  " in line
    ]
    assert table[0].split() == ["sparsity", "risk", "bound", "p-value"]
    rows = [line.split() for line in table[1:]]
    assert [row[0] for row in rows] == ["30.0", "35.0", "40.0", ">", "50.0", "55.0", "60.0"]
    assert rows[3][1] == "45.0"
    assert rows[3][-1] == "certified"
    assert rows[4][-2:] == ["not", "certified"]
    assert rows[5][-2:] == rows[6][-2:] == ["not", "reached"]


def test_levels_behind_the_first_failure_are_said_not_to_be_reached():
    """However good they look: a rejected level behind a failure is no certified one."""
    certificate = certify([0, 40, 0, 0], sparsities=[0.2, 0.4, 0.6, 0.8])
    text = unwrapped(certificate)
    why = "up to the first that is not certified: those behind it are not reached, however small"
    assert why in text
    rows = rows_of(str(certificate), "    sparsity")
    assert [row[-2:] for row in rows[1:]] == [["not", "certified"]] + 2 * [["not", "reached"]]
    for other in ("holm", "graphical(weights=..., transitions=...)"):
        assert "reached" not in str(dataclasses.replace(certificate, procedure=other))
    assert "reached" not in str(certify([0, 40], sparsities=[0.2, 0.4]))


def test_a_learned_order_may_have_failed_elsewhere():
    """A small p-value that is not certified comes after the failure of another candidate."""
    certificate = dataclasses.replace(
        certify([0, 0], sparsities=[0.2, 0.4]),
        procedure="split_fixed_sequence",
        rejected=(True, False),
    )
    assert rows_of(str(certificate), "    sparsity")[1][-2:] == ["not", "reached"]


def test_one_weight_is_singular():
    text = unwrapped(certify([0], pruning=pruning_of(nn.Linear(1, 1))))
    assert "Pruned are the 1 weight of 1 parameter (scope" in text
    assert "testing of 1 level." in text


def test_the_report_tells_the_share_of_the_whole_network_with_shared_weights_once():
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.LayerNorm(20))
    model[2].weight = model[0].weight
    settings = {"loss": "cosine", "alpha": 0.9, "delta": 0.1, "sparsities": [0.5]}
    certificate = confprune.calibrate(model, torch.randn(80, 20), progress=False, **settings)
    assert certificate.pruning.total == 400
    assert certificate.pruning.network == 400 + 2 * 20 + 2 * 20
    text = unwrapped(certificate)
    assert "50.0 % of them are 41.7 % of the network's 480." in text
    with pytest.raises(ValueError, match="network is 399, fewer than the 400 in total"):
        dataclasses.replace(certificate.pruning, network=399)


def test_a_certificate_of_before_says_nothing_of_the_whole_network(tmp_path):
    model = nn.Linear(20, 20)
    settings = {"loss": "cosine", "alpha": 0.9, "delta": 0.1, "sparsities": [0.5]}
    certificate = confprune.calibrate(model, torch.randn(80, 20), progress=False, **settings)
    certificate.save(tmp_path / "new.json")
    assert confprune.Certificate.load(tmp_path / "new.json") == certificate
    content = json.loads((tmp_path / "new.json").read_text())
    del content["pruning"]["network"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = confprune.Certificate.load(tmp_path / "old.json")
    assert old.pruning.network is None
    assert "of them are" not in str(old)


def test_the_report_tells_close_sparsities_apart():
    text = str(certify([0, 0], sparsities=[0.9990, 0.9995]))
    assert "Certified: 99.95 % sparsity" in text
    assert "99.90 %" in text


def test_asymptotic_p_values_are_called_so():
    text = unwrapped(certify([0], pvalue="clt"))
    assert "Asymptotically, with probability" in text
    assert "finite-sample" not in text


def test_unmeasured_levels_are_left_blank():
    certificate = certify([0, 5], bounds=[0.1, math.nan])
    assert re.search(r"0\.0250 +- ", str(certificate))


def test_a_custom_loss_and_p_value_are_reported_by_name():
    text = unwrapped(dataclasses.replace(certify([0]), loss="mine", pvalue="other"))
    assert "expected loss 'mine' of at most 0.1" in text
    assert "other p-values" in text


def examples_named(certificate: Certificate) -> int:
    found = re.search(r"What would help: about ([\d,]+) examples", unwrapped(certificate))
    assert found
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("pvalue", ["convex", "hoeffding", "hoeffding_bentkus"])
def test_the_report_names_the_number_of_examples_that_would_do(pvalue):
    certificate = certify([16, 20], n=200, pvalue=pvalue)
    assert not certificate.certified
    n = examples_named(certificate)
    from_sums = PVALUES[pvalue].from_sums
    assert from_sums([0.08 * n], n, 0.1)[0] <= 0.1
    assert from_sums([0.08 * (n - 3)], n - 3, 0.1)[0] > 0.1


def test_the_number_of_examples_for_a_binary_loss_counts_whole_losses():
    n = examples_named(certify([16, 20], n=200, pvalue="binomial"))
    assert PVALUES["binomial"].from_sums([math.ceil(0.08 * n - 1e-6)], n, 0.1)[0] <= 0.1


def test_bonferroni_needs_more_examples_than_a_chain():
    chain = certify([16] * 10)
    corrected = dataclasses.replace(chain, procedure="bonferroni")
    assert examples_named(corrected) > examples_named(chain)
    assert "a larger alpha." in unwrapped(corrected)


def test_a_risk_just_below_alpha_needs_too_many_examples_to_count():
    assert "more than 10,000,000 examples" in unwrapped(certify([0.0999999 * 200]))


def test_no_number_of_examples_helps_against_a_risk_above_alpha():
    text = unwrapped(certify([30, 40], sparsities=[0.2, 0.4]))
    assert "More examples would not help: the risk on these at 20.0 % sparsity is 0.15" in text
    assert "lower sparsities in the grid" in text
    assert "a larger alpha, 0.2 or more with examples like these" in text
    # Nothing is denser than the full network.
    assert "lower sparsities" not in unwrapped(certify([30, 40], sparsities=[0.0, 0.4]))
    assert "a larger alpha." in unwrapped(certify([200.0]))


def test_certifying_only_the_full_network_calls_for_advice_too():
    text = unwrapped(certify([0, 16], sparsities=[0.0, 0.4]))
    assert "Certified: 0.0 % sparsity" in text
    assert "if the risk at 40.0 % sparsity stays at the 0.08 seen" in text
    assert "sparsities above 0 in the grid" in unwrapped(certify([0], sparsities=[0.0]))


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The rows, in words, of the table under a heading."""
    lines = text[text.index(heading) :].splitlines()[1:]
    return [line.split() for line in lines[: lines.index("") if "" in lines else None]]


# Early looks.

LOOKS = Looks((50, 100, 200), (0.03, 0.03, 0.04), (50, 50, 200, 100), 400, 0.5, "permuted")


def test_early_looks_are_told_with_what_they_saved():
    certificate = certify([0, 0, 9, 60], looks=LOOKS, seed=7)
    text = unwrapped(certificate)
    assert "tested at 50, 100 and 200 examples, in a random order (seed 7), each only" in text
    assert "saved 50.0 % of the evaluations" in text
    assert re.search(r"20\.0 % +50 ", str(certificate))
    assert re.search(r"> +60\.0 % +200 ", str(certificate))
    given = dataclasses.replace(certificate, looks=dataclasses.replace(LOOKS, order="given"))
    assert "examples, in the order given, each" in unwrapped(given)


def test_many_looks_are_told_by_the_first_and_the_last():
    sizes = tuple(range(20, 201, 20))
    looks = Looks(sizes, (0.01,) * 10, (200, 200), 400, 0.0, "given")
    certificate = certify([0, 60], looks=looks)
    assert "tested at 20, 40, 60, ..., 200 examples (10 looks)" in unwrapped(certificate)
    once = Looks((200,), (0.1,), (200,), 200, 0, "given")
    assert "tested at" not in str(certify([0], looks=once))
    # Where every level saw every example, saying so in a column would be noise.
    assert not re.search("sparsity +examples", str(certificate))


def test_examples_for_a_test_that_pays_for_its_looks_reckon_with_that():
    looks = Looks((100, 200), (0.05, 0.05), (200,), 200, 0.0, "given")
    once, twice = certify([16]), certify([16], looks=looks)
    assert examples_named(twice) > examples_named(once)
    exact = certify([16], pvalue="binomial", looks=looks)
    assert examples_named(exact) == examples_named(certify([16], pvalue="binomial"))
    # What a bound after looks says of another alpha is not what a test at it would have said.
    assert "a larger alpha." in unwrapped(twice)


def test_a_level_that_a_test_without_looks_would_have_passed_needs_little_more():
    looks = Looks((100, 200), (0.05, 0.05), (200,), 200, 0.0, "given")
    certificate = certify([12], pvalue="binomial", looks=looks, rejected=[False])
    assert "somewhat more than 200 examples" in unwrapped(certificate)


# Several risks and groups.


def test_every_risk_is_promised_and_the_one_that_binds_is_marked():
    certificate = of_parts(
        part([0, 5, 20], 300, loss="disagreement", alpha=0.1),
        part([0, 1, 9], 300, loss="harm", alpha=0.03, pvalue="binomial"),
        n=300,
    )
    text = unwrapped(certificate)
    assert (
        "has, on new data, an expected disagreement with the full network of at most 0.1 and an "
        "expected rate of errors where the full network is right of at most 0.03. All of this "
        "holds at once." in text
    )
    assert "convex and binomial p-values" in text
    assert "Risk and bound are of what binds, 'harm':" in text
    certified = rows_of(str(certificate), "At 50.0 % sparsity, certified:")
    failed = rows_of(str(certificate), "At 75.0 % sparsity, not certified:")
    assert certified[0] == ["loss", "alpha", "examples", "risk", "bound", "p-value"]
    assert certified[1][:3] == ["disagreement", "0.1", "300"]
    assert certified[2][:2] == [">", "harm"]
    assert certified[2][-1] == failed[2][-1] == "binds"
    assert max(map(len, str(certificate).splitlines())) <= 88


def test_every_group_is_promised_and_listed():
    certificate = of_parts(part([0, 5, 20], 150, group="common"), part([0, 0, 9], 50, group="rare"))
    text = unwrapped(certificate)
    assert "on new data of each of the 2 groups, an expected disagreement" in text
    rows = rows_of(str(certificate), "At 75.0 % sparsity, not certified:")
    assert rows[0][0] == "group"
    assert rows[1][:4] == ["group", "common", "0.1", "150"]
    assert rows[2][:5] == [">", "group", "rare", "0.1", "50"]


def test_risks_on_groups_are_named_by_both():
    parts = [
        part([0, 9], 90, loss=loss, group=group) for loss in ("error", "harm") for group in "ab"
    ]
    rows = rows_of(str(of_parts(*parts)), "At 33.3 % sparsity")
    assert rows[0][:3] == ["loss", "and", "group"]
    assert [row[-8:-5] for row in rows[2:]] == [
        ["error,", "group", "b"],
        ["harm,", "group", "a"],
        ["harm,", "group", "b"],
    ]


def test_of_many_groups_the_closest_to_their_alpha_are_listed():
    # The one that binds the next level is far from its alpha at the certified one.
    parts = [part([j % 7, j % 7], 200, group=str(j)) for j in range(29)]
    parts.append(part([0, 150], 200, group="a group with a name much too long for a table"))
    certificate = of_parts(*parts)
    assert certificate.binding is parts[-1]
    certified = rows_of(str(certificate), "At 33.3 % sparsity, certified:")
    failed = rows_of(str(certificate), "At 66.7 % sparsity, not certified:")
    for rows in (certified, failed):
        assert len(rows) == 1 + 8 + 1
        assert " ".join(rows[-1]) == "and 22 more, further from their alpha"
        assert sum(row[0] == ">" for row in rows) == 1
    assert failed[1][0] == certified[8][0] == ">"
    assert "group a group with a name..." in str(certificate)
    listed = [float(row[-1]) for row in certified[1:8]]
    assert listed == sorted(listed, reverse=True)
    assert max(map(len, str(certificate).splitlines())) <= 88


def test_advice_names_the_group_that_binds_and_how_many_of_it_are_needed():
    certificate = of_parts(part([0, 9], 400, group="common"), part([2, 2], 40, group="rare"))
    assert not certificate.certified
    text = unwrapped(certificate)
    assert (
        "could be shown to have, on new data of each of the 2 groups, an expected disagreement "
        "with the full network of at most 0.1, all at once, with probability at least 90 %." in text
    )
    assert "What binds is 'disagreement, group rare'. What would help: about " in text
    found = re.search(r"about (\d+) examples of group rare rather than some 40, if the risk", text)
    assert found
    n = int(found[1])
    from_sums = PVALUES["convex"].from_sums
    assert from_sums([0.05 * n], n, 0.1)[0] <= 0.1 < from_sums([0.05 * (n - 2)], n - 2, 0.1)[0]


def test_a_group_given_up_early_is_counted_as_it_would_have_been():
    looks = Looks((100, 200, 400), (0.03, 0.03, 0.04), (100,), 100, 0.75, "given")
    common, rare = part([0], 90, group="common"), part([0.5], 10, group="rare")
    text = unwrapped(of_parts(common, rare, n=400, looks=looks))
    assert "of group rare rather than some 40" in text


def test_a_group_that_was_never_seen_needs_what_any_group_needs():
    empty = dataclasses.replace(
        part([0], 1, group="rare"), counts=(0,), risks=(math.nan,), pvalues=(1,), bounds=(1,)
    )
    text = unwrapped(of_parts(part([0], 90, group="common"), empty))
    assert "What would help: about 22 examples of group rare: on these nothing counted" in text


# Selective prediction.


def test_a_selective_promise_is_about_accepted_predictions():
    certificate = certify([0, 60], accept="confidence >= 0.9", acceptance=[0.625, 0.25])
    text = unwrapped(certificate)
    assert (
        "has, on new data, among the predictions accepted (confidence >= 0.9), an expected "
        "disagreement with the full network of at most 0.1" in text
    )
    assert "At 33.3 % sparsity 62.5 % of the predictions were accepted." in text
    assert re.search(r"33\.3 % +62\.5 % +0\.0000", str(certificate))


def test_advice_counts_accepted_examples():
    certificate = certify([16], accept="sure", acceptance=[0.5])
    assert re.search(
        r"about [\d,]+ accepted examples rather than some 100, if", unwrapped(certificate)
    )


# Other guarantees, and levels that were not tested.


def test_a_promise_in_expectation_has_no_probability():
    text = unwrapped(controlled([0, 5, 60], "expectation"))
    assert text.startswith("Certified in expectation: 50.0 % sparsity In expectation over the")
    assert (
        "the network pruned to 50.0 % sparsity has a monotonised disagreement with the full "
        "network (the largest at this and all denser levels) of at most 0.1." in text
    )
    assert "no probability" in text
    assert "conformal risk control (finite-sample, distribution-free) over 3 levels" in text
    assert "With probability" not in text
    assert not re.search("bound|p-value", text)
    assert re.search("risk +corrected\n", str(controlled([0], "expectation")))


def test_a_monotone_promise_is_about_the_monotonised_loss():
    text = unwrapped(controlled([0, 5, 60], "monotone"))
    assert text.startswith("Certified for the monotonised loss: 50.0 % sparsity With probability")
    assert "an expected monotonised disagreement with the full network (the largest at" in text
    assert "upper confidence bounds on the monotonised risk of 3 levels, from convex" in text
    assert re.search("risk +bound\n", str(controlled([0], "monotone")))


def test_advice_fits_the_guarantee():
    failed = controlled([19.95], "expectation")
    text = unwrapped(failed)
    assert "could be shown to have a monotonised disagreement" in text
    assert "of at most 0.1, in expectation over the calibration data and new data." in text
    n = examples_named(failed)
    risk = failed.risks[0]
    assert "a larger alpha, 0.1043 or more with examples like these" in text
    assert (n * risk + 1) / (n + 1) <= 0.1 < ((n - 1) * risk + 1) / n
    assert "about" in unwrapped(controlled([16], "monotone"))


def test_levels_that_were_not_tested_are_left_out():
    nan = math.nan
    tested = np.array([True, False, True, False, False, True, True])
    certificate = certify([0, 0, 0, 0, 0, 3, 60])
    values = {
        name: np.where(tested, getattr(certificate, name), nan)
        for name in ("risks", "pvalues", "bounds")
    }
    rejected = certificate.rejected & tested
    gaps = dataclasses.replace(certificate, **values, rejected=rejected)
    assert "testing of 4 of 7 levels" in unwrapped(gaps)
    assert re.findall(r"(\d+\.\d) % +0", str(gaps)) == ["12.5", "37.5", "75.0", "87.5"]
