"""Criteria that judge a weight by its rank in its layer, so that layers get budgets of their own.

Their scores are for the scope "global": the comparison across layers is what sets the budgets. They
are float64, in which ranks and sums of squares do not run together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lamp(weight: Tensor) -> Tensor:
    """The square of a weight over the sum of the squares that are pruned no earlier in its layer.

    The score is how much of the layer's remaining energy the weight holds. The last weight of a
    layer has score 1, the largest there is: no layer collapses before all others are at their last
    weight.

    Parameters
    ----------
    weight : Tensor

    Returns
    -------
    Tensor, shape of `weight`; float64

    References
    ----------
    Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", arXiv 2010.07611,
    Equation 4.

    Examples
    --------
    >>> import torch, confprune
    >>> confprune.criteria.lamp(torch.tensor([3.0, -1.0, 4.0]))
    tensor([0.3600, 0.0385, 1.0000], dtype=torch.float64)
    """
    magnitudes = weight.flatten().to(torch.float64).abs()
    order = torch.argsort(magnitudes, stable=True)
    largest = magnitudes.max() if len(magnitudes) else magnitudes.new_ones(())
    # Relative to the largest, whose square might overflow.
    squares = (magnitudes / torch.where(largest == 0, 1, largest)).square()[order]
    outliving = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(magnitudes)
    scores[order] = torch.where(outliving == 0, 0, squares / outliving)
    return scores.view(weight.shape)


def erdos_renyi_kernel(weight: Tensor) -> Tensor:
    """Magnitude within each layer, the layers with budgets by the Erdős–Rényi-kernel rule.

    The rule gives a layer of shape (outputs, inputs, kernel...) a density proportional to the sum
    of its shape over the product: ``sum(shape) * epsilon`` weights survive, but no more than there
    are, and epsilon makes the total right. The m-th largest weight of a layer thus survives while
    ``epsilon > (m - 1/2) / sum(shape)``, so that the score is the inverse of the right-hand side:
    one comparison across layers gives budgets that are rounded to whole weights, exact in total,
    capped at the layer with the excess spread over the others, and nested.

    Parameters
    ----------
    weight : Tensor

    Returns
    -------
    Tensor, shape of `weight`; float64

    References
    ----------
    Evci et al., "Rigging the lottery: making all tickets winners", arXiv 1911.11134, Section 3;
    Mocanu et al., arXiv 1707.04780, for linear layers.

    Examples
    --------
    >>> import torch, confprune
    >>> confprune.criteria.erdos_renyi_kernel(torch.tensor([[3.0, -1.0, 4.0]]))
    tensor([[2.6667, 1.6000, 8.0000]], dtype=torch.float64)
    """
    order = torch.argsort(weight.flatten().abs(), stable=True)
    share = float(sum(weight.shape)) if weight.ndim else 1.0
    rank = torch.arange(weight.numel(), 0, -1, dtype=torch.float64, device=weight.device)
    scores = torch.empty_like(rank)
    scores[order] = share / (rank - 0.5)
    return scores.view(weight.shape)
