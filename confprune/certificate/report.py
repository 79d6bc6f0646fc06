"""The report of a certificate in plain text: the promise, what it rests on, what would help."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from confprune.certificate.advice import advice
from confprune.certificate.evidence import closest
from confprune.certificate.promise import (
    asymptotic,
    counted,
    enumeration,
    in_order,
    part_text,
    promise,
    pvalue_names,
    sparsity_text,
    title,
)

if TYPE_CHECKING:
    from confprune.certificate import Certificate
    from confprune.certificate.evidence import Pruning, ScoreData

WIDTH = 88
LEVELS_AROUND = 3
MOST_PARTS = 12
"""Parts that are all listed; of more, only the `CLOSEST_PARTS` closest to their alpha."""
CLOSEST_PARTS = 8
MOST_LOOKS = 6
LONGEST_NAME = 28
_NOT_REACHED = "not reached"
_BOUND = {"expectation": "corrected"}


def report(certificate: Certificate) -> str:
    """Describe a certificate for a reader.

    Parameters
    ----------
    certificate : Certificate

    Returns
    -------
    str
        Several lines, without a line break at the end.

    Examples
    --------
    >>> import numpy as np, confprune
    >>> losses = np.zeros((500, 2))
    >>> losses[:100, 1] = 1
    >>> print(report(confprune.calibrate_losses(losses, [0.6, 0.9], alpha=0.05, delta=0.1)))
    ... # doctest: +ELLIPSIS
    Certified: 60.0 % sparsity
    <BLANKLINE>
    With probability at least 90 %, ...
    """
    paragraphs = [
        title(certificate),
        _wrap(promise(certificate)),
        _wrap(_foundation(certificate)),
    ]
    if certificate.looks is not None and len(certificate.looks.sizes) > 1:
        paragraphs.append(_wrap(_early_looks(certificate)))
    paragraphs.append(_levels(certificate))
    if len(certificate.parts) > 1:
        paragraphs += [
            _parts(certificate, level)
            for level in (certificate.level, certificate.obstacle)
            if level is not None
        ]
    if certificate.sparsity == 0:
        paragraphs.append(_wrap(advice(certificate)))
    paragraphs += [_wrap(f"Note: {note}") for note in certificate.notes]
    if certificate.versions:
        versions = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
        paragraphs.append(f"Made with {versions}.")
    return "\n\n".join(paragraphs)


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _foundation(certificate: Certificate) -> str:
    text = (
        f"This rests on {certificate.n:,} independent examples of the same distribution as the "
        f"new data, {_method(certificate)}."
    )
    level = certificate.level
    if level is not None and certificate.acceptance is not None:
        text += (
            f" At {sparsity_text(certificate, certificate.sparsity)} sparsity "
            f"{100 * certificate.acceptance[level]:.1f} % of the predictions were accepted."
        )
    pruning = certificate.pruning
    if pruning is not None:
        text += (
            f" Pruned are the {counted(pruning.total, 'weight')} of "
            f"{counted(len(pruning.parameters), 'parameter')} (scope {pruning.scope}, criterion "
            f"{pruning.criterion}"
        )
        text += ")." if pruning.pattern is None else f", pattern {pruning.pattern})."
        text += _share_of_network(certificate, pruning)
        if pruning.score_data is not None:
            text += f" {_scored(pruning.score_data, used=bool(pruning.statistics))}"
    if asymptotic(certificate):
        text += " For small samples the true probability may be lower than stated."
    return text


def _share_of_network(certificate: Certificate, pruning: Pruning) -> str:
    """How much of the whole network the certified sparsity prunes, where both are known."""
    if pruning.network is None or not certificate.sparsity:
        return ""
    share = 100 * certificate.sparsity * pruning.total / pruning.network
    at = sparsity_text(certificate, certificate.sparsity)
    return f" {at} of them are {share:.1f} % of the network's {pruning.network:,}."


def _scored(data: ScoreData, *, used: bool) -> str:
    """Where the scores came from, or those of a candidate that was not chosen."""
    number = "others" if data.examples is None else f"{data.examples:,} other examples"
    where = "set aside from the data" if data.source == "split" else "given for that"
    whose = "Their scores" if used else "The scores of another candidate"
    return f"{whose} were made with {number}, {where}; none of them calibrated."


def _method(certificate: Certificate) -> str:
    """What was computed, with the kind of guarantee that it gives."""
    kind = "asymptotic" if asymptotic(certificate) else "finite-sample, distribution-free"
    count, tested = len(certificate.sparsities), len(certificate.tested)
    levels = counted(count, "level")
    if tested < count:
        levels = f"{tested} of {levels}"
    if certificate.guarantee == "expectation":
        return (
            f"and conformal risk control (finite-sample, distribution-free) over {levels}: the "
            "mean loss, corrected for the new example, is compared with alpha"
        )
    names = enumeration(pvalue_names(certificate))
    if certificate.guarantee == "monotone":
        return (
            f"and upper confidence bounds on the monotonised risk of {levels}, from {names} "
            f"p-values ({kind})"
        )
    return f"{names} p-values ({kind}) and {certificate.procedure} testing of {levels}"


def _early_looks(certificate: Certificate) -> str:
    looks = certificate.looks
    assert looks is not None
    sizes = [f"{size:,}" for size in looks.sizes]
    if len(sizes) > MOST_LOOKS:
        sizes = [*sizes[:3], "...", sizes[-1]]
        at = f"{', '.join(sizes)} examples ({len(looks.sizes)} looks)"
    else:
        at = f"{enumeration(sizes)} examples"
    order = f"a random order (seed {certificate.seed})"
    if looks.order == "given":
        order = "the order given"
    return (
        f"The levels were tested at {at}, in {order}, each only until it was settled: that saved "
        f"{100 * looks.saved:.1f} % of the evaluations."
    )


def _levels(certificate: Certificate) -> str:
    """The tested levels around the border between certified and not."""
    tested, level = certificate.tested, certificate.level
    border = -1 if level is None else tested.index(level)
    shown = tested[max(0, border - LEVELS_AROUND) : border + LEVELS_AROUND + 1]
    columns = {
        "sparsity": [sparsity_text(certificate, certificate.sparsities[j]) for j in shown],
        "examples": _seen(certificate, shown),
        "accepted": _percents(certificate.acceptance, shown),
        "risk": _numbers(certificate.risks, shown, ".4f"),
        _BOUND.get(certificate.guarantee, "bound"): _numbers(certificate.bounds, shown, ".4f"),
        "p-value": _numbers(certificate.pvalues, shown, ".2g"),
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) - {"-"}}
    verdicts = [_verdict(certificate, j) for j in shown]
    text = _table(columns, [j == level for j in shown], verdicts)
    if certificate.binding is not None:
        lead = _wrap(f"Risk and bound are of what binds, {certificate.binding.name!r}:")
        text = f"{lead}\n{text}"
    if _NOT_REACHED in verdicts:
        text += "\n\n" + _wrap(
            "Levels are tested in order, up to the first that is not certified: those behind it "
            f"are {_NOT_REACHED}, however small their p-values."
        )
    return text


def _verdict(certificate: Certificate, level: int) -> str:
    """What became of a level; where they are tested in order, the first failure ends it."""
    if certificate.rejected[level]:
        return "certified"
    first, delta = certificate.obstacle, certificate.delta
    if first is None or delta is None or not in_order(certificate):
        return "not certified"
    behind = level > first or certificate.pvalues[level] <= delta
    return _NOT_REACHED if behind else "not certified"


def _parts(certificate: Certificate, level: int) -> str:
    """Each risk and group at one level."""
    order = closest(certificate.parts, level)
    binding = next(p for p in order if certificate.parts[p] is certificate.binding)
    shown, more = sorted(order), 0
    if len(order) > MOST_PARTS:
        shown = order[:CLOSEST_PARTS]
        if binding not in shown:
            shown[-1] = binding
        more = len(order) - CLOSEST_PARTS
    parts = [certificate.parts[p] for p in shown]
    columns = {
        "alpha": [f"{part.alpha:g}" for part in parts],
        "examples": [f"{part.counts[level]:,}" for part in parts],
        "risk": [_number(part.risks[level], ".4f") for part in parts],
        "bound": [_number(part.bounds[level], ".4f") for part in parts],
        "p-value": [_number(part.pvalues[level], ".2g") for part in parts],
    }
    names = [_short(part_text(certificate, part)) for part in parts]
    columns = {_kind(certificate): names, **columns}
    marks = [p == binding for p in shown]
    table = _table(columns, marks, ["binds" if mark else "" for mark in marks])
    sparsity = sparsity_text(certificate, certificate.sparsities[level])
    text = f"At {sparsity} sparsity, {_verdict(certificate, level)}:\n{table}"
    if more:
        text += f"\n  and {more:,} more, further from their alpha"
    return text


def _kind(certificate: Certificate) -> str:
    """What tells the parts apart, as the head of their column."""
    groups = any(part.group is not None for part in certificate.parts)
    losses = len({part.loss for part in certificate.parts}) > 1
    return ("loss and group" if losses else "group") if groups else "loss"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."


def _seen(certificate: Certificate, levels: Sequence[int]) -> list[str]:
    """The examples on which levels were tested, unless on all of them."""
    looks = certificate.looks
    if looks is None or all(looks.seen[j] == certificate.n for j in levels):
        return []
    return [f"{looks.seen[j]:,}" for j in levels]


def _percents(shares: Sequence[float] | None, levels: Sequence[int]) -> list[str]:
    return [] if shares is None else [f"{100 * shares[j]:.1f} %" for j in levels]


def _numbers(values: Sequence[float], levels: Sequence[int], form: str) -> list[str]:
    return [_number(values[j], form) for j in levels]


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _table(columns: dict[str, list[str]], marks: Sequence[bool], remarks: Sequence[str]) -> str:
    """Columns under their names, the first flush left if it holds words; a mark before its row."""
    lines = [" "] + [">" if mark else " " for mark in marks]
    for name, cells in columns.items():
        words = name in ("loss", "group", "loss and group")
        width = max(map(len, [name, *cells])) if words else 10 if name == "sparsity" else 9
        for row, cell in enumerate([name, *cells]):
            lines[row] += " " + (cell.ljust(width) if words else cell.rjust(width))
    return "\n".join(
        f"{line}   {remark}".rstrip() for line, remark in zip(lines, ["", *remarks], strict=True)
    )
