"""What the README shows works as shown."""

import re
import shlex
from pathlib import Path

import pytest

import confprune
from confprune.arguments import parser
from confprune.question import GUARANTEES
from confprune.risk import procedures, pvalues

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def test_python_blocks_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    assert "Certified: " in capsys.readouterr().out
    weights = [p for name, p in namespace["sparse"].named_parameters() if name.endswith("weight")]
    pruned = sum(int((weight == 0).sum()) for weight in weights)
    total = sum(weight.numel() for weight in weights)
    certificate = confprune.Certificate.load(tmp_path / "certificate.json")
    assert pruned == round(certificate.sparsity * total) > 0


COMMANDS = [
    line for block in blocks("sh") for line in block.splitlines() if line.startswith("confprune ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    options = parser().parse_args(shlex.split(command)[1:])
    assert options.command == command.split()[1]


def test_all_commands_but_the_demo_are_shown():
    assert {command.split()[1] for command in COMMANDS} == {"plan", "calibrate", "report", "prune"}


def rows(title):
    """The names in the first column of the table under a title."""
    table = README.read_text().split(f"\n## {title}\n")[1].split("\n|---")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[1:]]
    return {name.strip('"') for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_loss_is_in_the_table():
    assert rows("Losses") == set(confprune.losses.BUILT_IN)


def test_every_pvalue_is_in_the_table():
    assert rows("p-values, testing and guarantees") == {*pvalues.PVALUES, "auto"}


def test_every_criterion_is_shown():
    text = README.read_text()
    assert all(f'`"{name}' in text for name in confprune.criteria.CRITERIA)


def test_picture_is_there():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / name).is_file()


def test_procedures_and_guarantees_are_named():
    # The others need what calibrate does not take.
    usable = {n for n, p in procedures.PROCEDURES.items() if p.needs in ((), ("order",))}
    text = README.read_text()
    assert all(f'`"{name}"`' in text for name in {*usable, *GUARANTEES})
