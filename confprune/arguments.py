"""The words of the command line: commands, options and their help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import confprune
from confprune.criteria import CRITERIA
from confprune.losses import BUILT_IN
from confprune.option_values import (
    to_count,
    to_curve,
    to_device,
    to_grid,
    to_probability,
    to_risk,
    to_sparsity,
)
from confprune.risk.pvalues import PVALUES

BAD_USAGE = 2


def parser() -> argparse.ArgumentParser:
    """The parser of ``confprune``; the name of the command becomes `command`."""
    parser = _Parser(
        prog="confprune",
        description="Prune a trained network as far as a guarantee on its risk allows.",
        epilog="exit codes: 0 done, 2 bad usage or input, 3 nothing could be certified",
    )
    parser.add_argument("--version", action="version", version=f"confprune {confprune.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (_add_demo, _add_plan, _add_calibrate, _add_prune, _add_report):
        add(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _command(commands: Any, name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
    title = "example" if len(examples) == 1 else "examples"
    lines = "\n".join(f"  confprune {name} {example}" for example in examples)
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{title}:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def _add_demo(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
        "train, calibrate and prune a small network on handwritten digits, and check the promise",
        "--out demo",
    )
    command.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    _add_promise(command, alpha=0.05, delta=0.1)
    _add_run(command)


def _add_plan(commands: Any) -> None:
    command = _command(
        commands,
        "plan",
        "simulate what a calibration set can be expected to certify, before collecting it",
        "--risks 0:0.001,0.5:0.01,0.9:0.2 --alpha 0.05 --delta 0.1 --n 1000 --wished 0.55",
        "--losses pilot.npy --sparsities 0:0.9:10 --alpha 0.05 --delta 0.1 --n 1000",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--risks",
        type=to_curve,
        metavar="SPARSITY:RISK,...",
        help="the risk you guess at some sparsities; the levels between are interpolated",
    )
    source.add_argument(
        "--losses",
        type=Path,
        metavar="FILE",
        help="losses of a pilot sample, .npy or .csv without a header: a row for each example, a "
        "column for each level",
    )
    _add_promise(command, required=True)
    command.add_argument(
        "--n", type=to_count, required=True, metavar="N", help="number of calibration examples"
    )
    command.add_argument(
        "--wished", type=to_sparsity, metavar="S", help="find the examples that this sparsity needs"
    )
    _add_grid(command, "0:0.99:100, as far as --risks reach")
    _add_testing(command, "fixed_sequence, bonferroni or holm")
    command.add_argument(
        "--draws",
        type=to_count,
        default=200,
        metavar="N",
        help="number of simulated calibrations (default: 200)",
    )
    _add_seed(command)


def _add_calibrate(commands: Any) -> None:
    command = _command(
        commands,
        "calibrate",
        "find the sparsest network whose risk is certified",
        "--model my_project:model --data my_project:calibration_set \\\n"
        "      --weights model.safetensors --loss disagreement --alpha 0.05 --delta 0.1 --out run",
        "--model my_project:model --data my_project:calibration_set \\\n"
        "      --risk disagreement=0.05 --risk harm=0.02 --delta 0.1 --out run",
    )
    command.add_argument(
        "--model", required=True, metavar="MODULE:FACTORY", help="gives the trained network"
    )
    command.add_argument(
        "--data", required=True, metavar="MODULE:FACTORY", help="gives the calibration set"
    )
    command.add_argument(
        "--weights", type=Path, metavar="FILE", help="safetensors file to load into the network"
    )
    command.add_argument(
        "--loss", help=f"{', '.join(sorted(BUILT_IN))}, or MODULE:FUNCTION for your own"
    )
    _add_promise(command)
    command.add_argument(
        "--risk",
        type=to_risk,
        action="append",
        metavar="LOSS=ALPHA",
        help="instead of --loss and --alpha, once for each of several losses: all are kept at once",
    )
    command.add_argument(
        "--groups",
        metavar="KEY",
        help="keep the risk on every group: targets, a key of the batch, or MODULE:FUNCTION from a "
        "batch to one group per example",
    )
    command.add_argument(
        "--accept-confidence",
        type=to_probability,
        metavar="T",
        help="count only predictions of at least this confidence, the largest class probability",
    )
    command.add_argument(
        "--accept-of",
        choices=("full", "pruned"),
        help="with --accept-confidence: whose confidence decides (default: full)",
    )
    command.add_argument(
        "--guarantee",
        choices=("risk", "expectation", "monotone"),
        default="risk",
        help="risk: with probability 1 - delta, by testing; expectation: on average, by conformal "
        "risk control; monotone: by bounds on the monotonised risk (default: risk)",
    )
    _add_grid(command, "0:0.99:100")
    for name, default, text in _PRUNING:
        command.add_argument(
            name,
            nargs="+",
            action="extend",
            metavar=name.strip("-").upper(),
            help=f"{text}; of several the best certified one is taken (default: {default})",
        )
    _add_patterns(command, "parameters", "weights of linear and convolution layers")
    command.add_argument(
        "--score-data",
        metavar="MODULE:FACTORY",
        help="for a criterion that needs data: gives it (default: a part of --data, set aside)",
    )
    _add_testing(
        command,
        "fixed_sequence, split_fixed_sequence, bonferroni, holm, or MODULE:FUNCTION for your own",
    )
    command.add_argument(
        "--order",
        choices=("random", "given"),
        default="random",
        help="given: take the order of data that cannot be permuted for a random one "
        "(default: random)",
    )
    command.add_argument("--batch-size", type=to_count, metavar="N", help="examples at once")
    command.add_argument("--device", type=to_device, help="such as cpu or cuda:0")
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="receives certificate.json, risk.png and pruned.safetensors",
    )
    command.add_argument(
        "--compress",
        action="store_true",
        help="write compressed.safetensors as well: surviving weights only, with the certificate",
    )
    _add_run(command)


def _add_prune(commands: Any) -> None:
    command = _command(
        commands,
        "prune",
        "prune a safetensors checkpoint of any size, by a certificate or to a sparsity",
        "model.safetensors --certificate run/certificate.json --out pruned.safetensors",
        "model.safetensors --sparsity 0.5 --out pruned.safetensors",
        "model_folder --sparsity 0.3 0.5 0.7 --out 'pruned-{sparsity}'",
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help="safetensors file, the .safetensors.index.json of several, or the folder of either, "
        "whose other files are copied",
    )
    how = command.add_mutually_exclusive_group(required=True)
    how.add_argument("--certificate", type=Path, metavar="FILE", help="prune as certified")
    how.add_argument(
        "--sparsity",
        type=to_sparsity,
        nargs="+",
        metavar="S",
        help="prune this share, without a guarantee; several, increasing, give an output each",
    )
    for name, default, text in _PRUNING:
        command.add_argument(name, help=f"with --sparsity: {text} (default: {default})")
    _add_patterns(
        command,
        "tensors",
        "weights of linear and convolution layers, told by name and shape",
        condition="with --sparsity: ",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="with --sparsity: list the tensors and what becomes of them, and write nothing",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="file to write, which may be the checkpoint itself, or new folder where it has "
        "several files; {sparsity} in it stands for the sparsity",
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_report(commands: Any) -> None:
    command = _command(commands, "report", "print what a certificate says", "run/certificate.json")
    command.add_argument("file", type=Path, metavar="FILE", help="certificate.json")


# Options that commands share.

# Without a default for argparse, so that one that was given is told from one that was not.
_PRUNING = (
    (
        "--scope",
        "global; row for wanda",
        "what competes: global, all layers together, or layer or row, each layer or output alone",
    ),
    (
        "--criterion",
        "magnitude",
        f"importance of a weight: {', '.join(CRITERIA)}, with settings as in "
        "'magnitude(min_per_layer=100)'",
    ),
    ("--pattern", "none", "what is pruned together: N:4, 4x4, rows, or none"),
)


def _add_promise(
    command: argparse.ArgumentParser,
    *,
    alpha: float | None = None,
    delta: float | None = None,
    required: bool = False,
) -> None:
    """Ask for alpha and delta: a promise is chosen, not met with, except in the demo."""
    for name, default, text in (
        ("--alpha", alpha, "largest risk that is acceptable"),
        ("--delta", delta, "largest probability that the promise fails"),
    ):
        command.add_argument(
            name,
            type=to_probability,
            required=required,
            default=default,
            help=text if default is None else f"{text} (default: {default})",
        )


def _add_patterns(
    command: argparse.ArgumentParser, what: str, default: str, *, condition: str = ""
) -> None:
    """Ask for the names of what is pruned."""
    for name, text in (
        (
            "--include",
            f"prune the {what} of such names, such as 'encoder.*.weight' (default: {default})",
        ),
        ("--exclude", f"leave the {what} of such names as they are"),
    ):
        command.add_argument(name, action="append", metavar="PATTERN", help=f"{condition}{text}")


def _add_grid(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--sparsities",
        type=to_grid,
        metavar="START:STOP:COUNT",
        help=f"the grid, STOP included, or a list 0.5,0.6,0.7 (default: {default})",
    )


def _add_testing(command: argparse.ArgumentParser, procedures: str) -> None:
    names = ", ".join(PVALUES)
    command.add_argument("--pvalue", default="auto", help=f"p-value: {names} (default: auto)")
    command.add_argument(
        "--procedure",
        default="fixed_sequence",
        help=f"testing: {procedures} (default: fixed_sequence)",
    )
    command.add_argument(
        "--looks",
        choices=("auto", "none"),
        default="auto",
        help="auto: levels whose fate is settled early are not evaluated further; none: one test "
        "on all examples (default: auto)",
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    _add_seed(command)
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed", type=int, default=0, help="seed of the random numbers (default: 0)"
    )
