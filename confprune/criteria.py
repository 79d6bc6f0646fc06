"""Pruning criteria: functions from a weight to its scores.

A criterion takes one weight tensor and returns scores of the same shape; the weights with the
smallest absolute scores are pruned first. To add one, write the function and name it in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Criterion = Callable[[Tensor], Tensor]


def magnitude(weight: Tensor) -> Tensor:
    """The weight itself: its absolute value is the score.

    Selection compares absolute values without making them, so no copy is needed.

    Examples
    --------
    >>> import torch, confprune
    >>> confprune.criteria.magnitude(torch.tensor([1.0, -2.0]))
    tensor([ 1., -2.])
    """
    return weight


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude}


def resolve_criterion(criterion: str) -> Criterion:
    """The criterion with this name.

    Raises
    ------
    ValueError
        If there is none, naming those there are.

    Examples
    --------
    >>> from confprune.criteria import resolve_criterion
    >>> resolve_criterion("magnitude").__name__
    'magnitude'
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is unknown; choose from {sorted(CRITERIA)}")
    return CRITERIA[criterion]
