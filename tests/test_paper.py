"""The paper's experiments: what is drawn from tables is what the library certifies; the report."""

from __future__ import annotations

import functools
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import benchmarks.paper.__main__ as command
import confprune
from benchmarks.paper import data, experiments, tasks
from benchmarks.paper.data import Examples, Source
from benchmarks.paper.networks import Trained, classification_loss, segmentation_loss, train
from benchmarks.paper.sizes import DEFAULT, QUICK, Part, Sizes
from benchmarks.paper.tables import (
    EARLY,
    METHODS,
    ONE_TEST,
    PAPER,
    Question,
    certify,
    certify_best,
    joined,
    make_table,
    shuffled,
)
from confprune.batches import random_order
from confprune.losses import BUILT_IN, Reference

WALKTHROUGH = Path(command.__file__).with_name("walkthrough.py")

TINY = Sizes(
    classification=Part(training=100, pool=240, scoring=20, epochs=1, levels=5),
    segmentation=Part(training=30, pool=60, scoring=8, epochs=1, levels=4),
    pixels=16,
    splits=4,
    curve_splits=3,
)


# Tables against the library.

POOL = 500


@functools.cache
def trained() -> tuple[nn.Module, Examples]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 4))
    inputs = torch.randn(POOL, 12)
    targets = (inputs[:, :4] + 0.2 * torch.randn(POOL, 4)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    groups = np.array([str(int(target) % 2) for target in targets])
    return model.eval(), Examples(inputs, targets, groups)


SOFT = BUILT_IN["soft_disagreement"]
QUESTIONS = {
    "labels": Question("labels", BUILT_IN["error"], False, 0.2, ()),
    "full network": Question("full network", BUILT_IN["disagreement"], False, 0.1, ()),
    "selective": Question("selective", BUILT_IN["disagreement"], True, 0.1, ()),
    "not binary": Question("not binary", SOFT, False, 0.1, ()),
}


def table_of(levels: confprune.PruneLevels):
    model, pool = trained()
    losses = [BUILT_IN["error"], BUILT_IN["disagreement"], SOFT]
    accept = confprune.confident(0.7, of="pruned")
    return make_table(model, pool, levels, losses, accept, levels.total, progress=False)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_table_certifies_what_calibrate_does(question, method, grouped, one_thread):
    model, pool = trained()
    asked = QUESTIONS[question]
    grid = [j / 12 for j in range(12)]
    table = table_of(confprune.prune_levels(model, grid))
    index = random_order(pool.inputs, 5).numpy()
    names = ["0", "1"] if grouped else None
    level = certify(table, asked, index, asked.alpha, 0.1, method, names)
    certificate = confprune.calibrate(
        model,
        (pool.inputs, pool.targets),
        loss=asked.loss,
        alpha=asked.alpha,
        delta=0.1,
        sparsities=grid,
        accept=confprune.confident(0.7, of="pruned") if asked.selective else None,
        groups=(lambda batch: (batch[1] % 2).tolist()) if grouped else None,
        pvalue="hoeffding_bentkus" if method is PAPER else "auto",
        looks="auto" if method is EARLY else None,
        seed=5,
        progress=False,
    )
    assert certificate.certified
    assert level == certificate.level


def test_a_table_of_several_ways_chooses_as_calibrate_does(one_thread):
    model, pool = trained()
    asked = QUESTIONS["full network"]
    grid = [j / 20 for j in range(20)]
    names = ["magnitude", "lamp", "random"]
    tables = [table_of(confprune.prune_levels(model, grid, criterion=name)) for name in names]
    index = random_order(pool.inputs, 2).numpy()
    chosen = certify_best(joined(tables), asked, index, asked.alpha, 0.1, ONE_TEST)
    certificate = confprune.calibrate(
        model,
        pool.inputs,
        loss="disagreement",
        alpha=asked.alpha,
        delta=0.1,
        sparsities=grid,
        criterion=names,
        looks=None,
        seed=2,
        progress=False,
    )
    assert certificate.certified
    assert (names[chosen // 20], chosen % 20) == (certificate.pruning.criterion, certificate.level)


def test_too_few_images_certify_nothing():
    table = table_of(confprune.prune_levels(trained()[0], [0.0, 0.5]))
    asked = QUESTIONS["full network"]
    for method in METHODS:
        assert certify(table, asked, np.arange(21), 0.1, 0.1, method) is None
    assert certify_best(table, asked, np.arange(26), 0.1, 0.1, PAPER) is None
    assert certify_best(table, QUESTIONS["selective"], np.arange(200), 0.1, 0.1, PAPER) is not None


def test_the_risks_of_a_table_are_means_of_what_counts():
    table = table_of(confprune.prune_levels(trained()[0], [0.0, 0.3, 0.5]))
    index = shuffled(POOL, (1, 2))[:100]
    matrix = table.losses["disagreement"][index]
    np.testing.assert_allclose(
        table.risks(QUESTIONS["full network"], index), matrix.mean(0), rtol=1e-6
    )
    accepted = table.accepted[index]
    expected = [matrix[accepted[:, j], j].mean() for j in range(3)]
    np.testing.assert_allclose(table.risks(QUESTIONS["selective"], index), expected, rtol=1e-6)


# The losses of segmentation.


def test_the_questions_of_segmentation_differ_in_what_they_compare_with():
    full = torch.tensor([[[[3.0, 3.0], [-3.0, -3.0]]]])
    pruned = torch.tensor([[[[3.0, 0.1], [-3.0, 3.0]]]])
    masks = torch.tensor([[[[1, 0], [0, 0]]]])
    reference = Reference(full, masks)
    labels, against_full, selective = tasks.SEGMENTER_QUESTIONS
    assert labels.loss(pruned, reference).item() == pytest.approx(1 - 2 / 4)
    assert against_full.loss(pruned, reference).item() == pytest.approx(1 - 4 / 5)
    assert selective.selective
    assert tasks._accepted_masks(full, reference).tolist() == [1]
    assert tasks._accepted_masks(pruned, reference).tolist() == [0]  # 0.95, 0.52 and 0.95
    nothing = torch.full((1, 1, 2, 2), -1.0)
    assert tasks._accepted_masks(nothing, reference).tolist() == [0]  # nothing to be sure of


def test_the_training_objectives_fall_with_better_answers():
    masks = torch.tensor([[[[1, 0], [0, 0]]]])
    good, bad = (torch.where(masks == 1, sign * 4.0, -sign * 4.0) for sign in (1, -1))
    assert segmentation_loss(good, masks) < 0.2 < segmentation_loss(bad, masks)
    assert classification_loss(torch.eye(3) * 9, torch.arange(3)) < 0.01


def test_training_is_repeatable_and_followed():
    def once() -> Trained:
        return train(
            lambda: nn.Linear(4, 2),
            torch.ones(20, 4),
            torch.arange(20) % 2,
            classification_loss,
            epochs=4,
            batch=5,
            rate=0.1,
            seed=3,
            title="",
            progress=False,
        )

    first, second = once(), once()
    assert torch.equal(first.model.weight, second.model.weight)
    assert not first.model.training
    assert first.deviations["weight"].min() > 0


# The whole.


def drawn(folder: Path, *arguments: str) -> tuple[str, dict]:
    assert command.main(["--out", str(folder), "--quick", "--quiet", *arguments]) == 0
    report = (folder / "report.md").read_text(encoding="utf-8")
    return report, json.loads((folder / "numbers.json").read_text(encoding="utf-8"))


def undrawn(numbers, folder, stem):
    kinds = ("curves", "against", "splits", "groups", "criteria")
    return {kind: f"{stem}-{kind}.png" for kind in kinds}


def drawn_for_one(numbers, folder, stem, draw=command.figures.draw):
    """Draw for one network: the figures of the others are made in the same way."""
    return (draw if stem == "u-net" else undrawn)(numbers, folder, stem)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "QUICK", TINY)
        # A memory for the whole process is not for tests.
        patch.setattr(command, "remember_pure_functions", lambda: None)
        patch.setattr(experiments, "DELTAS", (0.1,))
        patch.setattr(command.figures, "draw", drawn_for_one)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        report, numbers = drawn(folder)
        torch.set_num_threads(threads)
    return folder, report, numbers


def test_the_same_seed_gives_the_same_numbers(outcome, monkeypatch, one_thread):
    monkeypatch.setattr(experiments, "DELTAS", (0.1,))
    source = data.classification(None, TINY, seed=0)
    task = tasks.classifier("small CNN", source, TINY.classification, 0, progress=False)
    again = experiments.run(task, TINY, 0, progress=False)
    assert json.loads(json.dumps(again)) == outcome[2]["networks"][1]


def test_the_report_holds_every_experiment_of_every_network(outcome):
    folder, report, numbers = outcome
    names = [network["network"] for network in numbers["networks"]]
    assert names == ["LeNet-300-100", "small CNN", "U-Net"]
    for network in numbers["networks"]:
        assert list(network["curves"]) == list(network["splits"])
        assert list(network["curves"]) == ["labels", "full network", "selective"]
        for splits in network["splits"].values():
            assert list(splits["methods"]) == [method.name for method in METHODS]
            for row in splits["methods"].values():
                assert len(row["sparsities"]) == len(row["test_risks"]) == TINY.splits
        assert {row["variable"] for row in network["against"]["rows"]} == {"n", "delta", "alpha"}
        assert list(network["groups"]["rows"]) == ["average certified", "every group certified"]
        assert list(network["criteria"]["rows"])[-1] == "all, one certified choice"
        assert len(network["criteria"]["rows"]) == 12
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", report)
    assert len(pictures) == 3 * 5 + 1
    for _, file in pictures:
        if "u-net" in file:
            assert (folder / file).read_bytes().startswith(b"\x89PNG")


def test_stand_ins_are_labelled_in_every_table_and_figure(outcome):
    _, report, numbers = outcome
    assert "**Stand-ins.**" in report
    assert all(network["stand_in"] for network in numbers["networks"])
    for label, _ in re.findall(r"!\[(.*?)\]\((.*?)\)", report):
        assert "(stand-in)" in label
    before_tables = re.findall(r"^(.*)\n\n\|", report, re.MULTILINE)
    assert len(before_tables) == 3 * 5
    assert all("(stand-in)" in line for line in before_tables)


def test_real_data_is_not_called_a_stand_in(tmp_path, monkeypatch, one_thread):
    def mnist(folder: Path | None, sizes: Sizes, seed: int) -> Source:
        _, pool = trained()
        squares = Examples(pool.inputs.view(-1, 1, 3, 4), pool.targets, pool.groups)
        return Source("MNIST", False, *(squares.take(slice(size)) for size in (90, 20, 200)))

    def images(folder: Path | None, sizes: Sizes, seed: int, *, progress: bool) -> Source:
        some = Examples(
            torch.rand(60, 3, 16, 16), torch.randint(0, 2, (60, 1, 16, 16)), np.array(["A"] * 60)
        )
        return Source("images in here", False, some, some.take(slice(5)), some)

    state = tasks.UNet(width=2)
    for module in state.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight)
    torch.save(state.state_dict(), tmp_path / "unet.pt")
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(command, "remember_pure_functions", lambda: None)
    monkeypatch.setattr(command.data, "classification", mnist)
    monkeypatch.setattr(command.data, "segmentation", images)
    monkeypatch.setattr(command.figures, "draw", undrawn)
    monkeypatch.setattr(command.figures, "masks", lambda *_: "masks.png")
    monkeypatch.setattr(command, "NETWORKS", ("LeNet-300-100", "U-Net"))
    arguments = ["--checkpoint", str(tmp_path / "unet.pt"), "--data", str(tmp_path)]
    report, numbers = drawn(tmp_path / "out", *arguments)
    assert "tand-in" not in report
    assert "magnitude and uncertainty needs the training" in " ".join(report.split()).lower()
    unet = numbers["networks"][-1]
    assert "magnitude and uncertainty" not in unet["criteria"]["rows"]
    assert unet["groups"]["groups"] == ["A"]


def test_the_sizes_are_those_that_are_promised():
    assert QUICK.splits >= 100
    assert DEFAULT.splits >= 100
    assert QUICK.pixels % 8 == DEFAULT.pixels % 8 == 0


# The walkthrough.


def test_the_walkthrough_runs_from_training_to_a_file(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(WALKTHROUGH))
    assert names["certificate"].certified
    written = {path.name for path in (tmp_path / "walkthrough").iterdir()}
    files = {"certificate.json", "pruned.safetensors", "compressed.safetensors"}
    assert written == {"curve.png", "risk.png", *files}
    text = capsys.readouterr().out
    assert "Certified: " in text
    assert float(names["changed"]) <= names["certificate"].alpha
    sparse: Tensor = names["sparse"][1].weight
    assert (sparse == 0).any()
    assert names["best"].pruning.criterion in names["criteria"].CRITERIA
