"""The testing procedures by name, with what calibration must know about each, and a user's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from confprune.risk.testing import (
    BoolArray,
    bonferroni,
    fixed_sequence,
    graphical,
    holm,
    split_fixed_sequence,
)


@dataclass(frozen=True)
class Procedure:
    """A testing procedure, and what calibration must know about it.

    Attributes
    ----------
    name : str
        How users ask for it.
    test : callable
        ``(pvalues [K], delta, **needs) -> bool [K]``.
    needs : tuple of str
        Names of further arguments without which it cannot run.
    chain : bool
        A level that is not rejected ends the test of all later ones.
    bonferroni_start : bool
        Some p-value has to reach delta / K before any level is tested at more.
    """

    name: str
    test: Callable[..., BoolArray]
    needs: tuple[str, ...] = ()
    chain: bool = False
    bonferroni_start: bool = False


PROCEDURES = MappingProxyType(
    {
        procedure.name: procedure
        for procedure in (
            Procedure("fixed_sequence", fixed_sequence, chain=True),
            Procedure("bonferroni", bonferroni, bonferroni_start=True),
            Procedure("holm", holm, bonferroni_start=True),
            Procedure("graphical", graphical, needs=("weights", "transitions")),
            Procedure("split_fixed_sequence", split_fixed_sequence, needs=("order",), chain=True),
        )
    }
)
"""All testing procedures by name."""


def resolve_procedure(procedure: str | Callable[..., BoolArray]) -> Procedure:
    """Look up a testing procedure by name, or take a callable for one.

    A callable ``(pvalues [K], delta) -> bool [K]`` is for procedures that need more, such as
    ``functools.partial(graphical, weights=..., transitions=...)``. What it returns is checked.

    Raises
    ------
    ValueError
        If the name is unknown; the valid ones are listed.

    Examples
    --------
    >>> resolve_procedure("holm").test is holm
    True
    """
    if callable(procedure):
        for known in PROCEDURES.values():
            if procedure is known.test:
                return known
        name = _name(procedure)
        return Procedure(name, functools.partial(_checked, name, procedure))
    if procedure not in PROCEDURES:
        raise ValueError(
            f"unknown procedure {procedure!r}; choose one of {', '.join(PROCEDURES)}, or pass a "
            "callable (pvalues, delta) -> bool [K]"
        )
    return PROCEDURES[procedure]


def _name(procedure: Callable[..., BoolArray]) -> str:
    """What a certificate calls a procedure of the caller's own: never as one of ours."""
    if isinstance(procedure, functools.partial):
        name = getattr(procedure.func, "__name__", "procedure")
        return f"{name}({', '.join(f'{argument}=...' for argument in procedure.keywords)})"
    name = getattr(procedure, "__name__", "procedure")
    return f"own {name}" if name in PROCEDURES else name


def _checked(
    name: str, procedure: Callable[..., BoolArray], pvalues: ArrayLike, delta: float
) -> BoolArray:
    """What a procedure of the caller's own rejects, or an error where that is no bool [K]."""
    found, levels = procedure(pvalues, delta), len(np.asarray(pvalues))
    rejected = np.asarray(found)
    if rejected.dtype != np.bool_ or rejected.shape != (levels,):
        got = type(found).__name__ if rejected.ndim == 0 else f"{rejected.dtype} {rejected.shape}"
        raise ValueError(
            f"procedure {name!r} must return which of the {levels} levels are rejected, as bool "
            f"[{levels}], got {got}"
        )
    return rejected
