"""Criteria and patterns from the command line, and in files of weights."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import confprune
from confprune import checkpoint
from confprune.cli import main

PROJECT = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

def data():
    torch.manual_seed(1)
    return torch.randn(500, 8)

def others():
    torch.manual_seed(2)
    return torch.randn(60, 8)
"""

CALIBRATE = [
    *("calibrate", "--model=project:model", "--data=project:data", "--quiet", "--out=out"),
    *("--loss=disagreement", "--alpha=0.3", "--delta=0.1"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch, one_thread):
    (tmp_path / "project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("project", None)


def pruning(folder):
    return json.loads((folder / "out/certificate.json").read_text())["pruning"]


def test_calibrate_takes_criteria_patterns_and_score_data(folder, capsys):
    assert main([*CALIBRATE, "--criterion=wanda", "--score-data=project:others"]) == 0
    found = pruning(folder)
    assert (found["criterion"], found["scope"], found["pattern"]) == ("wanda", "row", None)
    assert found["score_data"] == {"source": "given", "examples": 60}
    assert main([*CALIBRATE, "--criterion", "lamp", "random(seed=2)", "--pattern", "2x2"]) == 0
    assert (pruning(folder)["criterion"], pruning(folder)["pattern"]) == ("lamp", "2x2")
    assert main([*CALIBRATE, "--pattern", "none", "rows"]) == 0
    assert pruning(folder)["pattern"] is None


def test_prune_takes_criteria_and_patterns(folder, capsys):
    weight = torch.randn(8, 12)
    save_file({"layer.weight": weight}, "model.safetensors")
    prune = ["prune", "model.safetensors", "--sparsity=0.5", "--out=pruned.safetensors"]
    assert main([*prune, "--pattern=N:4"]) == 0
    assert set(
        (load_file("pruned.safetensors")["layer.weight"] == 0).view(-1, 4).sum(1).tolist()
    ) == {2}
    assert main([*prune, "--criterion=magnitude(min_per_layer=48)", "--pattern=none"]) == 0
    assert "pruned 48 of 96 weights" in capsys.readouterr().out
    assert main([*prune, "--criterion=magnitude(min_per_layer=49)"]) == 2
    assert "the largest possible sparsity is 0.4895" in capsys.readouterr().err
    assert main([*prune, "--criterion=wanda"]) == 2
    assert "needs the statistic 'input_norm'" in capsys.readouterr().err


def test_a_certificate_prunes_a_file_in_its_pattern(folder):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt2 = Conv1D(6, 8)
            self.up = nn.ConvTranspose1d(6, 4, 3, groups=2)

        def forward(self, x):
            return self.up(self.gpt2(x).unsqueeze(-1)).flatten(1)

    model = Mixed()
    certificate = confprune.calibrate(
        model,
        torch.randn(300, 8),
        loss="disagreement",
        alpha=0.4,
        delta=0.1,
        pattern="rows",
        progress=False,
    )
    assert certificate.certified
    assert certificate.pruning.inputs_first == {"gpt2.weight": 1, "up.weight": 2}
    save_file(model.state_dict(), "model.safetensors")
    checkpoint.prune("model.safetensors", "pruned.safetensors", certificate=certificate)
    expected = certificate.prune(model).state_dict()
    found = load_file("pruned.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any((found["gpt2.weight"] == 0).all(0)) or any((found["up.weight"] == 0).all(-1).all(0))


def test_a_file_does_not_hold_statistics(folder):
    assert main([*CALIBRATE, "--criterion=wanda"]) == 0
    certificate = confprune.Certificate.load("out/certificate.json")
    import project

    save_file(project.model().state_dict(), "model.safetensors")
    with pytest.raises(ValueError, match=r"'wanda' needs more than the weights.*certificate.prune"):
        checkpoint.prune("model.safetensors", "pruned.safetensors", certificate=certificate)
