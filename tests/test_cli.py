"""The command line, as a user runs it."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import confprune
from confprune.arguments import parser
from confprune.cli import COMMANDS, main

PROJECT = '''
import os
import signal
import warnings

import numpy as np
import torch
from torch import nn


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))


class Tied(nn.Module):
    """An embedding whose matrix is the output layer's too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(12, 8)
        self.middle = nn.Linear(8, 8)
        self.output = nn.Linear(8, 12, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(torch.relu(self.middle(self.embedding(tokens).mean(1))))


def inputs():
    torch.manual_seed(2)
    return torch.randn(300, 16)


def few():
    return inputs()[:44]


def with_random_labels():
    return inputs(), torch.randint(0, 4, (300,))


def labelled():
    torch.manual_seed(2)
    return torch.randn(300, 16), torch.arange(300) % 2


def batches():
    return [inputs()[:150], inputs()[150:]]


def outdated():
    warnings.warn("use the new data", FutureWarning)
    return inputs()


def halves(batch):
    return ["positive" if first > 0 else "negative" for first in batch[:, 0]]


def tokens():
    torch.manual_seed(2)
    return torch.randint(0, 12, (300, 5))


class Interrupted(torch.utils.data.Dataset):
    """As if the user pressed Ctrl-C while the tenth example is read."""

    read = 0

    def __len__(self):
        return 300

    def __getitem__(self, index):
        self.read += 1
        if self.read == 10:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
        return torch.zeros(16)


def broken():
    raise KeyError("no such file")


def never_disagrees(outputs, reference):
    return torch.zeros(len(outputs))


def only_the_first(pvalues, delta):
    return (np.arange(len(pvalues)) == 0) & (pvalues <= delta)


wrong_size = torch.zeros(300, 3)
number = 3
'''

MODEL, DATA = "--model=project:model", "--data=project:inputs"
LABELLED = "--data=project:labelled"
ONE_RISK = ["--alpha=0.1", "--loss=disagreement"]
CALIBRATE = ["calibrate", *ONE_RISK, "--delta=0.1", "--quiet"]
PLAN = ["plan", "--alpha=0.05", "--delta=0.1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a module of factories in it."""
    (tmp_path / "project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("project", None)


@pytest.fixture
def project(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    import project

    return project


def confprune_process(*arguments):
    """Run the command in a process of its own, from the working folder."""
    return subprocess.run(
        [sys.executable, "-m", "confprune", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def refusal(capsys, *arguments):
    """Run a command that must fail on its input; return its message, which is one line."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("confprune")
    return line


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


# Every command in a process of its own.


def test_calibrate_writes_certificate_picture_and_pruned_weights(folder, project):
    run = confprune_process(*CALIBRATE, MODEL, DATA, "--out=out")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert files(folder / "out") == ["certificate.json", "pruned.safetensors", "risk.png"]
    certificate = confprune.Certificate.load("out/certificate.json")
    assert certificate.certified
    assert certificate.sparsity > 0
    assert run.stdout.strip() == str(certificate)
    assert (folder / "out/risk.png").read_bytes().startswith(b"\x89PNG")
    expected = certificate.prune(project.model()).state_dict()
    pruned = load_file("out/pruned.safetensors")
    assert pruned.keys() == expected.keys()
    assert all(torch.equal(pruned[name], expected[name]) for name in expected)
    assert float(metadata("out/pruned.safetensors")["confprune.sparsity"]) == certificate.sparsity


def test_prune_applies_a_certificate_to_a_file(folder, project):
    model = project.model()
    save_file(model.state_dict(), "model.safetensors", {"format": "pt", "made by": "us"})
    certificate = confprune.calibrate(
        model, project.inputs(), loss="disagreement", alpha=0.1, delta=0.1, progress=False
    )
    certificate.save("certificate.json")
    run = confprune_process(
        "prune", "model.safetensors", "--certificate=certificate.json", "--out=pruned.safetensors"
    )
    assert run.returncode == 0, run.stderr
    assert "pruned.safetensors" in run.stdout
    expected = certificate.prune(model).state_dict()
    pruned = load_file("pruned.safetensors")
    assert all(torch.equal(pruned[name], expected[name]) for name in expected)
    kept = metadata("pruned.safetensors")
    assert kept["made by"] == "us"
    assert float(kept["confprune.sparsity"]) == certificate.sparsity


def test_report_prints_what_the_certificate_says(folder, project):
    certificate = confprune.calibrate(
        project.model(), project.inputs(), loss="disagreement", alpha=0.1, delta=0.1, progress=False
    )
    certificate.save("certificate.json")
    run = confprune_process("report", "certificate.json")
    assert (run.returncode, run.stdout.strip()) == (0, str(certificate))


def test_nothing_certified_is_exit_code_3_and_leaves_a_full_network(folder, project):
    run = confprune_process(
        *CALIBRATE, MODEL, "--data=project:with_random_labels", "--loss=error", "--out=out"
    )
    assert run.returncode == 3, run.stderr
    assert "Nothing is certified" in run.stdout
    assert run.stderr.startswith("confprune calibrate: warning: nothing was certified")
    assert len(run.stderr.splitlines()) == 1
    assert not confprune.Certificate.load("out/certificate.json").certified
    full = project.model().state_dict()
    written = load_file("out/pruned.safetensors")
    assert all(torch.equal(written[name], full[name]) for name in full)
    assert metadata("out/pruned.safetensors")["confprune.certified"] == "false"

    save_file(full, "model.safetensors")
    run = confprune_process(
        "prune", "model.safetensors", "--certificate=out/certificate.json", "--out=new.safetensors"
    )
    assert run.returncode == 3
    assert "certifies no sparsity" in run.stderr
    assert not (folder / "new.safetensors").exists()


def test_interruption_is_exit_code_130_and_leaves_files_as_they_were(folder):
    (folder / "out").mkdir()
    (folder / "out/certificate.json").write_text("of last time")
    before = files(folder)
    run = confprune_process(*CALIBRATE, MODEL, "--data=project:Interrupted", "--out=out")
    assert run.returncode == 130
    assert run.stderr == "confprune calibrate: interrupted\n"
    assert files(folder) == before
    assert files(folder / "out") == ["certificate.json"]
    assert (folder / "out/certificate.json").read_text() == "of last time"


@pytest.mark.parametrize("command", ["demo", "plan", "calibrate", "prune", "report"])
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    examples = re.split(r"examples?:\n", capsys.readouterr().out)[1].replace("\\\n", "")
    for example in examples.strip().splitlines():
        assert parser().parse_args(shlex.split(example)[1:]).command == command


def test_every_option_has_help():
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) == set(COMMANDS)
    for command in commands.choices.values():
        assert all(action.help for action in command._actions)


def test_version_is_the_packages():
    run = confprune_process("--version")
    assert (run.returncode, run.stdout) == (0, f"confprune {confprune.__version__}\n")


# calibrate


def test_weights_are_loaded_before_calibration(folder, project, capsys):
    weights = {name: torch.randn_like(w) for name, w in project.model().state_dict().items()}
    save_file(weights, "weights.safetensors")
    assert main([*CALIBRATE, MODEL, DATA, "--weights=weights.safetensors", "--out=out"]) == 0
    kept = load_file("out/pruned.safetensors")["0.weight"]
    assert torch.equal(kept, weights["0.weight"].where(kept != 0, 0))


def test_grid_and_settings_reach_the_certificate(folder, capsys):
    grid = ["--sparsities=0.1:0.5:5", "--scope=layer", "--pvalue=hoeffding", "--seed=7"]
    more = ["--procedure=bonferroni", "--batch-size=50", "--device=cpu"]
    assert main([*CALIBRATE, MODEL, DATA, *grid, *more, "--out=out"]) == 0
    certificate = confprune.Certificate.load("out/certificate.json")
    assert certificate.sparsities == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert certificate.pruning.scope == "layer"
    assert (certificate.pvalue, certificate.procedure) == ("hoeffding", "bonferroni")
    assert certificate.seed == 7


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["--exclude=2.*"], ("0.weight",)),
        (["--include=*.bias", "--include=0.*"], ("0.weight", "0.bias", "2.bias")),
        (["--include=*.weight", "--exclude=0.*"], ("2.weight",)),
    ],
)
def test_patterns_choose_the_parameters(folder, capsys, patterns, names):
    certificate = calibrated(*ONE_RISK, "--delta=0.1", DATA, *patterns)
    assert certificate.pruning.parameters == names


def test_a_tied_parameter_goes_by_all_its_names(folder, capsys):
    tied = ["--model=project:Tied", "--data=project:tokens", *ONE_RISK, "--delta=0.1"]
    assert calibrated(*tied, "--exclude=output.*").pruning.parameters == ("middle.weight",)
    assert calibrated(*tied, "--include=output.*").pruning.parameters == ("embedding.weight",)


def test_sparsities_may_be_a_list(folder, capsys):
    assert main([*CALIBRATE, MODEL, DATA, "--sparsities=0,0.25", "--out=out"]) == 0
    assert confprune.Certificate.load("out/certificate.json").sparsities == (0, 0.25)


def test_loss_may_be_a_function_of_ones_own(folder, capsys):
    loss = "--loss=project:never_disagrees"
    assert main([*CALIBRATE, MODEL, DATA, loss, "--sparsities=0.5,0.9", "--out=out"]) == 0
    assert confprune.Certificate.load("out/certificate.json").sparsity == 0.9


def calibrated(*arguments):
    """The certificate that the command line writes, with the promise given in full."""
    assert main(["calibrate", MODEL, "--quiet", "--out=out", *arguments]) == 0
    return confprune.Certificate.load("out/certificate.json")


def test_nothing_of_an_older_certificate_stays(folder, capsys):
    calibrated(*ONE_RISK, "--delta=0.1", DATA, "--compress")
    assert (folder / "out" / "compressed.safetensors").exists()
    calibrated("--alpha=0.3", "--loss=disagreement", "--delta=0.1", DATA)
    assert not (folder / "out" / "compressed.safetensors").exists()
    assert (folder / "out" / "pruned.safetensors").exists()


def test_looks_are_early_unless_switched_off(folder, capsys):
    arguments = [*ONE_RISK, "--delta=0.1", DATA]
    assert calibrated(*arguments).looks.saved > 0
    assert calibrated(*arguments, "--looks=none").looks is None


def test_several_risks_are_kept_at_once(folder, capsys):
    risks = ["--risk=disagreement=0.2", "--risk=project:never_disagrees=0.1"]
    certificate = calibrated(*risks, "--delta=0.1", DATA)
    assert [(part.loss, part.alpha) for part in certificate.parts] == [
        ("disagreement", 0.2),
        ("never_disagrees", 0.1),
    ]
    assert "expected disagreement" in metadata("out/pruned.safetensors")["confprune.promise"]
    assert "never_disagrees" in metadata("out/pruned.safetensors")["confprune.promise"]


@pytest.mark.parametrize(
    ("data", "key", "names"),
    [
        (LABELLED, "targets", ["0", "1"]),
        (DATA, "project:halves", ["negative", "positive"]),
    ],
)
def test_groups_are_a_key_or_a_function(folder, capsys, data, key, names):
    certificate = calibrated(*ONE_RISK, "--delta=0.1", data, f"--groups={key}")
    assert [part.group for part in certificate.parts] == names


@pytest.mark.parametrize(("option", "whose"), [([], "full"), (["--accept-of=pruned"], "pruned")])
def test_confident_predictions_alone_may_count(folder, capsys, option, whose):
    certificate = calibrated(*ONE_RISK, "--delta=0.1", DATA, "--accept-confidence=0.3", *option)
    assert certificate.accept == f"confidence of the {whose} network >= 0.3"


def test_guarantee_in_expectation_has_no_delta(folder, capsys):
    certificate = calibrated(*ONE_RISK, DATA, "--guarantee=expectation")
    assert (certificate.guarantee, certificate.delta) == ("expectation", None)


def test_guarantee_of_the_monotone_risk(folder, capsys):
    certificate = calibrated(*ONE_RISK, "--delta=0.1", DATA, "--guarantee=monotone")
    assert certificate.procedure == "rcps"


@pytest.mark.parametrize(
    "scopes", [["--scope", "global", "layer"], ["--scope=global", "--scope=layer"]]
)
def test_of_several_scopes_the_best_is_taken(folder, capsys, scopes):
    certificate = calibrated(*ONE_RISK, "--delta=0.1", DATA, *scopes)
    assert certificate.procedure == "split_fixed_sequence"
    assert "magnitude (global), magnitude (layer)" in " ".join(certificate.notes)


def test_an_order_is_taken_for_random_when_told_so(folder, capsys):
    arguments = [*ONE_RISK, "--delta=0.1", "--data=project:batches"]
    assert calibrated(*arguments).looks is None
    capsys.readouterr()
    assert calibrated(*arguments, "--order=given").looks.order == "given"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("confprune calibrate: warning: the order of the examples")


def test_warnings_of_others_are_shown_as_they_are(folder, capsys):
    with pytest.warns(FutureWarning, match="use the new data"):
        calibrated(*ONE_RISK, "--delta=0.1", "--data=project:outdated")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --loss and --alpha, or --risk"),
        (["--loss=error", "--delta=0.1"], "give --loss and --alpha, or --risk"),
        ([*ONE_RISK, "--risk=harm=0.1", "--delta=0.1"], "--risk LOSS=ALPHA takes the place"),
        (["--risk=harm", "--delta=0.1"], "argument --risk: must read LOSS=ALPHA"),
        (["--risk=harm=2", "--delta=0.1"], "argument --risk: must be a number between 0 and 1"),
        (["--risk=harm=0.1", "--risk=harm=0.2", "--delta=0.1"], "'harm' twice"),
        ([*ONE_RISK], "give --delta"),
        ([*ONE_RISK, "--delta=0.1", "--guarantee=expectation"], "leave --delta out"),
        ([*ONE_RISK, "--guarantee=hope"], "argument --guarantee: invalid choice"),
        (
            [*ONE_RISK, "--delta=0.1", "--guarantee=monotone", "--groups=targets"],
            "leave out groups",
        ),
        ([*ONE_RISK, "--delta=0.1", "--accept-of=pruned"], "--accept-of goes with"),
        ([*ONE_RISK, "--delta=0.1", "--accept-confidence=1"], "argument --accept-confidence"),
        ([*ONE_RISK, "--delta=0.1", "--groups=age"], "groups='age' names a key"),
        ([*ONE_RISK, "--delta=0.1", "--groups=project:nothing"], "--groups project:nothing was"),
        ([*ONE_RISK, "--delta=0.1", "--looks=often"], "argument --looks: invalid choice"),
        ([*ONE_RISK, "--delta=0.1", "--scope", "global", "wide"], "scope"),
    ],
)
def test_contradictions_are_refused(folder, capsys, arguments, message):
    before = files(folder)
    assert message in refusal(capsys, "calibrate", MODEL, DATA, "--quiet", "--out=out", *arguments)
    assert files(folder) == before


def test_procedure_may_be_a_function_of_ones_own(folder, capsys):
    arguments = [
        *ONE_RISK,
        "--delta=0.1",
        DATA,
        "--procedure=project:only_the_first",
        "--looks=none",
    ]
    certificate = calibrated(*arguments)
    assert certificate.procedure == "only_the_first"
    assert certificate.rejected == (True, *[False] * 99)


def test_picture_is_left_out_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*CALIBRATE, MODEL, DATA, "--out=out"]) == 0
    assert files(folder / "out") == ["certificate.json", "pruned.safetensors"]
    assert "risk.png was not drawn" in capsys.readouterr().err


def test_a_failure_while_writing_leaves_the_certificate(folder, capsys, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(confprune.checkpoint, "save", full)
    assert "no space left" in refusal(capsys, *CALIBRATE, MODEL, DATA, "--out=out")
    assert confprune.Certificate.load("out/certificate.json").certified


@pytest.mark.parametrize("out", ["out", "new/folder"])
def test_a_folder_that_cannot_be_written_is_refused_before_work(folder, capsys, monkeypatch, out):
    (folder / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(confprune, "calibrate", None)
    message = refusal(capsys, *CALIBRATE, MODEL, DATA, f"--out={out}")
    assert f"--out {out} cannot be written: no permission to write to" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha=2"], "argument --alpha: must be a number between 0 and 1, got '2'"),
        (["--delta=nan"], "argument --delta"),
        (["--loss=accuracy"], "loss"),
        (["--pvalue=best"], "pvalue"),
        (["--procedure=best"], "procedure"),
        (["--scope=best"], "scope"),
        (["--criterion=best"], "criterion"),
        (["--device=abacus"], "argument --device: device must be one that torch knows"),
        (["--device=cuda:99"], "argument --device: device 'cuda:99' cannot be used here"),
        (["--batch-size=0"], "argument --batch-size"),
        (["--batch-size=many"], "argument --batch-size"),
        (["--sparsities=0:1:10"], "argument --sparsities"),
        (["--sparsities=0:0.5"], "argument --sparsities: must read START:STOP:COUNT"),
        (["--sparsities=0.5,0.2"], "sparsities"),
        (["--model=project"], "--model must read package.module:object"),
        (["--model=nowhere:model"], "--model nowhere:model was not found"),
        (["--model=project:nothing"], "--model project:nothing was not found"),
        (["--model=project:broken"], "--model project:broken raised KeyError"),
        (["--model=project:number"], "gives a int, not a Module"),
        (["--data=project:number"], "data"),
        (["--data=project:few"], "45"),
        (["--data=project:wrong_size"], "shapes cannot be multiplied"),
        (["--weights=missing.safetensors"], "there is no file missing.safetensors"),
        (["--weights=project.py"], "project.py is not a safetensors file"),
        (["--exclude=*.weight"], "--exclude *.weight leaves no weights"),
        (["--include=fc.*"], "--include 'fc.*' matches no parameter: there are ['0.weight'"),
        (["--out=project.py"], "--out project.py is a file"),
        (["--out=project.py/run"], "project.py is a file, not a folder"),
    ],
)
def test_calibrate_refuses(folder, capsys, arguments, message):
    before = files(folder)
    defaults = [*CALIBRATE, "--alpha=0.05", MODEL, DATA, "--out=out"]
    assert message in refusal(capsys, *defaults, *arguments)
    assert files(folder) == before


def test_weights_of_another_model_are_refused(folder, capsys):
    save_file({"0.weight": torch.zeros(3, 3)}, "other.safetensors")
    message = refusal(capsys, *CALIBRATE, MODEL, DATA, "--weights=other.safetensors", "--out=out")
    assert "--weights other.safetensors do not fit the model" in message


@pytest.mark.parametrize("arguments", [[], ["paint"], ["calibrate"], ["prune", "a", "--out=b"]])
def test_bad_usage_is_one_line(capsys, arguments):
    assert "--help" in refusal(capsys, *arguments)


# plan


def test_plan_says_what_a_guess_leads_to(capsys):
    guess = ["--risks=0:0.001,0.5:0.01,0.9:0.2", "--n=1000", "--wished=0.5", "--draws=40"]
    run = confprune_process(*PLAN, *guess)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    expected = re.search(r"expected certified sparsity +(\S+)", run.stdout).group(1)
    needed = re.search(r"for sparsity 0.500 +(\d+) examples", run.stdout).group(1)
    # The risk reaches 0.05 at 0.584.
    assert 0.5 < float(expected) < 0.584
    assert 100 < int(needed) < 1000
    rows = np.array([line.split() for line in run.stdout.split("probability\n")[1].splitlines()])
    sparsities, risks, probabilities = rows.astype(float).T
    assert np.allclose(risks, np.interp(sparsities, [0, 0.5, 0.9], [0.001, 0.01, 0.2]), atol=1e-4)
    assert np.all(np.diff(probabilities) <= 0)
    assert 0.5 in sparsities  # the one wished for, though it is certified every time
    assert 2 <= len(rows) <= 10


@pytest.mark.parametrize("name", ["pilot.npy", "pilot.csv"])
def test_plan_starts_from_a_pilot_sample(folder, capsys, name):
    losses = np.zeros((50, 3))
    losses[:1, 1] = losses[:25, 2] = 0.5
    if name.endswith("npy"):
        np.save(name, losses.astype(np.float32))
    else:
        np.savetxt(name, losses, delimiter=",")
    arguments = [f"--losses={name}", "--sparsities=0,0.5,0.9", "--n=300", "--looks=none"]
    assert main([*PLAN, *arguments]) == 0
    output = capsys.readouterr().out
    assert "expected certified sparsity     0.500" in output
    assert "100.0% of examples x levels" in output
    assert "0.900  0.2500                       0.000" in output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--n=1000", "--wished=0.8"], "for sparsity 0.800              no number of examples"),
        (["--n=44"], "At least 45 examples are needed"),
    ],
)
def test_a_plan_that_cannot_work_is_exit_code_3(capsys, arguments, text):
    assert main([*PLAN, "--risks=0.3:0.001,0.9:0.2", *arguments]) == 3
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --risks --losses is required"),
        (["--risks=0:0.1", "--losses=a.npy"], "not allowed with"),
        (["--risks=0.1"], "argument --risks: must read SPARSITY:RISK"),
        (["--risks=0:2"], "argument --risks: must be a risk from 0 to 1"),
        (["--risks=1:0.1"], "argument --risks: must be a sparsity"),
        (["--risks=0.9:0.1,0.5:0"], "sparsities"),
        (["--risks=0.2:0,0.5:0.1", "--sparsities=0.1:0.5:3"], "from sparsity 0.2 to 0.5"),
        (["--risks=0.2:0,0.5:0.1", "--sparsities=0.3,0.6"], "from sparsity 0.2 to 0.5"),
        (["--risks=0.011:0,0.012:0.1"], "from sparsity 0.011 to 0.012"),
        (["--risks=0:0,0.9:0.1", "--procedure=graphical"], "graphical"),
        (["--risks=0:0,0.9:0.1", "--pvalue=best"], "pvalue"),
        (["--risks=0:0,0.9:0.1", "--draws=0"], "argument --draws"),
        (["--risks=0:0,0.9:0.1", "--wished=1"], "argument --wished"),
        (["--losses=missing.npy"], "there is no file missing.npy"),
        (["--losses=project.py"], "project.py is neither .npy nor .csv"),
        (["--losses=text.npy"], "text.npy is not a matrix of losses"),
        (["--losses=empty.npy"], "empty.npy is not a matrix of losses"),
        (["--losses=header.csv"], "header.csv is not a matrix of losses"),
        (["--losses=large.csv"], "large.csv is not a matrix of losses: losses must lie in [0, 1]"),
        (["--losses=curve.npy"], "curve.npy is not a matrix of losses: losses must be [n, K]"),
        (["--losses=pilot.csv"], "pilot.csv has 2 columns for 100 sparsities"),
    ],
)
def test_plan_refuses(folder, capsys, arguments, message):
    for name, text in (
        ("text.npy", "losses"),
        ("empty.npy", ""),
        ("header.csv", "dense,sparse\n0,1\n"),
        ("large.csv", "0,7\n"),
        ("pilot.csv", "0,1\n0,0\n"),
    ):
        (folder / name).write_text(text)
    np.save("curve.npy", np.zeros(3))
    assert message in refusal(capsys, *PLAN, "--n=500", *arguments)


# prune


@pytest.fixture
def checkpoint(folder):
    """A file with one of everything, and its tensors."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(10, 4),
        "model.layers.0.attention.weight": torch.randn(4, 4),
        "model.layers.0.attention.bias": torch.randn(4),
        "model.layers.0.norm.weight": torch.randn(2, 2),
        "model.layers.0.conv.weight": torch.randn(2, 2, 3),
        "vit.embeddings.patch_embeddings.projection.weight": torch.randn(2, 1, 2, 2),
        "model.half.weight": torch.randn(4, 4, dtype=torch.bfloat16),
        "model.steps": torch.arange(6).view(2, 3),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


LAYERS = {
    "model.layers.0.attention.weight",
    "model.layers.0.conv.weight",
    "vit.embeddings.patch_embeddings.projection.weight",
    "model.half.weight",
}


def pruned_names(before, path):
    after = load_file(path)
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(after[name], before[name])}


def test_plain_sparsity_prunes_layers_and_nothing_else(checkpoint, capsys):
    arguments = ["prune", "model.safetensors", "--out=pruned.safetensors"]
    assert main([*arguments, "--sparsity=0.5"]) == 0
    assert pruned_names(checkpoint, "pruned.safetensors") == LAYERS
    pruned = load_file("pruned.safetensors")
    weights = sum(checkpoint[name].numel() for name in LAYERS)
    assert sum(int((pruned[name] == 0).sum()) for name in LAYERS) == weights // 2
    largest_gone = max(checkpoint[n][pruned[n] == 0].abs().max().float() for n in LAYERS)
    smallest_kept = min(checkpoint[n][pruned[n] != 0].abs().min().float() for n in LAYERS)
    assert largest_gone <= smallest_kept
    assert metadata("pruned.safetensors")["confprune.sparsity"] == "0.5"
    assert metadata("pruned.safetensors")["format"] == "pt"


def test_layer_scope_prunes_each_tensor_alike(checkpoint, capsys):
    arguments = ["prune", "model.safetensors", "--out=pruned.safetensors"]
    assert main([*arguments, "--sparsity=0.5", "--scope=layer"]) == 0
    pruned = load_file("pruned.safetensors")
    for name in LAYERS:
        assert int((pruned[name] == 0).sum()) == checkpoint[name].numel() // 2


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["--include=*.attention.weight"], {"model.layers.0.attention.weight"}),
        (["--include=*embed_tokens*"], {"model.embed_tokens.weight"}),
        (["--exclude=model.layers.*"], {n for n in LAYERS if "layers" not in n}),
        (
            ["--include=*.conv.weight", "--include=*.half.weight", "--exclude=*.conv.*"],
            {"model.half.weight"},
        ),
    ],
)
def test_patterns_choose_the_tensors(checkpoint, capsys, patterns, names):
    arguments = ["prune", "model.safetensors", "--sparsity=0.9", "--out=pruned.safetensors"]
    assert main([*arguments, *patterns]) == 0
    assert pruned_names(checkpoint, "pruned.safetensors") == names


def test_several_sparsities_are_a_file_each(checkpoint, capsys):
    arguments = ["prune", "model.safetensors", "--out=pruned-{sparsity}.safetensors"]
    assert main([*arguments, "--sparsity", "0.25", "0.5"]) == 0
    weights = sum(checkpoint[name].numel() for name in LAYERS)
    for line, sparsity in zip(capsys.readouterr().out.splitlines(), (0.25, 0.5), strict=True):
        path = f"pruned-{sparsity}.safetensors"
        assert line == f"{path}: pruned {int(sparsity * weights)} of {weights} weights in 4 tensors"
        assert metadata(path)["confprune.sparsity"] == str(sparsity)


def test_a_folder_is_pruned_into_a_new_one(checkpoint, folder, capsys):
    (folder / "model").mkdir()
    (folder / "model.safetensors").rename("model/model.safetensors")
    (folder / "model" / "config.json").write_text("{}")
    assert main(["prune", "model", "--sparsity=0.5", "--out=pruned"]) == 0
    assert files(folder / "pruned") == ["config.json", "model.safetensors"]
    assert "pruned: pruned " in capsys.readouterr().out


def test_a_dry_run_lists_the_tensors_and_writes_nothing(checkpoint, folder, capsys):
    before = files(folder)
    arguments = ["prune", "model.safetensors", "--sparsity=0.5"]
    assert "--out is missing" in refusal(capsys, *arguments)
    assert main([*arguments, "--exclude=*.conv.*", "--dry-run"]) == 0
    assert files(folder) == before
    *lines, last = capsys.readouterr().out.splitlines()
    fates = {line.split()[0]: line.split("]")[1].strip() for line in lines}
    assert fates.keys() == checkpoint.keys()
    assert {name for name, fate in fates.items() if fate == "prune"} == {
        name for name in LAYERS if ".conv." not in name
    }
    assert fates["model.embed_tokens.weight"] == "keep: an embedding"
    assert fates["model.layers.0.conv.weight"] == "keep: excluded"
    assert "BF16 [4, 4]" in next(line for line in lines if "half" in line)
    assert last.startswith("model.safetensors: 40 of ")
    assert last.endswith("in 3 of 8 tensors; nothing was written")


def test_a_file_may_be_pruned_in_place(checkpoint, capsys):
    assert main(["prune", "model.safetensors", "--sparsity=0.9", "--out=model.safetensors"]) == 0
    assert pruned_names(checkpoint, "model.safetensors") == LAYERS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.safetensors", "--sparsity=0.5"], "there is no file missing.safetensors"),
        (["project.py", "--sparsity=0.5"], "project.py is not a safetensors file"),
        (["model.safetensors", "--sparsity=1"], "argument --sparsity: must be a sparsity"),
        (["model.safetensors", "--sparsity=0.5", "--include=*.kernel"], "include '*.kernel'"),
        (["model.safetensors", "--sparsity=0.5", "--exclude=model.*", "--exclude=vit.*"], "no pru"),
        (
            ["model.safetensors", "--sparsity=0.5", "--include=model.steps"],
            "'model.steps' is",
        ),
        (["model.safetensors", "--sparsity=0.5", "--scope=best"], "scope"),
        (["model.safetensors", "--sparsity=0.5", "--out=no/folder"], "is not a folder"),
        (["model.safetensors", "--certificate=missing.json"], "missing.json"),
        (["model.safetensors", "--certificate=project.py"], "project.py is not a certificate"),
        (["model.safetensors", "--certificate=a.json", "--sparsity=0.5"], "not allowed with"),
        (["model.safetensors", "--certificate=a.json", "--scope=layer"], "--scope goes with"),
        (["model.safetensors", "--certificate=a.json", "--include=*"], "--include goes with"),
        (["model.safetensors", "--certificate=a.json", "--dry-run"], "--dry-run goes with"),
        (["model.safetensors", "--sparsity", "0.5", "0.2"], "strictly increasing"),
        (["model.safetensors", "--sparsity", "0.2", "0.5"], "write {sparsity} where"),
        (["model.safetensors", "--sparsity=0.5", "--out=.."], "is a folder: name the file"),
        (["model.safetensors", "--sparsity=0.5", "--out=project.py"], "no .safetensors file"),
        (["nan.safetensors", "--sparsity=0.5"], "layer.weight"),
    ],
)
def test_prune_refuses(checkpoint, folder, capsys, arguments, message):
    save_file({"layer.weight": torch.full((2, 2), torch.nan)}, "nan.safetensors")
    before = files(folder)
    assert message in refusal(capsys, "prune", "--out=pruned.safetensors", *arguments)
    assert files(folder) == before


@pytest.fixture
def certificate(project):
    made = confprune.calibrate(
        project.model(), project.inputs(), loss="disagreement", alpha=0.1, delta=0.1, progress=False
    )
    made.save("certificate.json")
    return made


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda tensors: tensors.pop("2.weight"), "'2.weight' is missing"),
        (lambda tensors: tensors.update({"0.weight": torch.ones(3, 2)}), "has shape [3, 2]"),
        (lambda tensors: tensors["0.weight"].mul_(2), "values of parameter '0.weight'"),
    ],
)
def test_certificate_is_refused_for_other_weights(certificate, project, capsys, change, difference):
    tensors = project.model().state_dict()
    change(tensors)
    save_file(tensors, "other.safetensors")
    arguments = ["other.safetensors", "--certificate=certificate.json", "--out=pruned.safetensors"]
    message = refusal(capsys, "prune", *arguments)
    assert "certificate is not for other.safetensors" in message
    assert difference in message


def test_certificate_from_losses_cannot_prune(folder, capsys):
    confprune.calibrate_losses(torch.zeros(99, 1), [0.5], 0.05, 0.1).save("certificate.json")
    save_file({"0.weight": torch.ones(2, 2)}, "model.safetensors")
    arguments = ["model.safetensors", "--certificate=certificate.json", "--out=pruned.safetensors"]
    assert "made from a loss matrix" in refusal(capsys, "prune", *arguments)


@pytest.mark.parametrize("storage", ["one of the tied weights", "every name"])
def test_tied_weights_are_pruned_under_every_name(folder, project, capsys, storage):
    model = project.Tied()
    if storage == "every name":
        copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(copies, "model.safetensors")
    else:
        confprune.checkpoint.save(model, "model.safetensors")
    arguments = ["--model=project:Tied", "--data=project:tokens", "--out=out"]
    assert main([*CALIBRATE, *arguments, "--sparsities=0,0.1", "--alpha=0.9"]) == 0
    certificate = "--certificate=out/certificate.json"
    assert main(["prune", "model.safetensors", certificate, "--out=pruned.safetensors"]) == 0
    expected = confprune.Certificate.load("out/certificate.json").prune(model)
    for file in ("pruned.safetensors", "out/pruned.safetensors"):
        loaded = project.Tied()
        nn.Module.load_state_dict(loaded, load_file(file), strict=False)
        assert torch.equal(loaded.output.weight, expected.output.weight)
        assert torch.equal(loaded.middle.weight, expected.middle.weight)


# report


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not a certificate"), (json.dumps({"version": 1}), "is not a certificate")],
)
def test_report_refuses_what_is_no_certificate(folder, capsys, text, message):
    (folder / "certificate.json").write_text(text)
    assert message in refusal(capsys, "report", "certificate.json")


def test_a_file_that_cannot_be_read_is_named(folder, capsys):
    message = refusal(capsys, "report", "nowhere.json")
    assert message == "confprune report: error: nowhere.json: No such file or directory"
