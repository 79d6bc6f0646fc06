"""Ways of pruning: the criteria, scopes and patterns that a caller asks for, each with each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from confprune.competition import check_scope
from confprune.criteria import Criterion, CriterionLike, resolve_criterion
from confprune.patterns import resolve_pattern


class Way(NamedTuple):
    """One way of pruning."""

    criterion: Criterion
    scope: str
    pattern: str | None


def resolve_ways(
    criterion: CriterionLike | Sequence[CriterionLike],
    scope: str | Sequence[str] | None,
    pattern: str | Sequence[str | None] | None,
) -> list[Way]:
    """Every criterion with every scope and pattern.

    Raises
    ------
    TypeError
        If something is neither a name nor several.
    ValueError
        If something is unknown, given twice, or does not go with the others.

    Examples
    --------
    >>> from confprune.ways import resolve_ways
    >>> for way in resolve_ways(["magnitude", "wanda"], None, [None, "4x4"]):
    ...     print(way.criterion, way.scope, way.pattern)
    magnitude global None
    magnitude global 4x4
    wanda row None
    wanda global 4x4
    """
    one = isinstance(criterion, str | Criterion) or callable(criterion)
    criteria = _several("criterion", [criterion] if one else criterion)
    scopes = _several("scope", [scope] if scope is None or isinstance(scope, str) else scope)
    patterns = _several(
        "pattern", [pattern] if pattern is None or isinstance(pattern, str) else pattern
    )
    resolved = _several("criterion", [resolve_criterion(one) for one in criteria])
    return [
        Way(chosen, check_scope(one_scope, chosen, resolve_pattern(one_pattern)), one_pattern)
        for chosen in resolved
        for one_scope in scopes
        for one_pattern in patterns
    ]


def _several(name: str, values: Any) -> list[Any]:
    """At least one value, each once."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a name, or a list of several, got {values!r}")
    several = list(values)
    texts = [str(value) for value in several]
    if not several or len(set(texts)) < len(texts):
        raise ValueError(f"{name} must name at least one, each once, got {several}")
    return several
