"""The command line: reads arguments, calls the library, and turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import load_model
from torch import nn

import confprune
from confprune import checkpoint, demo, plan, sparse
from confprune.arguments import BAD_USAGE, parser
from confprune.certificate import Certificate
from confprune.parameters import named_parameters, prunable_parameters

DONE, BAD_INPUT, NOT_CERTIFIED, INTERRUPTED = 0, BAD_USAGE, 3, 130


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
    options = parser().parse_args(arguments)
    try:
        with _plain_warnings(options):
            return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        return _say(options, "interrupted", INTERRUPTED)
    except OSError as error:
        # What has been raised by Python itself opens with a number.
        plain = error.errno is None or error.filename is None
        what = str(error) if plain else f"{error.filename}: {error.strerror}"
        return _say(options, f"error: {what}", BAD_INPUT)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        return _say(options, f"error: {error}", BAD_INPUT)


def _say(options: argparse.Namespace, message: str, code: int) -> int:
    print(f"confprune {options.command}: {' '.join(message.split())}", file=sys.stderr)
    return code


@contextmanager
def _plain_warnings(options: argparse.Namespace) -> Iterator[None]:
    """Say confprune's warnings in a line: where in the code they arose is no news to a user."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning:
            _say(options, f"warning: {message}", DONE)
        else:
            by_default(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        by_default = warnings.showwarning
        warnings.showwarning = show
        yield


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


def _plan(options: argparse.Namespace) -> int:
    if options.losses is None:
        sparsities, values = plan.curve(options.risks, options.sparsities)
        risks = values
    else:
        sparsities, values = plan.pilot(options.losses, options.sparsities)
        risks = values.mean(axis=0)
    simulation = confprune.simulate(
        sparsities,
        values,
        options.alpha,
        options.delta,
        options.n,
        pvalue=options.pvalue,
        procedure=options.procedure,
        looks="auto" if options.looks == "auto" else None,
        draws=options.draws,
        seed=options.seed,
        wished=options.wished,
    )
    print(plan.report(simulation, risks, options.alpha, options.delta))
    return DONE if plan.reaches(simulation) else NOT_CERTIFIED


def _calibrate(options: argparse.Namespace) -> int:
    _check_promise(options)
    folder = _writable_folder(options.out)
    # As `python -m` does: factories are usually in the folder where one works.
    sys.path.insert(0, "")
    model = _made("--model", options.model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {options.model} gives a {type(model).__name__}, not a Module")
    if options.weights is not None:
        _load_weights(model, options.weights)

    certificate = confprune.calibrate(
        model,
        _made("--data", options.data),
        loss=None if options.loss is None else _own("--loss", options.loss),
        alpha=options.alpha,
        delta=options.delta,
        risks=_risks(options),
        groups=None if options.groups is None else _own("--groups", options.groups),
        accept=_accept(options),
        parameters=_parameters(model, options.include or (), options.exclude or ()),
        sparsities=options.sparsities,
        scope=options.scope,
        criterion=options.criterion or "magnitude",
        pattern=options.pattern and [None if p == "none" else p for p in options.pattern],
        score_data=options.score_data and _made("--score-data", options.score_data),
        pvalue=options.pvalue,
        procedure=_own("--procedure", options.procedure),
        looks="auto" if options.looks == "auto" else None,
        order=options.order,
        guarantee=options.guarantee,
        batch_size=options.batch_size,
        device=options.device,
        seed=options.seed,
        progress=not options.quiet,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("compressed.safetensors", "risk.png"):
        (folder / name).unlink(missing_ok=True)  # of another certificate, if none is made below
    # First what took the time: no failure with the other files loses it.
    certificate.save(folder / "certificate.json")
    pruned = certificate.prune(model)
    checkpoint.save(pruned, folder / "pruned.safetensors", certificate)
    if options.compress:
        # Which kernel is the faster one is for the machine to say that loads the file.
        small = sparse.compress(pruned, kernel="sparse")
        sparse.save_sparse(small, folder / "compressed.safetensors", certificate)
    _plot(certificate, folder / "risk.png")
    print(certificate)
    return DONE if certificate.certified else NOT_CERTIFIED


def _check_promise(options: argparse.Namespace) -> None:
    """Refuse what contradicts itself, before anything is loaded."""
    one = options.loss is not None, options.alpha is not None
    if options.risk and any(one):
        raise ValueError("--risk LOSS=ALPHA takes the place of --loss and --alpha: leave them out")
    if not options.risk and not all(one):
        raise ValueError("give --loss and --alpha, or --risk LOSS=ALPHA for each of several losses")
    if options.guarantee == "expectation" and options.delta is not None:
        raise ValueError(
            "--guarantee expectation is no statement with a probability: leave --delta out"
        )
    if options.guarantee != "expectation" and options.delta is None:
        raise ValueError("give --delta, the largest probability that the promise fails")
    if options.accept_of is not None and options.accept_confidence is None:
        raise ValueError("--accept-of goes with --accept-confidence")


def _risks(options: argparse.Namespace) -> list[confprune.Risk] | None:
    if not options.risk:
        return None
    return [confprune.Risk(_own("--risk", loss), alpha) for loss, alpha in options.risk]


def _accept(options: argparse.Namespace) -> confprune.Loss | None:
    if options.accept_confidence is None:
        return None
    return confprune.confident(options.accept_confidence, of=options.accept_of or "full")


def _parameters(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str]
) -> list[str] | None:
    """The names of what to prune; None for the default. A tied parameter goes by all its names."""
    if not (include or exclude):
        return None
    included = _matching(model, "--include", include)
    excluded = _matching(model, "--exclude", exclude)
    chosen = (
        named_parameters(model, remove_duplicate=True) if include else prunable_parameters(model)
    )
    names = [
        name
        for name, parameter in chosen.items()
        if (not include or id(parameter) in included) and id(parameter) not in excluded
    ]
    if not names:
        raise ValueError(f"--exclude {' '.join(exclude)} leaves no weights to prune")
    return names


def _matching(model: nn.Module, option: str, patterns: Sequence[str]) -> set[int]:
    """The identities of the parameters that have a name of such a pattern."""
    every = named_parameters(model)
    found: set[int] = set()
    for pattern in patterns:
        matching = {id(p) for name, p in every.items() if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(f"{option} {pattern!r} matches no parameter: there are {[*every]}")
        found |= matching
    return found


def _prune(options: argparse.Namespace) -> int:
    if options.out is None and not options.dry_run:
        raise ValueError(
            "--out is missing: the file or folder to write, or --dry-run to write none"
        )
    if options.certificate is None:
        if options.dry_run:
            return _list_choices(options)
        pruned = checkpoint.prune(
            options.source,
            options.out,
            sparsity=options.sparsity,
            scope=options.scope,
            criterion=options.criterion or "magnitude",
            pattern=None if options.pattern == "none" else options.pattern,
            include=options.include,
            exclude=options.exclude,
            progress=not options.quiet,
        )
    else:
        for name in ("scope", "criterion", "pattern", "include", "exclude", "dry_run"):
            if getattr(options, name):
                option = name.replace("_", "-")
                raise ValueError(f"--{option} goes with --sparsity: a certificate has its own")
        certificate = Certificate.load(options.certificate)
        if not certificate.certified:
            return _say(options, f"{options.certificate} certifies no sparsity", NOT_CERTIFIED)
        pruned = checkpoint.prune(
            options.source, options.out, certificate=certificate, progress=not options.quiet
        )
    for path, count in zip(pruned.paths, pruned.counts, strict=True):
        print(
            f"{path}: pruned {count:,} of {pruned.total:,} weights in {len(pruned.names)} tensors"
        )
    return DONE


def _list_choices(options: argparse.Namespace) -> int:
    choices = checkpoint.choose(options.source, include=options.include, exclude=options.exclude)
    width = max(len(choice.tensor.name) for choice in choices)
    for choice in choices:
        tensor = choice.tensor
        fate = "prune" if choice.kept is None else f"keep: {choice.kept}"
        print(f"{tensor.name:{width}}  {tensor.dtype:4} {list(tensor.shape)!s:20} {fate}")
    sizes = [choice.tensor.size for choice in choices if choice.kept is None]
    total = sum(choice.tensor.size for choice in choices)
    print(
        f"{options.source}: {sum(sizes):,} of {total:,} weights can be pruned, "
        f"in {len(sizes)} of {len(choices)} tensors; nothing was written"
    )
    return DONE


def _report(options: argparse.Namespace) -> int:
    print(Certificate.load(options.file))
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "plan": _plan,
    "calibrate": _calibrate,
    "prune": _prune,
    "report": _report,
}


# What the commands share.


def _writable_folder(path: Path) -> Path:
    """The folder, there or to be made, unless it is clear already that it cannot be written."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path} is a file, not a folder")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"--out {path}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {path} cannot be written: no permission to write to {there}")
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


def _own(argument: str, name: str) -> Any:
    """A name of the library's as it is, or the object that "package.module:object" names."""
    return _named(argument, name) if ":" in name else name


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
    checkpoint.read_layout(path)  # names what is wrong with the file itself
    try:
        load_model(model, path)
    except RuntimeError as error:
        raise ValueError(f"--weights {path} do not fit the model: {error}") from error


def _plot(certificate: Certificate, path: Path) -> None:
    try:
        certificate.plot(path)
    except ImportError as error:
        print(f"{path.name} was not drawn: {error}", file=sys.stderr)
