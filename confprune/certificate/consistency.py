"""Whether the fields of a certificate agree with each other: files can be edited by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from confprune.certificate.evidence import Part, check_unit, plain_floats
from confprune.risk.procedures import PROCEDURES
from confprune.risk.pvalues import PVALUES

if TYPE_CHECKING:
    from confprune.certificate import Certificate

GUARANTEES = ("risk", "expectation", "monotone")


def check_consistent(certificate: Certificate) -> None:
    """Raise ValueError for contradictory fields, naming the first."""
    _check_levels(certificate)
    _check_guarantee(certificate)
    _check_parts(certificate)
    _check_looks(certificate)


def is_of(certificate: Certificate, part: Part) -> bool:
    """Whether the certificate's own values are those of the part."""
    same = all(
        getattr(certificate, name) == getattr(part, name) for name in ("loss", "pvalue", "alpha")
    )
    # Through plain_floats, for a NaN is not itself any more once it has been pickled.
    return same and all(
        plain_floats(getattr(certificate, name)) == plain_floats(getattr(part, name))
        for name in ("risks", "bounds")
    )


def why_unsupported(certificate: Certificate, parts: Sequence[Part], level: int) -> str | None:
    """Why a level's risks do not show what the certificate states of it; None if they do.

    The p-value of a level that was rejected is at most delta, also by itself and at an early look:
    what a test rejects at a part of delta, it rejects at all of it. Of several risks, each may have
    been shown on fewer examples than the last look had, and p-values that take more than the sum of
    the losses are not computed again: these are taken as they are stated.
    """
    # Of "graphical(weights=..., transitions=...)" the same is known as of "graphical".
    if certificate.guarantee != "risk" or certificate.procedure.split("(")[0] not in PROCEDURES:
        return None
    assert certificate.delta is not None
    for part in parts:
        pvalue, kind = certificate.pvalues[level], PVALUES.get(part.pvalue)
        again = len(parts) == 1 or certificate.looks is None
        if again and kind is not None and kind.from_sums is not None and part.counts[level]:
            total = part.risks[level] * part.counts[level]
            if kind.binary_only:
                total = round(total)
            pvalue = float(kind.from_sums(np.array([total]), part.counts[level], part.alpha)[0])
        if pvalue > certificate.delta * (1 + 1e-6):
            return (
                f"a {part.name} of {part.risks[level]:.6g} on {part.counts[level]} examples "
                f"(p-value {pvalue:.2g}) does not show one of at most {part.alpha:g} with delta "
                f"{certificate.delta:g}: the certificate was changed after it was made"
            )
    return None


def _check_levels(certificate: Certificate) -> None:
    levels = len(certificate.sparsities)
    if levels == 0:
        raise ValueError("sparsities is empty")
    for name in ("risks", "pvalues", "bounds", "rejected", "acceptance"):
        values = getattr(certificate, name)
        if values is None:
            continue
        if len(values) != levels:
            raise ValueError(f"{name} has {len(values)} values for {levels} sparsities")
        check_unit(name, values)
    grid = certificate.sparsities
    increasing = all(a < b for a, b in itertools.pairwise(grid))
    if not (increasing and grid[0] >= 0 and grid[-1] < 1):
        raise ValueError("sparsities must be strictly increasing, in [0, 1)")
    if not 0 < certificate.alpha < 1:
        raise ValueError(f"alpha is {certificate.alpha}, outside (0, 1)")
    if certificate.n < 1:
        raise ValueError(f"n is {certificate.n}, fewer than one example")
    if (certificate.accept is None) != (certificate.acceptance is None):
        raise ValueError("accept and acceptance must be given together")


def _check_guarantee(certificate: Certificate) -> None:
    guarantee, delta = certificate.guarantee, certificate.delta
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee is {guarantee!r}, not one of {list(GUARANTEES)}")
    if guarantee == "expectation":
        if delta is not None:
            raise ValueError(f"delta is {delta}, but a guarantee in expectation has none")
    elif delta is None or not 0 < delta < 1:
        raise ValueError(f"delta is {delta}, outside (0, 1)")


def _check_parts(certificate: Certificate) -> None:
    parts, levels = certificate.parts, len(certificate.sparsities)
    if not parts:
        return
    for part in parts:
        if len(part.counts) != levels:
            raise ValueError(
                f"part {part.name!r} has {len(part.counts)} levels for {levels} sparsities"
            )
        if max(part.counts) > certificate.n:
            raise ValueError(
                f"part {part.name!r} counts {max(part.counts)} examples, more than n, "
                f"{certificate.n}"
            )
    if not any(is_of(certificate, part) for part in parts):
        raise ValueError("loss, alpha, risks and bounds are not those of any part")
    largest = tuple(max(values) for values in zip(*(p.pvalues for p in parts), strict=True))
    if plain_floats(largest) != certificate.pvalues:
        raise ValueError("pvalues are not the largest of the parts")


def _check_looks(certificate: Certificate) -> None:
    looks = certificate.looks
    if looks is None:
        return
    if len(looks.seen) != len(certificate.sparsities):
        raise ValueError(
            f"looks: seen has {len(looks.seen)} values for {len(certificate.sparsities)} sparsities"
        )
    if looks.sizes[-1] != certificate.n:
        raise ValueError(
            f"looks: the last is at {looks.sizes[-1]} examples, but n is {certificate.n}"
        )
    if looks.order == "permuted" and certificate.seed is None:
        raise ValueError("looks: the order is permuted, but seed is missing")
    spent = math.fsum(looks.spending)
    if certificate.delta is None or spent > certificate.delta * (1 + 1e-12):
        raise ValueError(f"looks: {spent:g} is spent in all, more than delta")
