"""Criteria by name: text, function or partial function to a criterion and its settings."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from confprune.criteria.layers import erdos_renyi_kernel, lamp
from confprune.criteria.weights import magnitude, magnitude_uncertainty, random, wanda

CriterionLike: TypeAlias = str | Callable[..., Tensor]
"""A name with settings as text, a function of `CRITERIA`, plain or partial, or a `Criterion`."""

CRITERIA: dict[str, Callable[..., Tensor]] = {
    "magnitude": magnitude,
    "magnitude_uncertainty": magnitude_uncertainty,
    "lamp": lamp,
    "erdos_renyi_kernel": erdos_renyi_kernel,
    "wanda": wanda,
    "random": random,
}
"""The criteria by name; a function of your own goes here."""

_OWN_SCOPE = {"wanda": "row"}


@dataclass(frozen=True)
class Criterion:
    """A criterion with its settings; ``str()`` is the text that names both.

    Attributes
    ----------
    name : str
    settings : tuple of (str, value)
        The settings that were given, in the order of the function's parameters.
    function : callable
        (weight, **what it needs, **settings) to scores.
    """

    name: str
    settings: tuple[tuple[str, Any], ...]
    function: Callable[..., Tensor]

    def __call__(self, weight: Tensor, **needed: Any) -> Tensor:
        """The scores of a weight, in its shape."""
        return self.function(weight, **needed, **dict(self.settings))

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings)
        return f"{self.name}({given})" if given else self.name

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be passed beside the weight: its parameters without a default."""
        return tuple(
            name for name, default in _keywords(self.function).items() if default is _REQUIRED
        )

    @property
    def scope(self) -> str:
        """What competes with what unless the caller says otherwise."""
        return _OWN_SCOPE.get(self.name, "global")

    def spared(self, size: int) -> int:
        """How many weights of a layer of this size are never pruned."""
        return min(size, int(dict(self.settings).get("min_per_layer", 0)))


def resolve_criterion(criterion: CriterionLike) -> Criterion:
    """The criterion that a name, with settings or without, or a function stands for.

    Raises
    ------
    ValueError
        If there is none, naming those there are; or for settings that it does not have.
    TypeError
        If it is neither text nor callable.

    Examples
    --------
    >>> from confprune.criteria import magnitude, resolve_criterion
    >>> str(resolve_criterion("magnitude( min_per_layer = 9 )"))
    'magnitude(min_per_layer=9)'
    >>> resolve_criterion(functools.partial(magnitude, min_per_layer=9)).settings
    (('min_per_layer', 9),)
    """
    if isinstance(criterion, Criterion):
        return criterion
    name, given = _named(criterion)
    if name not in CRITERIA:
        raise ValueError(f"criterion {name!r} is unknown; choose from {list(CRITERIA)}")
    function = CRITERIA[name]
    keywords = _keywords(function)
    valid = [key for key, default in keywords.items() if default is not _REQUIRED]
    for key in given:
        if key in keywords and key not in valid:
            raise ValueError(
                f"criterion {name!r} takes {key} from statistics=, not as a setting: it differs "
                "between parameters"
            )
        if key not in valid:
            has = f"it has {valid}" if valid else "it has none"
            raise ValueError(f"criterion {name!r} has no setting {key!r}; {has}")
    return Criterion(name, tuple((key, given[key]) for key in valid if key in given), function)


def _named(criterion: CriterionLike) -> tuple[str, dict[str, Any]]:
    """A name and the settings given with it."""
    if isinstance(criterion, str):
        return (criterion, {}) if criterion in CRITERIA else _parsed(criterion)
    if not callable(criterion):
        raise TypeError(
            f"criterion must be a name or a function of confprune.criteria, got "
            f"{type(criterion).__name__}"
        )
    given: dict[str, Any] = {}
    while isinstance(criterion, functools.partial):
        if criterion.args:
            raise ValueError(f"give the settings of {criterion.func.__name__} by their names")
        given = {**criterion.keywords, **given}
        criterion = criterion.func
    for name, function in CRITERIA.items():
        if function is criterion:
            return name, given
    own = getattr(criterion, "__name__", type(criterion).__name__)
    raise ValueError(
        f"criterion {own!r} is a function without a name that a certificate could record: put it "
        f"into confprune.criteria.CRITERIA, as CRITERIA[{own!r}], and use that name"
    )


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The parts of "name(setting=value, ...)"."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        pass
    if "(" in text:
        raise ValueError(f"criterion {text!r} cannot be read; write name(setting=value, ...)")
    return text, {}


_REQUIRED = inspect.Parameter.empty


def _keywords(function: Callable[..., Tensor]) -> dict[str, Any]:
    """The keyword-only parameters of a criterion, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
