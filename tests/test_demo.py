"""The demonstration keeps its promise, and says what it needs."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import confprune
from confprune import demo


def test_demo_writes_a_certified_network_that_keeps_the_promise(tmp_path):
    command = [sys.executable, "-m", "confprune", "demo", "--quiet"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    written = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert written == ["certificate.json", "pruned.safetensors", "risk.png"]

    certificate = confprune.Certificate.load(tmp_path / "demo/certificate.json")
    assert certificate.certified
    assert certificate.sparsity >= 0.5
    assert certificate.looks is None  # the whole curve
    assert run.stdout.startswith(str(certificate))
    assert "kept" in run.stdout
    assert "not kept" not in run.stdout
    assert "Early looks, the default of calibrate, take" in " ".join(run.stdout.split())
    assert (tmp_path / "demo/risk.png").read_bytes().startswith(b"\x89PNG")

    net = demo.DigitNet()
    weights = load_file(tmp_path / "demo/pruned.safetensors")
    net.load_state_dict(weights)
    prunable = [weights[name] for name in certificate.pruning.parameters]
    zeros = sum(int((weight == 0).sum()) for weight in prunable)
    assert zeros == round(certificate.sparsity * certificate.pruning.total)
    _, _, test = demo._digits(seed=0)
    accuracy = (net.eval()(test.images).argmax(1) == test.digits).float().mean()
    assert accuracy > 0.9


def test_demo_leaves_the_random_state_alone(tmp_path, capsys):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    demo.run(tmp_path, epochs=1, alpha=0.9, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_a_broken_promise_is_said_plainly():
    test = demo.Examples(torch.eye(4), torch.arange(4))
    wrong = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        wrong.weight.copy_(torch.eye(4).roll(1, 0))
    losses = torch.zeros(99, 1)
    certificate = confprune.calibrate_losses(losses, [0.5], alpha=0.05, delta=0.1)
    text = demo._held_out(torch.nn.Identity(), wrong, test, certificate)
    assert "disagreement  1.0000, promised at most 0.05: not kept" in text
    assert "1.0000 full, 0.0000 pruned" in text


def test_digits_are_split_without_overlap():
    training, calibration, test = demo._digits(seed=3)
    sizes = [len(part.digits) for part in (training, calibration, test)]
    assert sizes == [600, 700, 497]
    # Whatever the seed, the parts together are the whole: nothing is in two of them.
    wholes = [torch.cat([part.images for part in demo._digits(seed)]) for seed in (3, 4)]
    first, second = (whole.flatten(1).sum(1).sort().values for whole in wholes)
    assert torch.equal(first, second)
    assert not torch.equal(*wholes)
    assert (wholes[0].min(), wholes[0].max()) == (0, 1)


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn.datasets", "scikit-learn"), ("matplotlib", "matplotlib")]
)
def test_missing_packages_are_named(tmp_path, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install {package}"):
        demo.run(tmp_path / "demo", progress=False)
    assert not (tmp_path / "demo").exists()


def test_out_must_not_be_a_file(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        demo.run(tmp_path / "demo", progress=False)
