"""What is to be kept small: risks, the groups they are kept on, and the examples that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from confprune.batches import batch_length
from confprune.calling import targets_of
from confprune.losses import Loss, LossLike, Reference, resolve_loss
from confprune.risk.inputs import check_probability
from confprune.risk.pvalues import resolve_pvalue

Groups: TypeAlias = str | Callable[[Any], Sequence[Any] | Tensor]
"""A key of the batch, "targets", or a callable from a batch to one group per example."""

Accept: TypeAlias = Loss | Callable[[Tensor, Reference], Tensor]
"""Which predictions count: (outputs [B, ...], reference) -> [B], true or 1 where accepted."""


@dataclass(frozen=True)
class Risk:
    """An expected loss, and the most it may be.

    Parameters
    ----------
    loss : str, Loss, or callable (outputs [B, ...], reference) -> [B]
    alpha : float in (0, 1)

    Examples
    --------
    >>> import confprune
    >>> confprune.Risk("harm", alpha=0.01).loss.name
    'harm'
    """

    loss: Loss
    alpha: float

    def __init__(self, loss: LossLike, alpha: float) -> None:
        object.__setattr__(self, "loss", resolve_loss(loss))
        object.__setattr__(self, "alpha", check_probability("alpha", alpha))


@dataclass(frozen=True)
class Target:
    """One risk on one group of examples (None: on all), with the p-value that tests it."""

    risk: Risk
    group: str | None
    pvalue: str


def resolve_risks(
    loss: LossLike | None, alpha: float | None, risks: Sequence[Risk] | None, pvalue: str
) -> tuple[Risk, ...]:
    """The risks that a caller asked for, as one loss and alpha or as a list.

    A user's own loss is taken to be 0 or 1 where the p-value needs that; its values are checked.
    """
    if risks is None:
        if loss is None or alpha is None:
            raise ValueError("give loss= and alpha=, or several as risks=[Risk(loss, alpha), ...]")
        risks = [Risk(loss, alpha)]
        loss = alpha = None
    if loss is not None or alpha is not None:
        raise ValueError("risks= was given beside loss= or alpha=; put them all into risks=")
    if not isinstance(risks, Sequence):
        raise TypeError(
            f"risks must be a list, such as [Risk(loss, alpha), ...], got {type(risks).__name__}"
        )
    if not risks:
        raise ValueError("risks is empty; give at least one Risk(loss, alpha)")
    for risk in risks:
        if not isinstance(risk, Risk):
            raise TypeError(f"risks must hold Risk(loss, alpha), got {type(risk).__name__}")
    names = [risk.loss.name for risk in risks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"risks holds {name!r} twice; keep the one with the smaller alpha")
    if pvalue == "binomial":
        risks = [
            risk if risk.loss.vmappable else Risk(replace(risk.loss, binary=True), risk.alpha)
            for risk in risks
        ]
    return tuple(risks)


def resolve_targets(
    risks: Sequence[Risk], groups: Sequence[str] | None, pvalue: str, *, early: bool
) -> list[Target]:
    """Every risk on every group, with the p-value of its loss.

    ``"auto"`` is decided by what the loss says of itself, before any value has been seen: binomial
    where it is 0 or 1; else betting with early looks, which it needs not pay for, and convex
    without.
    """
    chosen = {}
    for loss in (risk.loss for risk in risks):
        name = "betting" if pvalue == "auto" and early and not loss.binary else pvalue
        chosen[loss.name] = resolve_pvalue(name, loss.binary).name
    every: Sequence[str | None] = groups or [None]
    return [Target(risk, group, chosen[risk.loss.name]) for risk in risks for group in every]


def group_labels(batch: Any, groups: Groups) -> list[str]:
    """The group of each example of a batch, as text.

    Raises
    ------
    ValueError
        If the batch has no such key, or there is not one group per example.

    Examples
    --------
    >>> import torch
    >>> from confprune.risks import group_labels
    >>> group_labels((torch.zeros(2, 4), torch.tensor([1, 0])), "targets")
    ['1', '0']
    """
    labels: Any
    if callable(groups):
        labels = groups(batch)
    elif groups == "targets":
        labels = targets_of(batch)
    elif isinstance(batch, Mapping):
        labels = batch.get(groups)
    else:
        raise ValueError(
            f"groups={groups!r} names a key, but the batch is a {type(batch).__name__}; use "
            "'targets', or a callable from the batch to one group per example"
        )
    if labels is None and callable(groups):
        raise ValueError("groups returned None; it must give one group per example")
    if labels is None:
        raise ValueError(f"groups={groups!r} was not found in the batch")
    values = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    size = batch_length(batch)
    if len(values) != size or any(isinstance(value, list) for value in values):
        got = list(labels.shape) if isinstance(labels, Tensor) else len(values)
        raise ValueError(f"groups must give one group per example, [{size}], got {got}")
    return [str(value) for value in values]


def confident(threshold: float, *, of: str = "full") -> Loss:
    """Accept the predictions whose confidence, the largest class probability, reaches a threshold.

    Parameters
    ----------
    threshold : float in (0, 1)
    of : {"full", "pruned"}
        Whose confidence decides: the full network's (the same examples at every level), or the
        pruned network's own (what it would answer when deployed alone).

    Returns
    -------
    Loss
        For ``calibrate(..., accept=...)``.

    Examples
    --------
    >>> import torch, confprune
    >>> accept = confprune.confident(0.9, of="pruned")
    >>> scores = torch.tensor([[5.0, 0.0], [0.1, 0.0]])
    >>> accept(scores, confprune.Reference(scores))
    tensor([1., 0.])
    """
    check_probability("threshold", threshold)
    if of not in ("full", "pruned"):
        raise ValueError(f"of must be 'full' or 'pruned', got {of!r}")

    def accepted(outputs: Tensor, reference: Reference) -> Tensor:
        scores = reference.outputs if of == "full" else outputs
        return (scores.float().softmax(dim=-1).amax(dim=-1) >= threshold).float()

    return Loss(f"confidence of the {of} network >= {threshold:g}", accepted, True, vmappable=True)


def resolve_accept(accept: Accept) -> Loss:
    """An acceptance rule as a measure with values 0 and 1."""
    if isinstance(accept, Loss):
        return accept
    if not callable(accept):
        raise TypeError(
            f"accept must be a callable (outputs, reference) -> [B], got {type(accept).__name__}; "
            "for a confidence use accept=confprune.confident(0.9)"
        )

    def accepted(outputs: Tensor, reference: Reference) -> Tensor:
        values = accept(outputs, reference)
        _check_accepted(values, len(outputs))
        return values.to(torch.float32)

    return Loss(getattr(accept, "__name__", "accept"), accepted, True)


def _check_accepted(values: object, size: int) -> None:
    """Raise ValueError unless there is a yes or no for each of so many examples.

    What lies on another device than the CPU is looked at with the losses, when these are there.
    """
    asked = f"for {size} examples; it must return true or false for each, a tensor [B]"
    if not isinstance(values, Tensor):
        raise ValueError(f"accept returned a {type(values).__name__} {asked}")
    if values.shape != (size,):
        raise ValueError(f"accept returned shape {list(values.shape)} {asked}")
    if values.device.type != "cpu":
        return
    unclear = values[(values != 0) & (values != 1)]
    if len(unclear):
        raise ValueError(f"accept returned {unclear[0].item():g} {asked}: compare with a threshold")
