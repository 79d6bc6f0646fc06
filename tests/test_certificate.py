"""Certificates: what they say, how they are kept, and which networks they accept."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import confprune.calibration
from confprune import fingerprint as fingerprints
from confprune.certificate import Certificate, Pruning, VerificationError
from confprune.fingerprint import difference, fingerprint
from confprune.risk.pvalues import PVALUES


def certify(
    sums: list[float],
    n: int = 200,
    sparsities: list[float] | None = None,
    alpha: float = 0.1,
    delta: float = 0.1,
    pvalue: str = "convex",
    **fields,
) -> Certificate:
    """A certificate of given loss sums per level, by fixed-sequence testing."""
    pvalues = PVALUES[pvalue if pvalue != "clt" else "convex"].from_sums(sums, n, alpha)
    risks = np.array(sums) / n
    settings = {
        "sparsities": sparsities or [(j + 1) / (len(sums) + 1) for j in range(len(sums))],
        "loss": "disagreement",
        "procedure": "fixed_sequence",
        "bounds": np.minimum(risks + 0.05, 1),
        "rejected": np.logical_and.accumulate(pvalues <= delta),
    }
    return Certificate(
        alpha=alpha,
        delta=delta,
        n=n,
        pvalue=pvalue,
        risks=risks,
        pvalues=pvalues,
        **{**settings, **fields},
    )


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def pruning_of(model: nn.Module) -> Pruning:
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    total = sum(weight.numel() for weight in weights.values())
    return Pruning("global", "magnitude", tuple(weights), fingerprint(weights), total)


# What it says.


def test_the_sparsest_rejected_level_is_what_is_certified():
    certificate = certify([0, 5, 60], sparsities=[0.3, 0.6, 0.9])
    assert certificate.rejected == (True, True, False)
    assert (certificate.certified, certificate.level, certificate.sparsity) == (True, 1, 0.6)
    assert (certificate.risk, certificate.bound) == (0.025, pytest.approx(0.075))
    # Procedures other than a chain may leave gaps.
    gap = dataclasses.replace(certificate, rejected=(True, False, True))
    assert gap.sparsity == 0.9


def test_nothing_certified_is_an_ordinary_outcome():
    certificate = certify([60, 70])
    assert not certificate.certified
    assert (certificate.level, certificate.risk, certificate.bound) == (None, None, None)
    assert certificate.sparsity == 0.0


def test_a_certificate_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        certify([0]).alpha = 0.5  # type: ignore[misc]


def test_array_values_become_plain_ones():
    certificate = certify([0, 60])
    assert all(type(value) is float for value in certificate.risks + certificate.bounds)
    assert all(type(value) is bool for value in certificate.rejected)


def test_the_short_form_is_one_line():
    assert repr(certify([0, 60], sparsities=[0.5, 0.9])) == (
        "<Certificate: sparsity=0.5, loss='disagreement', alpha=0.1, delta=0.1, n=200, 2 levels>"
    )
    assert "nothing certified" in repr(certify([60]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": [], "risks": []}, "sparsities is empty"),
        ({"risks": [0.1]}, "risks has 1 values for 2 sparsities"),
        ({"rejected": [True]}, "rejected has 1 values for 2 sparsities"),
        ({"pvalues": [0.1, 1.5]}, "pvalues has the value 1.5, outside"),
        ({"sparsities": [0.5, 0.5]}, "strictly increasing"),
        ({"sparsities": [0.5, 1.0]}, r"in \[0, 1\)"),
        ({"sparsities": [-0.1, 0.5]}, r"in \[0, 1\)"),
        ({"alpha": 0.0}, "alpha is 0.0, outside"),
        ({"delta": 1.0}, "delta is 1.0, outside"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_contradictory_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(certify([0, 60]), **changes)


def test_contradictory_pruning_is_refused():
    pruning = pruning_of(small_network())
    with pytest.raises(ValueError, match="total is 5, but the shapes add up to 72"):
        dataclasses.replace(pruning, total=5)
    with pytest.raises(ValueError, match="name different parameters"):
        dataclasses.replace(pruning, parameters=("0.weight",))


# The report.


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


# Files.

unit = st.floats(0, 1)
inner = st.floats(1e-12, 1 - 1e-12)


@st.composite
def certificates(draw) -> Certificate:
    levels = draw(st.integers(1, 6))
    grid = draw(st.sets(st.floats(0, 1, exclude_max=True), min_size=levels, max_size=levels))

    def per_level(values):
        return draw(st.lists(values, min_size=levels, max_size=levels))

    pruning = None
    if draw(st.booleans()):
        shapes = draw(st.dictionaries(st.text(max_size=5), st.lists(st.integers(0, 9), max_size=3)))
        entries = {
            name: {"shape": shape, "dtype": "bfloat16", "sha256": "0" * 64}
            for name, shape in shapes.items()
        }
        total = sum(math.prod(shape) for shape in shapes.values())
        pruning = Pruning("layer", "magnitude", tuple(shapes), entries, total)
    return Certificate(
        sparsities=tuple(sorted(grid)),
        alpha=draw(inner),
        delta=draw(inner),
        n=draw(st.integers(1, 2**60)),
        loss=draw(st.text(max_size=8)),
        pvalue="convex",
        procedure="fixed_sequence",
        risks=tuple(per_level(unit)),
        pvalues=tuple(per_level(unit)),
        bounds=tuple(per_level(unit)),
        rejected=tuple(per_level(st.booleans())),
        pruning=pruning,
        seed=draw(st.none() | st.integers()),
        notes=tuple(draw(st.lists(st.text(max_size=9), max_size=2))),
        versions=draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)),
    )


@settings(max_examples=60, deadline=None)
@given(certificate=certificates())
def test_a_saved_certificate_loads_as_the_same(certificate, tmp_path_factory):
    path = tmp_path_factory.mktemp("round-trip") / "certificate.json"
    certificate.save(path)
    assert Certificate.load(path) == certificate
    assert Certificate.load(str(path)) == certificate


def test_unmeasured_values_are_null_in_the_file(tmp_path):
    path = tmp_path / "certificate.json"
    certify([0, 60], bounds=[0.1, math.nan]).save(path)
    assert json.loads(path.read_text())["bounds"] == [0.1, None]
    assert math.isnan(Certificate.load(path).bounds[1])


def test_the_file_tells_its_schema_and_the_outcome(tmp_path):
    path = tmp_path / "certificate.json"
    certify([0, 60], sparsities=[0.5, 0.9]).save(path)
    content = json.loads(path.read_text())
    assert content["schema"] == "confprune-certificate/1"
    assert (content["certified"], content["level"], content["sparsity"]) == (True, 0, 0.5)


def saved(tmp_path, **fields) -> tuple[os.PathLike[str], dict]:
    path = tmp_path / "certificate.json"
    certify([0, 60], sparsities=[0.5, 0.9], pruning=pruning_of(small_network()), **fields).save(
        path
    )
    return path, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("alpha"), "the field alpha is missing"),
        (lambda c: c.pop("schema"), "schema is None, this version reads 'confprune-certificate/1'"),
        (
            lambda c: c.update(schema="confprune-certificate/9"),
            "schema is 'confprune-certificate/9'",
        ),
        (lambda c: c.update(looks=[1]), "the field looks is unknown: a newer version"),
        (lambda c: c.update(alpha="0.1"), "the field alpha is text, not a number"),
        (lambda c: c.update(alpha=10**400), "the field alpha is too large a number"),
        (lambda c: c.update(alpha=True), "the field alpha is a truth value, not a number"),
        (lambda c: c.update(n=2.5), "the field n is a number, not a whole number"),
        (lambda c: c.update(n=0), "n is 0"),
        (lambda c: c.update(loss=None), "the field loss is null, not text"),
        (lambda c: c.update(risks=0.1), "the field risks is a number, not a list"),
        (lambda c: c.update(risks=[0.1]), "risks has 1 values for 2 sparsities"),
        (lambda c: c.update(rejected=[1, 0]), "the field rejected is a number, not a truth value"),
        (lambda c: c.update(notes={}), "the field notes is an object, not a list"),
        (lambda c: c.update(versions=[]), "the field versions is a list, not an object"),
        (lambda c: c.update(pruning=3), "pruning is a number, not an object"),
        (lambda c: c["pruning"].update(scope=3), "the field pruning.scope is a number, not text"),
        (lambda c: c["pruning"].update(total=3), "pruning: total is 3, but"),
        (
            lambda c: c["pruning"]["fingerprint"]["0.weight"].pop("sha256"),
            "the field pruning.fingerprint.sha256 is missing",
        ),
        (lambda c: c.update(sparsity=0.9), "sparsity is 0.9, but the levels say 0.5"),
        (lambda c: c.update(rejected=[True, True]), "level is 0, but the levels say 1"),
    ],
)
def test_a_spoilt_file_is_refused_naming_it_and_the_fault(tmp_path, change, message):
    path, content = saved(tmp_path)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        Certificate.load(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is not JSON"),
        (b"\x80\x02", "it is not JSON"),
        (b'{"alpha": NaN}', "NaN is no JSON number"),
        (b"[1, 2]", "its JSON is not an object"),
        (b"[" * 100_000, "it is not JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        Certificate.load(path)


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Certificate.load(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        certify([0]).save(tmp_path / "absent" / "certificate.json")


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch, step, failure):
    path, before = saved(tmp_path)

    def crash(*_):
        raise failure("no space left")

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(failure):
        certify([0], n=999).save(path)
    assert json.loads(path.read_text()) == before
    assert os.listdir(tmp_path) == [path.name]


def test_saving_through_a_link_changes_its_target(tmp_path):
    path, _ = saved(tmp_path)
    link = tmp_path / "latest.json"
    link.symlink_to(path)
    certify([0], n=999).save(link)
    assert link.is_symlink()
    assert Certificate.load(path).n == 999


# Fingerprints.


def test_a_fingerprint_does_not_depend_on_strides_or_chunks(monkeypatch):
    weights = [
        torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1),
        torch.arange(40.0).bfloat16().reshape(5, 8).t(),
        torch.arange(40.0, dtype=torch.float64)[::3],
        torch.ones(3).expand(4, 3),
        torch.tensor(2.0),
        torch.zeros(0, 3),
        torch.as_strided(torch.ones(3), (1,), (0,)),
    ]
    whole = [fingerprint({"w": weight.clone().contiguous()}) for weight in weights]
    for elements in (1, 7, 1000):
        monkeypatch.setattr(fingerprints, "CHUNK_ELEMENTS", elements)
        assert [fingerprint({"w": weight}) for weight in weights] == whole


def test_a_fingerprint_sees_a_single_bit():
    weight = torch.zeros(100, dtype=torch.bfloat16)
    other = weight.clone()
    other[57] = -0.0
    assert fingerprint({"w": weight}) != fingerprint({"w": other})
    assert json.loads(json.dumps(fingerprint({"w": weight}))) == fingerprint({"w": weight})


def test_the_most_telling_difference_is_named():
    expected = {"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.ones(5)}

    def differ(**changes: torch.Tensor | None) -> str | None:
        actual = {k: v for k, v in {**expected, **changes}.items() if v is not None}
        return difference(fingerprint(expected), fingerprint(actual))

    assert differ() is None
    assert differ(b=None) == "parameter 'b' is missing"
    assert differ(a=None, b=None, c=torch.ones(9)) == "parameter 'a' is missing (and 1 more)"
    assert differ(d=torch.ones(1)) == "parameter 'd' was not there"
    assert differ(a=-torch.ones(2, 3), b=torch.ones(2, 2)) == (
        "parameter 'b' has shape [2, 2] instead of [4]"
    )
    assert differ(b=torch.ones(4).double()) == (
        "parameter 'b' has dtype float64 instead of float32"
    )
    assert differ(b=torch.zeros(4)) == (
        "the values of parameter 'b' are others (1 of 3 prunable parameters differ)"
    )


# Pruning and verifying.


def test_pruning_gives_a_new_network_of_the_certified_sparsity():
    model = small_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certificate = certify([0, 60], sparsities=[0.5, 0.9], pruning=pruning_of(model))
    sparse = certificate.prune(model)
    zeros = sum(int((layer.weight == 0).sum()) for layer in (sparse[0], sparse[2]))
    assert zeros == 36
    assert sparse is not model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pruning_a_loaded_certificate_gives_the_same_network(tmp_path):
    model = small_network()
    path, _ = saved(tmp_path)
    loaded = Certificate.load(path).prune(model)
    direct = certify([0, 60], sparsities=[0.5, 0.9], pruning=pruning_of(model)).prune(model)
    assert torch.equal(loaded[0].weight, direct[0].weight)


def test_another_network_is_refused_naming_the_difference():
    certificate = certify([0], pruning=pruning_of(small_network()))
    with pytest.raises(ValueError, match=r"another network: the values of parameter '0\.weight'"):
        certificate.prune(small_network(seed=1))
    with pytest.raises(ValueError, match=r"another network: parameter '2\.weight' is missing"):
        certificate.prune(small_network()[:2])
    with pytest.raises(ValueError, match="dtype float64 instead of float32"):
        certificate.prune(small_network().double())
    with pytest.raises(ValueError, match="another network"):
        certificate.prune(certificate.prune(small_network()))


def test_without_a_certified_level_the_copy_is_unpruned_and_a_warning_says_so():
    model = small_network()
    certificate = certify([60], pruning=pruning_of(model))
    with pytest.warns(UserWarning, match="nothing was certified"):
        copy = certificate.prune(model)
    assert copy is not model
    assert torch.equal(copy[0].weight, model[0].weight)


def test_a_certificate_of_a_bare_loss_matrix_cannot_prune_but_says_how():
    certificate = certify([0, 60], sparsities=[0.5, 0.9])
    with pytest.raises(ValueError, match=r"prune_levels\(model, \[0.5\]\).prune\(model, 0\)"):
        certificate.prune(small_network())
    with pytest.raises(ValueError, match="cannot verify"):
        certificate.verify(small_network(), ())


@pytest.fixture
def verification(monkeypatch):
    """A certificate with a risk of 0.025 whose verification measures what the test sets."""
    measured = {"result": (0.025, 200)}

    def plain_risk(model, pruned, data, loss, **options):
        measured.update(pruned=pruned, loss=loss, options=options)
        return measured["result"]

    monkeypatch.setattr(confprune.calibration, "plain_risk", plain_risk)
    return certify([5, 60], pruning=pruning_of(small_network())), measured


def test_verifying_runs_the_pruned_network_with_the_loss_of_the_certificate(verification):
    certificate, measured = verification
    assert certificate.verify(small_network(), (), batch_size=7, progress=False) == 0.025
    assert measured["loss"].name == "disagreement"
    assert measured["options"] == {"forward": None, "batch_size": 7, "progress": False}
    expected = certificate.prune(small_network())
    assert torch.equal(measured["pruned"][0].weight, expected[0].weight)


@pytest.mark.parametrize("risk", [0.025 + 0.012, 0.0, math.nan])
def test_a_risk_that_does_not_reproduce_fails_verification(verification, risk):
    certificate, measured = verification
    measured["result"] = (risk, 200)
    with pytest.raises(VerificationError, match=r"states a risk of 0\.025 .* has (0\.037|0|nan) "):
        certificate.verify(small_network(), ())


def test_near_ties_that_fall_the_other_way_pass_verification(verification):
    certificate, measured = verification
    measured["result"] = (0.025 + 2 / 200, 200)
    assert certificate.verify(small_network(), ()) == pytest.approx(0.035)
    half = small_network().bfloat16()
    measured["result"] = (0.025 + 0.019, 200)
    assert dataclasses.replace(certificate, pruning=pruning_of(half)).verify(half, ()) > 0.04


def test_other_data_fails_verification(verification):
    certificate, measured = verification
    measured["result"] = (0.025, 150)
    with pytest.raises(VerificationError, match="rests on 200 examples, the data has 150"):
        certificate.verify(small_network(), ())


def test_verifying_takes_the_loss_that_was_calibrated(verification):
    certificate, measured = verification
    with pytest.raises(ValueError, match="about the loss 'disagreement', not 'harm'"):
        certificate.verify(small_network(), (), loss="harm")

    def mine(outputs, reference):
        return outputs

    own = dataclasses.replace(certificate, loss="mine")
    with pytest.raises(ValueError, match="'mine' is not built in: pass it as loss="):
        own.verify(small_network(), ())
    own.verify(small_network(), (), loss=mine)
    assert measured["loss"].function is mine


def test_nothing_certified_leaves_nothing_to_verify():
    certificate = certify([60], pruning=pruning_of(small_network()))
    with pytest.raises(ValueError, match="there is no risk to verify"):
        certificate.verify(small_network(), ())
