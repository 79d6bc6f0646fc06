"""Losses in [0, 1] of a pruned network's outputs, one value per example.

========================= ===================== ============================================
name                      outputs               loss of one example
========================= ===================== ============================================
``disagreement``          [B, C] scores         top class is not the full network's
``error``                 [B, C] scores         top class is not the label
``harm``                  [B, C] scores         full network right, pruned network wrong
``soft_disagreement``     [B, C] scores         total variation between the softmaxes
``dice``, ``iou``,        [B, C, ...] scores,   1 - overlap, 1 - overlap, share of the object
``false_negative_rate``   or [B, 1, ...] or     missed: mean over classes (see each)
``pixel_disagreement``    [B, H, W] logits      share of pixels with another class
``token_disagreement``    [B, T, V] scores      share of positions with another top token
``cosine``                [B, D] embeddings     (1 - cos) / 2
========================= ===================== ============================================

The segmentation losses compare with the labels [B, ...] or [B, 1, ...] or, where the data has
none, with the full network's prediction. One logit per pixel means foreground if above 0, and only
the foreground is scored. Pixels with a negative label, and 255 among more than two classes, are
left out.

Every built-in takes the outputs of one network [B, ...], or of all levels at once [K, B, ...], and
gives [B] or [K, B]. NaN outputs give a NaN loss, because a network that computes nothing must not
count as one that agrees; so does a label that is no class.

>>> import torch
>>> reference = Reference(outputs=torch.eye(3), targets=None, mask=None)
>>> disagreement(torch.eye(3).roll(1, 0), reference)
tensor([1., 1., 1.])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from confprune.losses import segmentation
from confprune.losses.segmentation import nan_where, share
from confprune.losses.shapes import (
    Check,
    check_classes,
    check_embeddings,
    check_labelled_classes,
    check_pixels,
    check_tokens,
)


class Reference(NamedTuple):
    """What a pruned network's outputs on one batch are compared with.

    Attributes
    ----------
    outputs : Tensor [B, ...]
        The full network's outputs on the batch.
    targets : Tensor [B, ...] or None
        The labels, where the data has them.
    mask : Tensor [B, T] of bool, or None
        True at the positions of sequences that are not padding.
    """

    outputs: Tensor
    targets: Tensor | None = None
    mask: Tensor | None = None

    def clone(self) -> Reference:
        """Copies of all tensors, for who may write into them."""
        return Reference(self.outputs.clone(), cloned(self.targets), cloned(self.mask))


def cloned(tensor: Tensor | None) -> Tensor | None:
    """A copy of what may not be there."""
    return None if tensor is None else tensor.clone()


@dataclass(frozen=True)
class Loss:
    """A named loss: outputs [B, ...] and a `Reference` to values [B] in [0, 1].

    Attributes
    ----------
    name : str
        What the certificate calls it.
    function : callable
        ``(outputs, reference) -> Tensor [B]``.
    binary : bool
        Whether its values are 0 and 1 only, which allows the exact binomial p-value.
    needs_targets : bool
        Whether every batch must bring labels.
    vmappable : bool
        Whether `torch.vmap` may run it over a leading dimension of levels.
    check : callable or None
        ``(name, outputs, reference)``, raises if the loss cannot take these; see `check_shapes`.
    broadcasts : bool
        Whether it also takes outputs [K, B, ...] with the reference of one network, and gives
        [K, B]: what `torch.vmap` would do, in less time.

    Examples
    --------
    >>> import torch
    >>> gap = Loss("gap", lambda outputs, reference: (outputs - reference.outputs).abs().amax(-1))
    >>> gap(torch.tensor([[0.5, 0.0]]), Reference(torch.tensor([[0.25, 0.0]])))
    tensor([0.2500])
    """

    name: str
    function: Callable[[Tensor, Reference], Tensor]
    binary: bool = False
    needs_targets: bool = False
    vmappable: bool = False
    check: Check | None = None
    broadcasts: bool = False

    def __call__(self, outputs: Tensor, reference: Reference) -> Tensor:
        """The loss of each example: outputs [B, ...] to [B]."""
        # Functions of others may write into what they are given: `t[t == -100] = 0`.
        return self.function(outputs, reference if self.broadcasts else reference.clone())


LossLike: TypeAlias = str | Loss | Callable[[Tensor, Reference], Tensor]
"""What `resolve_loss` takes."""

BUILT_IN: dict[str, Loss] = {}
"""The built-in losses by name."""


def resolve_loss(loss: LossLike) -> Loss:
    """Find a loss by name, or wrap a callable as one.

    Parameters
    ----------
    loss : str, Loss or callable
        The name of a built-in, a `Loss`, or ``(outputs [B, ...], reference) -> [B]``. A plain
        callable is named after itself and is evaluated level by level.

    Returns
    -------
    Loss

    Raises
    ------
    ValueError
        If no built-in has this name.
    TypeError
        If it is neither a name nor callable.

    Examples
    --------
    >>> resolve_loss("harm").needs_targets
    True
    >>> resolve_loss("harmony")
    Traceback (most recent call last):
        ...
    ValueError: unknown loss 'harmony': use 'disagreement', 'error', 'harm', 'soft_disagreement', \
'dice', 'iou', 'false_negative_rate', 'pixel_disagreement', 'token_disagreement', 'cosine', or a \
callable (outputs, reference) -> [B]
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss in BUILT_IN:
            return BUILT_IN[loss]
        names = ", ".join(repr(name) for name in BUILT_IN)
        raise ValueError(
            f"unknown loss {loss!r}: use {names}, or a callable (outputs, reference) -> [B]"
        )
    if not callable(loss):
        raise TypeError(f"loss must be a name or a callable, got {type(loss).__name__}")
    return Loss(getattr(loss, "__name__", type(loss).__name__), loss)


def check_shapes(loss: Loss, outputs: object, reference: Reference) -> None:
    """Refuse outputs and labels that a loss cannot take, before any long work.

    Parameters
    ----------
    loss : Loss
        Which loss. Of a user's own only the presence of labels is checked.
    outputs : Tensor [B, ...]
        What the network, pruned or not, gave for the first batch.
    reference : Reference
        What they would be compared with.

    Raises
    ------
    TypeError
        If the outputs are not a tensor.
    ValueError
        If a shape, a dtype or a label value does not fit, or labels are missing. The message
        names the loss, what it takes, what it got and the way out.

    Examples
    --------
    >>> import torch
    >>> check_shapes(resolve_loss("error"), torch.rand(8, 10), Reference(torch.rand(8, 10)))
    Traceback (most recent call last):
        ...
    ValueError: loss 'error' compares with labels and the batch has none: give batches \
(inputs, targets), or use a loss that compares with the full network, such as 'disagreement'
    """
    if loss.needs_targets and reference.targets is None:
        raise ValueError(
            f"loss {loss.name!r} compares with labels and the batch has none: give batches "
            "(inputs, targets), or use a loss that compares with the full network, such as "
            "'disagreement'"
        )
    if loss.check is None:
        return
    for found in (outputs, reference.outputs):
        if not isinstance(found, Tensor):
            raise TypeError(
                f"loss {loss.name!r} takes the outputs as one tensor, got "
                f"{type(found).__name__}: pass forward=, a function (model, batch) -> tensor"
            )
    assert isinstance(outputs, Tensor)
    if outputs.shape != reference.outputs.shape:
        raise ValueError(
            f"loss {loss.name!r}: the pruned network's outputs have shape {list(outputs.shape)} "
            f"and the full network's {list(reference.outputs.shape)}"
        )
    loss.check(loss.name, outputs, reference)


def _built_in(
    check: Check, *, binary: bool = False, needs_targets: bool = False
) -> Callable[[Callable[[Tensor, Reference], Tensor]], Loss]:
    def register(function: Callable[[Tensor, Reference], Tensor]) -> Loss:
        name = function.__name__
        loss = Loss(
            name, function, binary, needs_targets, vmappable=True, check=check, broadcasts=True
        )
        # For help() of the object; a frozen dataclass allows no plain assignment.
        object.__setattr__(loss, "__doc__", function.__doc__)
        BUILT_IN[name] = loss
        return loss

    return register


# Classification: outputs [B, C].


@_built_in(check_classes, binary=True)
def disagreement(outputs: Tensor, reference: Reference) -> Tensor:
    """1 where the pruned network's top class is not the full network's; needs no labels.

    >>> full = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    >>> pruned = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    >>> disagreement(pruned, Reference(full))
    tensor([0., 1.])
    """
    top, broken = _top(outputs)
    full_top, full_broken = _top(reference.outputs)
    return nan_where(broken | full_broken, top != full_top)


@_built_in(check_labelled_classes, binary=True, needs_targets=True)
def error(outputs: Tensor, reference: Reference) -> Tensor:
    """1 where the pruned network's top class is not the label [B].

    >>> scores = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    >>> error(scores, Reference(scores, targets=torch.tensor([0, 1])))
    tensor([0., 1.])
    """
    top, broken = _top(outputs)
    labels, unknown = _class_labels(outputs, reference)
    return nan_where(broken | unknown, top != labels)


@_built_in(check_labelled_classes, binary=True, needs_targets=True)
def harm(outputs: Tensor, reference: Reference) -> Tensor:
    """1 where the full network's top class is the label [B] and the pruned network's is not.

    >>> full = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    >>> pruned = torch.tensor([[0.2, 0.8], [0.3, 0.7]])
    >>> harm(pruned, Reference(full, targets=torch.tensor([0, 1])))
    tensor([1., 0.])
    """
    top, broken = _top(outputs)
    full_top, full_broken = _top(reference.outputs)
    labels, unknown = _class_labels(outputs, reference)
    return nan_where(broken | full_broken | unknown, (full_top == labels) & (top != labels))


@_built_in(check_classes)
def soft_disagreement(outputs: Tensor, reference: Reference) -> Tensor:
    """Total variation distance between the softmaxes of the pruned and the full network.

    It is the largest difference between the probabilities that the two give to any set of classes.

    >>> full, pruned = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> soft_disagreement(pruned, Reference(full))
    tensor([0.2500])
    """
    distance = (_softmax(outputs) - _softmax(reference.outputs)).abs().sum(-1) / 2
    return distance.clamp(max=1)


# Segmentation: outputs [B, C, ...], or one logit per pixel; the example is the image.

dice = _built_in(check_pixels)(segmentation.dice)
iou = _built_in(check_pixels)(segmentation.iou)
false_negative_rate = _built_in(check_pixels)(segmentation.false_negative_rate)
pixel_disagreement = _built_in(check_pixels)(segmentation.pixel_disagreement)


# Sequences: outputs [B, T, V]; the example is the sequence.


@_built_in(check_tokens)
def token_disagreement(outputs: Tensor, reference: Reference) -> Tensor:
    """Share of a sequence's positions where the top token is not the full network's.

    Only the positions in ``reference.mask`` count; a sequence without any has loss 0.

    >>> full, pruned = torch.eye(3)[None], torch.eye(3).roll(1, 0)[None]
    >>> token_disagreement(pruned, Reference(full, mask=torch.tensor([[True, True, False]])))
    tensor([1.])
    """
    top, broken = _top(outputs)
    full_top, full_broken = _top(reference.outputs)
    counted = torch.ones_like(full_broken) if reference.mask is None else reference.mask.bool()
    # Only where it counts: networks may well compute NaN at padding.
    spoilt = ((broken | full_broken) & counted).any(-1)
    return nan_where(spoilt, share((top != full_top) & counted, counted))


# Embeddings: outputs [B, D].


@_built_in(check_embeddings)
def cosine(outputs: Tensor, reference: Reference) -> Tensor:
    """(1 - cos) / 2 of the angle between the pruned and the full network's embeddings.

    0 for the same direction, 1/2 for a right angle or if just one embedding is zero.

    >>> full = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> pruned = torch.tensor([[0.0, 3.0], [-2.0, 0.0]])
    >>> cosine(pruned, Reference(full))
    tensor([0.5000, 1.0000])
    """
    direction, zero = _direction(outputs)
    full_direction, full_zero = _direction(reference.outputs)
    # |u - v|^2 / 4 is the same for unit vectors, and exactly 0 for equal ones.
    loss = ((direction - full_direction).square().sum(-1) / 4).clamp(max=1)
    return torch.where((zero ^ full_zero) & ~loss.isnan(), 0.5, loss)


# doctest looks for examples in functions, and the above are objects.
__test__ = {name: loss.function for name, loss in BUILT_IN.items()}


def _top(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The class of the largest score, and where a score is NaN: a maximum lets NaN through."""
    best, index = scores.max(-1)
    return index, best.isnan()


def _class_labels(outputs: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
    """The labels, and where one is no class."""
    assert reference.targets is not None, "check_shapes refuses a batch without labels"
    labels = reference.targets.long()
    return labels, (labels < 0) | (labels >= outputs.shape[-1])


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _direction(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vector, and where the embedding is zero."""
    embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    largest = embedding.abs().amax(-1, keepdim=True)
    zero = largest == 0
    # Scaled first, because the squares of large numbers overflow.
    scaled = embedding / torch.where(zero, 1, largest)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(zero, 1, norm), zero.squeeze(-1)
