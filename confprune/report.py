"""The report of a certificate in plain text: the promise, what it rests on, what would help."""

from __future__ import annotations

import itertools
import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from confprune.risk.pvalues import PVALUES

if TYPE_CHECKING:
    from confprune.certificate import Certificate

WIDTH = 88
LEVELS_AROUND = 3
MOST_EXAMPLES = 10_000_000

_MEANING = {
    "disagreement": "disagreement with the full network",
    "error": "error rate",
    "harm": "rate of errors where the full network is right",
    "soft_disagreement": "soft disagreement with the full network",
    "dice": "Dice loss",
    "iou": "IoU loss",
    "false_negative_rate": "false negative rate",
    "pixel_disagreement": "share of wrong pixels",
    "token_disagreement": "share of tokens unlike the full network's",
    "losses": "loss",
    "cosine": "cosine loss against the full network's embeddings",
}


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
    title = "Nothing is certified: the network stays as it is"
    if certificate.certified:
        title = f"Certified: {sparsity_text(certificate, certificate.sparsity)} sparsity"
    paragraphs = [_wrap(promise(certificate)), _wrap(_foundation(certificate)), _table(certificate)]
    if certificate.sparsity == 0:
        paragraphs.append(_wrap(_advice(certificate)))
    paragraphs += [_wrap(f"Note: {note}") for note in certificate.notes]
    if certificate.versions:
        versions = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
        paragraphs.append(f"Made with {versions}.")
    return "\n\n".join([title, *paragraphs])


def promise(certificate: Certificate) -> str:
    """Say in one sentence what may be claimed.

    Parameters
    ----------
    certificate : Certificate

    Returns
    -------
    str
    """
    meaning = loss_text(certificate)
    if not certificate.certified:
        return (
            f"No level of the grid could be shown to have an expected {meaning} of at most "
            f"{certificate.alpha:g} on new data, with probability at least "
            f"{_percent(1 - certificate.delta)}."
        )
    start = "Asymptotically, with" if _asymptotic(certificate) else "With"
    return (
        f"{start} probability at least {_percent(1 - certificate.delta)}, the network pruned to "
        f"{sparsity_text(certificate, certificate.sparsity)} sparsity has, on new data, an "
        f"expected {meaning} of at most {certificate.alpha:g}."
    )


def loss_text(certificate: Certificate) -> str:
    """Name a certificate's loss as in "an expected ..."."""
    return _MEANING.get(certificate.loss, f"loss {certificate.loss!r}")


def sparsity_text(certificate: Certificate, sparsity: float) -> str:
    """Write a sparsity in percent, with the decimals that tell this grid's levels apart."""
    percents = [100 * value for value in certificate.sparsities]
    step = min((b - a for a, b in itertools.pairwise(percents)), default=100)
    decimals = 1
    while decimals < 6 and any(abs(round(p, decimals) - p) > 0.02 * step for p in percents):
        decimals += 1
    return f"{100 * sparsity:.{decimals}f} %"


def _asymptotic(certificate: Certificate) -> bool:
    kind = PVALUES.get(certificate.pvalue)
    return kind is not None and kind.asymptotic


def _percent(probability: float) -> str:
    return f"{100 * probability:.6g} %"


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _foundation(certificate: Certificate) -> str:
    kind = "asymptotic" if _asymptotic(certificate) else "finite-sample, distribution-free"
    levels = len(certificate.sparsities)
    text = (
        f"This rests on {certificate.n:,} independent examples of the same distribution as the "
        f"new data, {certificate.pvalue} p-values ({kind}) and {certificate.procedure} testing of "
        f"{levels} level{'' if levels == 1 else 's'}."
    )
    pruning = certificate.pruning
    if pruning is not None:
        text += (
            f" Pruned are the {pruning.total:,} weights of {len(pruning.parameters)} parameters "
            f"(scope {pruning.scope}, criterion {pruning.criterion})."
        )
    if _asymptotic(certificate):
        text += " For small samples the true probability may be lower than stated."
    return text


def _table(certificate: Certificate) -> str:
    """The levels around the border between certified and not."""
    border = -1 if certificate.level is None else certificate.level
    first = max(0, border - LEVELS_AROUND)
    last = min(len(certificate.sparsities), border + LEVELS_AROUND + 1)
    lines = [f"  {'sparsity':>10} {'risk':>9} {'bound':>9} {'p-value':>9}"]
    for j in range(first, last):
        marker = ">" if j == border else " "
        lines.append(
            f"{marker} {sparsity_text(certificate, certificate.sparsities[j]):>10}"
            f" {_value(certificate.risks[j], '.4f')} {_value(certificate.bounds[j], '.4f')}"
            f" {_value(certificate.pvalues[j], '.2g')}"
            f"   {'certified' if certificate.rejected[j] else 'not certified'}"
        )
    return "\n".join(lines)


def _value(value: float, form: str) -> str:
    return f"{'-' if math.isnan(value) else format(value, form):>9}"


def _advice(certificate: Certificate) -> str:
    """What would let the first level that is not certified pass."""
    level = _first_obstacle(certificate)
    if level is None:
        return "What would help: sparsities above 0 in the grid."
    sparsity = sparsity_text(certificate, certificate.sparsities[level])
    risk, alpha = certificate.risks[level], certificate.alpha
    options, caveat = [], ""
    if risk < alpha:
        needed = _examples_needed(certificate, level)
        number = f"about {needed:,}" if needed else f"more than {MOST_EXAMPLES:,}"
        options.append(
            f"{number} examples, if the risk at {sparsity} sparsity stays at the {risk:.4g} seen "
            "on these"
        )
    else:
        caveat = (
            f" More examples would not help: the risk on these at {sparsity} sparsity is "
            f"{risk:.4g}, not below alpha."
        )
        if certificate.sparsities[level] > 0:
            options.append("lower sparsities in the grid")
    options.append("a larger alpha" + _reachable(certificate, level))
    helpful = "; or ".join(options)
    return f"What would help: {helpful}.{caveat} Choose them before drawing the next examples."


def _reachable(certificate: Certificate, level: int) -> str:
    """The smallest alpha that the level could have passed, where the bounds tell it."""
    bound = max(certificate.bounds[: level + 1])
    # A bound at 1 - delta answers to a test at delta only.
    if _significance(certificate) != certificate.delta or not bound < 1:
        return ""
    # Rounded up, because a smaller alpha would not do.
    smallest = math.ceil(bound * 1e4) / 1e4
    return f", {smallest:g} or more with examples like these"


def _first_obstacle(certificate: Certificate) -> int | None:
    for j, rejected in enumerate(certificate.rejected):
        if not rejected:
            return j
    return None


def _significance(certificate: Certificate) -> float:
    """The significance at which the procedure tests its first hypothesis."""
    if certificate.procedure == "fixed_sequence":
        return certificate.delta
    return certificate.delta / len(certificate.sparsities)


def _examples_needed(certificate: Certificate, level: int) -> int | None:
    """Smallest n, about, whose p-value at the same mean loss suffices; None if beyond reason."""
    kind = PVALUES.get(certificate.pvalue)
    # For a p-value that needs more than the sums, the strongest of those that do not stands in.
    from_sums = (kind and kind.from_sums) or PVALUES["convex"].from_sums
    assert from_sums is not None

    def suffices(n: int) -> bool:
        total = certificate.risks[level] * n
        if kind is not None and kind.binary_only:
            total = math.ceil(total - 1e-6)
        value = from_sums(np.array([total]), n, certificate.alpha)
        return bool(value[0] <= _significance(certificate))

    enough = certificate.n
    while not suffices(enough):
        enough *= 2
        if enough > MOST_EXAMPLES:
            return None
    too_few = max(enough // 2, certificate.n)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if suffices(middle) else (middle, enough)
    return enough
