"""The command line: reads arguments, calls the library, and turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import load_model
from torch import nn

import confprune
from confprune import checkpoint, demo
from confprune.certificate import Certificate

DONE, BAD_INPUT, NOT_CERTIFIED, INTERRUPTED = 0, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after the program's name; by default those of this process.

    Returns
    -------
    int
        0 done, 2 bad usage or input, 3 nothing could be certified, 130 interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return _say(options, "interrupted", INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        return _say(options, f"error: {error}", BAD_INPUT)


def _say(options: argparse.Namespace, message: str, code: int) -> int:
    print(f"confprune {options.command}: {' '.join(message.split())}", file=sys.stderr)
    return code


# The commands.


def _demo(options: argparse.Namespace) -> int:
    certificate = demo.run(
        options.out,
        seed=options.seed,
        alpha=options.alpha,
        delta=options.delta,
        progress=not options.quiet,
    )
    return DONE if certificate.certified else NOT_CERTIFIED


def _calibrate(options: argparse.Namespace) -> int:
    folder = _folder(options.out)
    # As `python -m` does: factories are usually in the folder where one works.
    sys.path.insert(0, "")
    model = _made("--model", options.model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {options.model} gives a {type(model).__name__}, not a Module")
    if options.weights is not None:
        _load_weights(model, options.weights)
    loss = _named("--loss", options.loss) if ":" in options.loss else options.loss

    certificate = confprune.calibrate(
        model,
        _made("--data", options.data),
        loss=loss,
        alpha=options.alpha,
        delta=options.delta,
        sparsities=options.sparsities,
        scope=options.scope,
        criterion=options.criterion,
        pvalue=options.pvalue,
        procedure=options.procedure,
        batch_size=options.batch_size,
        device=options.device,
        seed=options.seed,
        progress=not options.quiet,
    )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(certificate.prune(model), folder / "pruned.safetensors", certificate)
    _plot(certificate, folder / "risk.png")
    certificate.save(folder / "certificate.json")
    print(certificate)
    return DONE if certificate.certified else NOT_CERTIFIED


def _prune(options: argparse.Namespace) -> int:
    if options.certificate is None:
        levels = checkpoint.prune(
            options.file,
            options.out,
            sparsity=options.sparsity,
            scope=options.scope or "global",
            criterion=options.criterion or "magnitude",
            include=options.include,
            exclude=options.exclude,
        )
    else:
        for name in ("scope", "criterion", "include", "exclude"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} goes with --sparsity: a certificate has its own")
        certificate = Certificate.load(options.certificate)
        if not certificate.certified:
            return _say(options, f"{options.certificate} certifies no sparsity", NOT_CERTIFIED)
        levels = checkpoint.prune(options.file, options.out, certificate=certificate)
    print(
        f"{options.out}: pruned {int(levels.counts[0]):,} of {levels.total:,} weights "
        f"in {len(levels.levels)} tensors"
    )
    return DONE


def _report(options: argparse.Namespace) -> int:
    print(Certificate.load(options.file))
    return DONE


# What the commands share.


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path} is a file, not a folder")
    return path


def _named(argument: str, name: str) -> Any:
    """The object that "package.module:object" names."""
    module, colon, attributes = name.partition(":")
    if not (module and colon and attributes):
        raise ValueError(f"{argument} must read package.module:object, got {name!r}")
    try:
        found = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{argument} {name} was not found: {error}") from error
    return found


def _made(argument: str, name: str) -> Any:
    """What "package.module:factory" makes, or the object itself where it is no factory."""
    found = _named(argument, name)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise ValueError(f"{argument} {name} raised {type(error).__name__}: {error}") from error


def _load_weights(model: nn.Module, path: Path) -> None:
    checkpoint.read(path)  # names what is wrong with the file itself
    try:
        load_model(model, path)
    except RuntimeError as error:
        raise ValueError(f"--weights {path} do not fit the model: {error}") from error


def _plot(certificate: Certificate, path: Path) -> None:
    try:
        certificate.plot(path)
    except ImportError as error:
        print(f"{path.name} was not drawn: {error}", file=sys.stderr)


# The arguments.


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="confprune",
        description="Prune a trained network as far as a guarantee on its risk allows.",
        epilog="exit codes: 0 done, 2 bad usage or input, 3 nothing could be certified",
    )
    parser.add_argument("--version", action="version", version=f"confprune {confprune.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (_add_demo, _add_calibrate, _add_prune, _add_report):
        add(commands)
    return parser


def _command(
    commands: Any, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    name = run.__name__.lstrip("_")
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  confprune {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_demo(commands: Any) -> None:
    command = _command(
        commands,
        _demo,
        "train, calibrate and prune a small network on handwritten digits, and check the promise",
        "--out demo",
    )
    command.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    _add_promise(command, alpha=0.05, delta=0.1)
    _add_run(command)


def _add_calibrate(commands: Any) -> None:
    command = _command(
        commands,
        _calibrate,
        "find the sparsest network whose risk is certified",
        "--model my_project:model --data my_project:calibration_set \\\n"
        "      --weights model.safetensors --loss disagreement --alpha 0.05 --delta 0.1 --out run",
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
        "--loss", required=True, help="name of a loss, or MODULE:FUNCTION for your own"
    )
    _add_promise(command)
    command.add_argument(
        "--sparsities",
        type=_sparsities,
        metavar="START:STOP:COUNT",
        help="the grid, STOP included, or a list 0.5,0.6,0.7 (default: 0:0.99:100)",
    )
    _add_pruning(command)
    command.add_argument("--pvalue", default="auto", help="p-value (default: auto)")
    command.add_argument(
        "--procedure", default="fixed_sequence", help="testing (default: fixed_sequence)"
    )
    command.add_argument("--batch-size", type=_positive, metavar="N", help="examples at once")
    command.add_argument("--device", type=_device, help="such as cpu or cuda:0")
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="receives certificate.json, risk.png and pruned.safetensors",
    )
    _add_run(command)


def _add_prune(commands: Any) -> None:
    command = _command(
        commands,
        _prune,
        "prune the weights in a safetensors file, by a certificate or to a sparsity",
        "model.safetensors --certificate run/certificate.json --out pruned.safetensors\n"
        "  confprune prune model.safetensors --sparsity 0.5 --out pruned.safetensors",
    )
    command.add_argument("file", type=Path, metavar="FILE", help="safetensors file to prune")
    how = command.add_mutually_exclusive_group(required=True)
    how.add_argument("--certificate", type=Path, metavar="FILE", help="prune as certified")
    how.add_argument(
        "--sparsity", type=_sparsity, metavar="S", help="prune this share, without a guarantee"
    )
    _add_pruning(command)
    # So that one that was given beside a certificate is told from one that was not.
    command.set_defaults(scope=None, criterion=None)
    command.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="with --sparsity: prune the tensors of such names, such as 'encoder.*.weight' "
        "(default: matrices and kernels named weight, without embeddings and norms)",
    )
    command.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="with --sparsity: leave the tensors of such names as they are",
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")


def _add_report(commands: Any) -> None:
    command = _command(commands, _report, "print what a certificate says", "run/certificate.json")
    command.add_argument("file", type=Path, metavar="FILE", help="certificate.json")


def _add_promise(
    command: argparse.ArgumentParser, alpha: float | None = None, delta: float | None = None
) -> None:
    """Ask for alpha and delta: a promise is chosen, not met with, except in the demo."""
    for name, default, text in (
        ("--alpha", alpha, "largest risk that is acceptable"),
        ("--delta", delta, "largest probability that the promise fails"),
    ):
        command.add_argument(
            name,
            type=_probability,
            required=default is None,
            default=default,
            help=text if default is None else f"{text} (default: {default})",
        )


def _add_pruning(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--scope",
        default="global",
        help="what competes: global, all layers together, or layer (default: global)",
    )
    command.add_argument(
        "--criterion", default="magnitude", help="importance of a weight (default: magnitude)"
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _probability(text: str) -> float:
    return _number(text, lambda value: 0 < value < 1, "a number between 0 and 1")


def _sparsity(text: str) -> float:
    return _number(text, lambda value: 0 <= value < 1, "a sparsity: 0 or more, and below 1")


def _positive(text: str) -> int:
    value = _number(text, lambda value: value >= 1 and value == int(value), "a positive integer")
    return int(value)


def _number(text: str, valid: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
        if valid(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")


def _sparsities(text: str) -> list[float]:
    """Sparsities from "START:STOP:COUNT" or "0.5,0.6,0.7"; the library judges their order."""
    if ":" not in text:
        return [_sparsity(part) for part in text.split(",")]
    parts = text.split(":")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"must read START:STOP:COUNT, got {text!r}")
    grid = np.linspace(_sparsity(parts[0]), _sparsity(parts[1]), _positive(parts[2]))
    return [float(sparsity) for sparsity in grid]


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"cannot be used here, {text!r}: {error}") from error
    return device
