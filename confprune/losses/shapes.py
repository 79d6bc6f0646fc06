"""What outputs and labels the built-in losses take, and how they refuse others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from confprune.losses import Reference

Check = Callable[[str, Tensor, "Reference"], None]
"""(name of the loss, outputs [B, ...], reference): raises ValueError if they do not fit."""


def check_classes(name: str, outputs: Tensor, reference: Reference) -> None:
    """Take scores [B, C] with C >= 2."""
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        hints = {3: "loss='token_disagreement'", 4: "loss='pixel_disagreement'"}
        hint = hints.get(outputs.dim(), "two scores per example, such as [0, logit],")
        raise _refusal(name, "class scores [B, C] (C >= 2)", outputs, hint)
    _check_floating(name, outputs)


def check_labelled_classes(name: str, outputs: Tensor, reference: Reference) -> None:
    """Take scores [B, C] with C >= 2 and labels [B]."""
    check_classes(name, outputs, reference)
    labels = _integers(name, _labels(name, reference))
    if labels.shape != outputs.shape[:1]:
        raise ValueError(
            f"loss {name!r} takes labels [B], got labels of shape {list(labels.shape)} for "
            f"outputs of shape {list(outputs.shape)}"
        )
    _check_range(name, labels, (labels >= 0) & (labels < outputs.shape[1]), outputs.shape[1])


def check_pixels(name: str, outputs: Tensor, reference: Reference) -> None:
    """Take scores [B, C, ...] or logits [B, 1, ...], [B, H, W], and a label for each pixel."""
    if outputs.dim() < 3 or outputs.shape[1] < 1:
        hint = "loss='disagreement'" if outputs.dim() == 2 else "another loss"
        takes = "pixel scores [B, C, H, W], or one logit per pixel as [B, 1, H, W] or [B, H, W]"
        raise _refusal(name, takes, outputs, hint)
    _check_floating(name, outputs)
    if reference.targets is None:
        return
    binary = one_logit(outputs)
    targets = _labels(name, reference)
    if not binary:
        targets = _integers(name, targets)
    batch, *pixels = outputs.shape if outputs.dim() == 3 else (len(outputs), *outputs.shape[2:])
    if list(targets.shape) not in ([batch, *pixels], [batch, 1, *pixels]):
        raise ValueError(
            f"loss {name!r} takes labels {[batch, *pixels]} or {[batch, 1, *pixels]} for outputs "
            f"of shape {list(outputs.shape)}, got labels of shape {list(targets.shape)}: resize "
            "the outputs in forward=, or the labels in the data"
        )
    known, ignored = label_roles(targets, outputs)
    _check_range(name, targets, known | ignored, 2 if binary else outputs.shape[1])


def check_tokens(name: str, outputs: Tensor, reference: Reference) -> None:
    """Take token scores [B, T, V] with V >= 2 and a mask [B, T]."""
    if outputs.dim() != 3 or outputs.shape[2] < 2:
        hints = {2: "loss='disagreement'", 4: "loss='pixel_disagreement'"}
        hint = hints.get(outputs.dim(), "another loss")
        raise _refusal(name, "token scores [B, T, V] (V >= 2)", outputs, hint)
    _check_floating(name, outputs)
    if reference.mask is not None and reference.mask.shape != outputs.shape[:2]:
        raise ValueError(
            f"loss {name!r} takes a mask [B, T], got a mask of shape {list(reference.mask.shape)} "
            f"for outputs of shape {list(outputs.shape)}: pass forward= that gives one output per "
            "position of the mask"
        )


def check_embeddings(name: str, outputs: Tensor, reference: Reference) -> None:
    """Take embeddings [B, D]."""
    if outputs.dim() != 2 or outputs.shape[1] < 1:
        hint = "one vector per example, such as a mean over positions,"
        raise _refusal(name, "embeddings [B, D]", outputs, hint)
    _check_floating(name, outputs)


def one_logit(outputs: Tensor) -> bool:
    """Whether a segmentation's outputs [B, H, W] or [B, 1, ...] are logits of the foreground."""
    return outputs.dim() == 3 or outputs.shape[1] == 1


def label_roles(labels: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels of pixels are classes and which are to be left out; the rest are mistakes.

    Negative labels are left out, and so is 255 where it is no class, by two wide-spread customs.
    Not with one logit per pixel: there 255 is more likely the foreground of a mask in 8 bits.
    """
    if one_logit(outputs):
        return (labels == 0) | (labels == 1), labels < 0
    labels = labels.long()
    return (labels >= 0) & (labels < outputs.shape[1]), (labels < 0) | (labels == 255)


def _refusal(name: str, takes: str, outputs: Tensor, hint: str) -> ValueError:
    return ValueError(
        f"loss {name!r} takes {takes}, got outputs of shape {list(outputs.shape)}: "
        f"use {hint} or pass forward=, a function (model, batch) -> outputs"
    )


def _check_floating(name: str, outputs: Tensor) -> None:
    if not outputs.is_floating_point():
        raise ValueError(
            f"loss {name!r} takes floating-point outputs, got {outputs.dtype}: pass forward= that "
            "gives the scores rather than the decision"
        )


def _labels(name: str, reference: Reference) -> Tensor:
    if not isinstance(reference.targets, Tensor):
        found = type(reference.targets).__name__
        raise ValueError(f"loss {name!r} takes labels as one tensor per batch, got {found}")
    return reference.targets


def _integers(name: str, labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"loss {name!r} takes integer labels, got {labels.dtype} of shape "
            f"{list(labels.shape)}: for one-hot labels take their argmax"
        )
    return labels.long()


def _check_range(name: str, labels: Tensor, valid: Tensor, classes: int) -> None:
    if not bool(valid.all()):
        value = labels[~valid].flatten()[0].item()
        pixels = valid.dim() > 1
        ignored = "; a pixel to leave out has a negative label" if pixels else ""
        raise ValueError(
            f"loss {name!r} takes labels from 0 to {classes - 1} for outputs of {classes} classes, "
            f"got the label {value}{ignored}"
        )
