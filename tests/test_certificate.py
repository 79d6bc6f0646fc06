"""Certificates: what they say, how they are kept, and which networks they accept."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re

import numpy as np
import pytest
import torch
from certificates import certify, controlled, of_parts, part, pruning_of, small_network
from hypothesis import given, settings
from hypothesis import strategies as st

from confprune.certificate import Certificate, Looks, Part, Pruning
from confprune.certificate import fingerprint as fingerprints
from confprune.certificate.fingerprint import difference, fingerprint

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
    assert repr(of_parts(part([0], 90, loss="harm"), part([2], 90, loss="error"))) == (
        "<Certificate: sparsity=0.5, 2 risks, binding='error', alpha=0.1, delta=0.1, n=90, "
        "1 levels>"
    )
    assert "in expectation" in repr(controlled([0], "expectation"))


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
        ({"guarantee": "hope"}, "guarantee is 'hope', not one of"),
        ({"guarantee": "expectation"}, "delta is 0.1, but a guarantee in expectation has none"),
        ({"delta": None}, "delta is None, outside"),
        ({"guarantee": "monotone", "delta": math.nan}, "delta is None, outside"),
        ({"accept": "sure"}, "accept and acceptance must be given together"),
        ({"accept": "sure", "acceptance": [0.5]}, "acceptance has 1 values for 2"),
        ({"accept": "sure", "acceptance": [0.5, 2]}, "acceptance has the value 2.0, outside"),
    ],
)
def test_contradictory_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(certify([0, 60]), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"risks": (0.1,)}, r"part 'harm, group a': risks has 1 values for 2 counts"),
        ({"bounds": (0.1, 7)}, r"part 'harm, group a': bounds has the value 7.0, outside"),
        ({"alpha": 0}, "alpha is 0.0, outside"),
        ({"counts": (5, -1)}, "counts has the value -1, below 0"),
    ],
)
def test_contradictory_parts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(part([0, 9], 100, loss="harm", group="a"), **changes)


LOOKS = Looks((50, 100, 200), (0.02, 0.02, 0.06), (50, 200), 250, 0.375, "permuted")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (50, 50, 200)}, "sizes must increase from at least 1"),
        ({"sizes": ()}, "sizes must increase from at least 1"),
        ({"spending": (0.1,)}, "spending has 1 values for 3 sizes"),
        ({"spending": (-0.1, 0.1, 0.1)}, "spending has the value -0.1"),
        ({"seen": (50, 201)}, "seen must lie between 0 and 200"),
        ({"evaluations": 100}, "evaluations is 100, fewer than the 250 seen"),
        ({"saved": -0.5}, "saved is -0.5"),
        ({"order": "sorted"}, "order is 'sorted', not one of"),
    ],
)
def test_contradictory_looks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LOOKS, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 300}, "the last is at 200 examples, but n is 300"),
        ({"seed": None}, "the order is permuted, but seed is missing"),
        ({"delta": 0.05}, "0.1 is spent in all, more than delta"),
        ({"looks": dataclasses.replace(LOOKS, seen=(50,))}, "seen has 1 values for 2 sparsities"),
    ],
)
def test_looks_that_do_not_fit_the_certificate_are_refused(changes, message):
    certificate = certify([0, 60], looks=LOOKS, seed=1)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(certificate, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.2}, "not those of any part"),
        ({"risks": (0.5, 0.5)}, "not those of any part"),
        ({"pvalues": (0.0, 0.0)}, "pvalues are not the largest of the parts"),
        ({"n": 60}, "part 'harm' counts 100 examples, more than n, 60"),
        ({"sparsities": (0.5,), "risks": (0,), "pvalues": (0,), "bounds": (0,), "rejected": (1,)},
         "part 'harm' has 2 levels for 1 sparsities"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_the_certificate_are_refused(changes, message):
    certificate = of_parts(part([0, 60], 100, loss="harm"), part([0, 60], 100, loss="error"))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(certificate, **changes)


def test_the_part_that_binds_is_the_one_that_stopped_the_next_level():
    common = part([0, 5, 20], 150, group="common")
    rare = part([0, 1, 9], 50, group="rare")
    certificate = of_parts(common, rare)
    assert certificate.rejected == (True, True, False)
    assert certificate.obstacle == 2
    # Both p-values are 1 there: the risk that is further above alpha, for its n, binds.
    assert common.pvalues[2] == rare.pvalues[2] == 1
    assert certificate.binding is rare
    assert certificate.risks == rare.risks
    assert of_parts(common, part([0, 1, 6], 50, group="rare")).binding is common
    # A group none of whose examples was seen tells nothing, and stops the level too.
    empty = dataclasses.replace(
        rare,
        counts=(50, 50, 0),
        risks=(0, 0.02, math.nan),
        pvalues=(*rare.pvalues[:2], 1),
        bounds=(*rare.bounds[:2], 1),
    )
    assert of_parts(part([0, 5, 13], 150, group="common"), empty).binding is empty
    assert certify([0]).binding is None


def test_where_every_level_passes_the_part_closest_to_its_alpha_binds():
    certificate = of_parts(part([0, 0], 90, loss="error"), part([0, 2], 90, loss="harm"))
    assert certificate.obstacle is None
    assert certificate.binding.name == "harm"


def test_levels_that_were_not_tested_are_told_by_their_values():
    nan = math.nan
    certificate = certify([0, 0, 60, 60])
    gaps = dataclasses.replace(
        certificate,
        risks=(0, nan, 0.3, nan),
        pvalues=(0, nan, 1, nan),
        bounds=(0.1, nan, 1, nan),
        rejected=(True, False, False, False),
    )
    assert certificate.tested == [0, 1, 2, 3]
    assert (gaps.tested, gaps.obstacle) == ([0, 2], 2)


def test_unmeasured_values_do_not_make_equal_certificates_differ():
    certificate = certify([0, 60], bounds=[0.1, np.nan])
    assert certificate == certify([0, 60], bounds=np.array([0.1, float("nan")]))
    unmeasured = dataclasses.replace(part([0, 5], 50, group="rare"), bounds=(0.1, np.nan))
    several = of_parts(part([0, 0], 50, group="common"), unmeasured)
    assert pickle.loads(pickle.dumps(several)).binding.name == several.binding.name


def test_contradictory_pruning_is_refused():
    pruning = pruning_of(small_network())
    with pytest.raises(ValueError, match="total is 5, but the shapes add up to 72"):
        dataclasses.replace(pruning, total=5)
    with pytest.raises(ValueError, match="name different parameters"):
        dataclasses.replace(pruning, parameters=("0.weight",))


# Files.

unit = st.floats(0, 1)
inner = st.floats(1e-12, 1 - 1e-12)


@st.composite
def certificates(draw) -> Certificate:
    """Any certificate: its fields agree in their form; the numbers are arbitrary."""
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
    n, delta = draw(st.integers(1, 2**60)), draw(inner)
    guarantee = draw(st.sampled_from(["risk", "monotone"] if levels > 1 else ["expectation"]))
    own = {
        "loss": draw(st.text(max_size=8)),
        "pvalue": "convex",
        "alpha": draw(inner),
        "risks": tuple(per_level(unit | st.just(math.nan))),
        "bounds": tuple(per_level(unit)),
    }
    parts = ()
    pvalues = tuple(per_level(unit))
    if draw(st.booleans()):
        counts = tuple(per_level(st.integers(0, n)))
        least = tuple(draw(st.floats(0, value)) for value in pvalues)
        parts = (
            Part(
                group=draw(st.none() | st.text(max_size=3)), counts=counts, pvalues=pvalues, **own
            ),
            Part("other", "betting", draw(inner), "g", counts, own["bounds"], least, own["risks"]),
        )
    looks = None
    if draw(st.booleans()) and guarantee == "risk":
        sizes = tuple(sorted({n, *draw(st.sets(st.integers(1, n), max_size=3))}))
        seen = tuple(per_level(st.integers(0, n)))
        looks = Looks(
            sizes=sizes,
            spending=(delta / len(sizes),) * len(sizes),
            seen=seen,
            evaluations=sum(seen) + draw(st.integers(0, 5)),
            saved=draw(unit),
            order=draw(st.sampled_from(["permuted", "given"])),
        )
    selective = draw(st.booleans())
    return Certificate(
        sparsities=tuple(sorted(grid)),
        delta=None if guarantee == "expectation" else delta,
        n=n,
        procedure="fixed_sequence",
        pvalues=pvalues,
        rejected=tuple(per_level(st.booleans())),
        pruning=pruning,
        seed=draw(st.integers()) if looks is not None else draw(st.none() | st.integers()),
        notes=tuple(draw(st.lists(st.text(max_size=9), max_size=2))),
        versions=draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)),
        guarantee=guarantee,
        parts=parts,
        looks=looks,
        accept="sure" if selective else None,
        acceptance=tuple(per_level(unit | st.just(math.nan))) if selective else None,
        **own,
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


def test_unmeasured_values_of_parts_and_of_the_acceptance_are_null_too(tmp_path):
    path = tmp_path / "certificate.json"
    rare = dataclasses.replace(part([0, 5], 50, group="rare"), risks=(math.nan, 0.1))
    several = of_parts(part([0, 0], 50, group="common"), rare)
    several = dataclasses.replace(several, accept="sure", acceptance=(0.5, np.nan))
    several.save(path)
    content = json.loads(path.read_text())
    assert content["parts"][1]["risks"] == [None, 0.1]
    assert content["acceptance"] == [0.5, None]
    assert Certificate.load(path) == several


def test_values_of_array_libraries_are_written_as_plain_numbers(tmp_path):
    path = tmp_path / "certificate.json"
    looks = Looks(
        np.array([90]), np.array([0.1]), np.array([90]), np.int64(90), np.float64(0), "given"
    )
    arrays = {"counts": np.array([90]), "risks": np.zeros(1), "alpha": np.float32(0.5)}
    several = of_parts(*(dataclasses.replace(part([0], 90, loss=x), **arrays) for x in "ab"))
    dataclasses.replace(several, looks=looks, seed=np.int64(3)).save(path)
    assert Certificate.load(path).looks == looks


def test_a_guarantee_in_expectation_has_no_delta_in_the_file(tmp_path):
    path = tmp_path / "certificate.json"
    controlled([0], "expectation").save(path)
    assert json.loads(path.read_text())["delta"] is None
    assert Certificate.load(path).delta is None
    assert dataclasses.replace(controlled([0], "expectation"), delta=math.nan).delta is None


def test_the_file_tells_its_schema_and_the_outcome(tmp_path):
    path = tmp_path / "certificate.json"
    certify([0, 60], sparsities=[0.5, 0.9]).save(path)
    content = json.loads(path.read_text())
    assert content["schema"] == "confprune-certificate/1"
    assert (content["certified"], content["level"], content["sparsity"]) == (True, 0, 0.5)


def saved(tmp_path, **fields) -> tuple[os.PathLike[str], dict]:
    path = tmp_path / "certificate.json"
    settings = {"sparsities": [0.5, 0.9], "pruning": pruning_of(small_network())}
    looks = Looks((50, 200), (0.05, 0.05), (50, 200), 250, 0.375, "permuted")
    certify([0, 60], **settings, looks=looks, seed=1, **fields).save(path)
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
        (lambda c: c.update(trust=1), "the field trust is unknown: a newer version"),
        (lambda c: c.update(looks=[1]), "looks is a list, not an object"),
        (
            lambda c: c["looks"].update(sizes=[1.5]),
            "the field looks.sizes is a number, not a whole",
        ),
        (lambda c: c["looks"].update(order="x"), "looks: order is 'x'"),
        (lambda c: c.update(parts=[3]), "parts is a number, not an object"),
        (lambda c: c.update(parts=None), "the field parts is null, not a list"),
        (lambda c: c.update(guarantee="x"), "guarantee is 'x'"),
        (lambda c: c.update(acceptance=["x"]), "the field acceptance is text, not a number"),
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
    with pytest.raises(IsADirectoryError, match="it is a folder; name a file"):
        certify([0]).save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_is_no_network_is_refused():
    certificate = certify([0], pruning=pruning_of(small_network()))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        certificate.prune({})


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
