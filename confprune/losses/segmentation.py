"""Losses of a segmented image, from what two segmentations share.

In shapes, ... before B stands for levels, if there are several: outputs have a dimension for them,
the reference has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from confprune.losses.shapes import label_roles, one_logit

if TYPE_CHECKING:
    from confprune.losses import Reference


def dice(outputs: Tensor, reference: Reference) -> Tensor:
    """1 - 2 |A and B| / (|A| + |B|) of an image, A predicted and B true.

    With one logit per pixel, of the foreground, and 0 where both are empty. With scores of C
    classes, the mean over the classes, background too, present in A or in B.

    Parameters
    ----------
    outputs : Tensor [B, C, ...], [B, 1, ...] or [B, H, W]
        Scores of C classes, or one logit per pixel.
    reference : Reference
        The labels [B, ...] or [B, 1, ...], else the full network's outputs.

    Returns
    -------
    Tensor [B]

    Examples
    --------
    >>> from confprune.losses import Reference
    >>> logits = torch.tensor([[[1.0, 1.0, -1.0, -1.0]]])
    >>> dice(logits, Reference(logits, targets=torch.tensor([[[1, 0, 0, 0]]])))
    tensor([0.3333])
    """
    both, predicted, true, broken = _overlap(outputs, reference)
    size = predicted + true
    return nan_where(broken, _mean_over_classes(size - 2 * both, size))


def iou(outputs: Tensor, reference: Reference) -> Tensor:
    """1 - |A and B| / |A or B| of an image, A predicted and B true.

    Parameters, classes and empty images are as for `dice`.

    Examples
    --------
    >>> from confprune.losses import Reference
    >>> logits = torch.tensor([[[1.0, 1.0, -1.0, -1.0]]])
    >>> iou(logits, Reference(logits, targets=torch.tensor([[[1, 0, 0, 0]]])))
    tensor([0.5000])
    """
    both, predicted, true, broken = _overlap(outputs, reference)
    union = predicted + true - both
    return nan_where(broken, _mean_over_classes(union - both, union))


def false_negative_rate(outputs: Tensor, reference: Reference) -> Tensor:
    """1 - |A and B| / |B|: the share of an image's true object that the prediction misses.

    Parameters are as for `dice`. With one logit per pixel, of the foreground, and 0 where there is
    none. With scores of C classes, the mean over the classes in B: no other can be missed.

    Examples
    --------
    >>> from confprune.losses import Reference
    >>> logits = torch.tensor([[[1.0, 1.0, -1.0, -1.0]]])
    >>> false_negative_rate(logits, Reference(logits, targets=torch.tensor([[[1, 1, 1, 0]]])))
    tensor([0.3333])
    """
    both, _, true, broken = _overlap(outputs, reference)
    return nan_where(broken, _mean_over_classes(true - both, true))


def pixel_disagreement(outputs: Tensor, reference: Reference) -> Tensor:
    """Share of an image's pixels with another class than the true one; parameters as for `dice`.

    Examples
    --------
    >>> from confprune.losses import Reference
    >>> full, pruned = torch.tensor([[[1.0, 1.0, -1.0, -1.0]]]), torch.tensor([[[1.0, -1, -1, -1]]])
    >>> pixel_disagreement(pruned, Reference(full))
    tensor([0.2500])
    """
    predicted, broken = _pixel_classes(outputs, reference.outputs)
    true, known, unknown = _true_pixels(reference)
    return nan_where(broken | unknown, share((predicted != true) & known, known))


def nan_where(broken: Tensor, loss: Tensor) -> Tensor:
    """The loss [..., B] as floating point, NaN where broken [..., B]."""
    return torch.where(broken, torch.nan, loss.to(torch.get_default_dtype()))


def share(chosen: Tensor, counted: Tensor) -> Tensor:
    """Of what is counted [B, P] the share that is chosen [..., B, P]; 0 if nothing is counted."""
    return chosen.sum(-1) / counted.sum(-1).clamp(min=1)


def _pixel_classes(outputs: Tensor, one_level: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted class of each pixel [..., B, P], and which images [..., B] have a NaN.

    The outputs of one level tell by their shape what their dimensions mean.
    """
    after_examples = outputs.dim() - one_level.dim() + 1
    if one_logit(one_level):
        logits = outputs.flatten(after_examples)
        return (logits > 0).long(), logits.isnan().any(-1)
    # A maximum lets NaN through, which saves a second pass over the scores.
    best, index = outputs.max(after_examples)
    return index.flatten(after_examples), best.isnan().flatten(after_examples).any(-1)


def _true_pixels(reference: Reference) -> tuple[Tensor, Tensor, Tensor]:
    """The true class of each pixel [B, P], which pixels count, and which images [B] are broken."""
    if reference.targets is None:
        true, broken = _pixel_classes(reference.outputs, reference.outputs)
        return true, torch.ones_like(true, dtype=torch.bool), broken
    labels = reference.targets.flatten(1)
    known, ignored = label_roles(labels, reference.outputs)
    return labels.long(), known, ~(known | ignored).all(-1)


def _overlap(outputs: Tensor, reference: Reference) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels per class [..., B, C] in both, predicted and true; and which images are broken."""
    predicted, broken = _pixel_classes(outputs, reference.outputs)
    true, known, unknown = _true_pixels(reference)
    foreground_only = one_logit(reference.outputs)
    classes = 2 if foreground_only else reference.outputs.shape[1]
    scored = slice(1 if foreground_only else 0, classes)

    def count(labels: Tensor, counted: Tensor) -> Tensor:
        # What does not count goes to a bin of its own. Out of place, as vmap needs it.
        index = torch.where(counted, labels, classes)
        bins = index.new_zeros(*index.shape[:-1], classes + 1)
        return torch.scatter_add(bins, -1, index, torch.ones_like(index))[..., scored]

    both = count(predicted, known & (predicted == true))
    return both, count(predicted, known), count(true, known), broken | unknown


def _mean_over_classes(wrong: Tensor, size: Tensor) -> Tensor:
    """Mean of wrong / size [..., B, C] over classes of a size above 0; 0 if there is none."""
    ratio = torch.where(size > 0, wrong / size.clamp(min=1), 0)
    return ratio.sum(-1) / (size > 0).sum(-1).clamp(min=1)
