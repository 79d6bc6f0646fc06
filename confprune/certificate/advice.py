"""What would let the first level that is not certified pass: more examples, or another alpha."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from confprune.certificate.promise import in_order, sparsity_text
from confprune.risk.pvalues import PVALUES

if TYPE_CHECKING:
    from confprune.certificate import Certificate

MOST_EXAMPLES = 10_000_000


def advice(certificate: Certificate) -> str:
    """Say what would help where nothing, or only the full network, is certified.

    Parameters
    ----------
    certificate : Certificate

    Returns
    -------
    str

    Examples
    --------
    >>> import numpy as np, confprune
    >>> losses = np.zeros((100, 1))
    >>> losses[:4] = 1
    >>> certificate = confprune.calibrate_losses(losses, [0.5], alpha=0.05, delta=0.1)
    >>> advice(certificate).split(",")[0]
    'What would help: about 962 examples'
    """
    level = certificate.obstacle
    if level is None:
        return "What would help: sparsities above 0 in the grid."
    sparsity = sparsity_text(certificate, certificate.sparsities[level])
    risk, alpha = certificate.risks[level], certificate.alpha
    lead, options, caveat = "", [], ""
    if certificate.binding is not None:
        lead = f"What binds is {certificate.binding.name!r}. "
    if math.isnan(risk):
        options.append(f"{_needed(certificate, level)}: on these nothing counted")
    elif risk < alpha:
        options.append(
            f"{_needed(certificate, level)}, if the risk at {sparsity} sparsity stays at the "
            f"{risk:.4g} seen on these"
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
    return (
        f"{lead}What would help: {helpful}.{caveat} Choose them before drawing the next examples."
    )


def _needed(certificate: Certificate, level: int) -> str:
    """How many examples would do, and of which kind."""
    available = _available(certificate, level)
    binding = certificate.binding
    group = None if binding is None else binding.group
    kind = "examples" if certificate.accept is None else "accepted examples"
    if group is not None:
        kind += f" of group {group}"
    needed = _examples_needed(certificate, level, available)
    number = f"about {needed:,}" if needed else f"more than {MOST_EXAMPLES:,}"
    if needed == available + 1:
        number = f"somewhat more than {available:,}"
    text = f"{number} {kind}"
    return f"{text} rather than some {available:,}" if kind != "examples" and available else text


def _available(certificate: Certificate, level: int) -> int:
    """How many examples count, or would have counted had the level been tested on all."""
    seen = certificate.n if certificate.looks is None else certificate.looks.seen[level]
    counted: float = seen
    if certificate.binding is not None:
        counted = certificate.binding.counts[level]
    elif certificate.acceptance is not None:
        counted = seen * certificate.acceptance[level]
    return round(counted * certificate.n / max(seen, 1))


def _examples_needed(certificate: Certificate, level: int, available: int) -> int | None:
    """Smallest n beyond the available, about, that does at the same mean loss; None if too many."""
    too_few, enough = available, available + 1
    while not _suffices(certificate, level, enough):
        too_few, enough = enough, 2 * enough
        if enough > MOST_EXAMPLES:
            return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if _suffices(certificate, level, middle):
            enough = middle
        else:
            too_few = middle
    return enough


def _suffices(certificate: Certificate, level: int, n: int) -> bool:
    """Whether the level would pass on n examples of the same mean loss."""
    risk = certificate.risks[level]
    total = 0.0 if math.isnan(risk) else risk * n
    if certificate.guarantee == "expectation":
        return (total + 1) / (n + 1) <= certificate.alpha
    kind = PVALUES.get(certificate.pvalue)
    # For a p-value that needs more than the sums, the strongest of those that do not stands in.
    from_sums = (kind and kind.from_sums) or PVALUES["convex"].from_sums
    assert from_sums is not None
    if kind is not None and kind.binary_only:
        total = math.ceil(total - 1e-6)
    value = from_sums(np.array([total]), n, certificate.alpha)
    return bool(value[0] <= _significance(certificate))


def _significance(certificate: Certificate) -> float:
    """The significance at which the procedure tests its first hypothesis, at the last look."""
    delta = certificate.delta
    assert delta is not None
    if certificate.guarantee == "risk" and not in_order(certificate):
        delta /= len(certificate.sparsities)
    kind = PVALUES.get(certificate.pvalue)
    # The exact test and betting do not pay for each look.
    if certificate.looks is not None and not (kind and (kind.binary_only or kind.anytime)):
        delta *= certificate.looks.spending[-1] / math.fsum(certificate.looks.spending)
    return delta


def _reachable(certificate: Certificate, level: int) -> str:
    """The smallest alpha that the level could have passed, where the bounds tell it.

    They do where the test was one at delta or in expectation, on all the examples, of one risk.
    """
    bound = max(certificate.bounds[: level + 1])
    plain = certificate.looks is None and not certificate.parts
    in_expectation = certificate.delta is None
    at_delta = in_expectation or _significance(certificate) == certificate.delta
    if not (plain and at_delta and bound < 1):
        return ""
    # Rounded up, because a smaller alpha would not do.
    smallest = math.ceil(bound * 1e4) / 1e4
    return f", {smallest:g} or more with examples like these"
