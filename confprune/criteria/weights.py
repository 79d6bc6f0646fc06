"""Criteria that judge each weight by itself, or by what was measured of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def magnitude(weight: Tensor, *, min_per_layer: int = 0) -> Tensor:
    """The weight itself: its absolute value is the score.

    Selection compares absolute values without making them, so no copy is needed.

    Parameters
    ----------
    weight : Tensor
    min_per_layer : int
        The so many largest weights of each layer are never pruned (their score is infinite), so
        that no layer collapses; what they are spared is pruned elsewhere. Of equal ones the last
        are spared. For the scopes "global" and "layer", without a pattern.

    Returns
    -------
    Tensor, shape of `weight`

    References
    ----------
    Gupta et al., "Is complexity required for neural network pruning? A case study on global
    magnitude pruning", arXiv 2209.14624: the minimum threshold (MT).

    Examples
    --------
    >>> import torch, confprune
    >>> confprune.criteria.magnitude(torch.tensor([1.0, -2.0]))
    tensor([ 1., -2.])
    >>> confprune.criteria.magnitude(torch.tensor([1.0, -2.0, 0.5]), min_per_layer=1)
    tensor([1.0000,    inf, 0.5000])
    """
    if not isinstance(min_per_layer, int) or min_per_layer < 0:
        raise ValueError(f"min_per_layer must be an integer of at least 0, got {min_per_layer!r}")
    if min_per_layer == 0 or weight.numel() == 0:
        return weight
    # An infinite weight that is not spared must stay below those that are.
    scores = weight.abs().clamp_(max=torch.finfo(weight.dtype).max).flatten()
    scores[torch.argsort(scores, stable=True)[-min_per_layer:]] = torch.inf
    return scores.view(weight.shape)


def magnitude_uncertainty(weight: Tensor, *, deviation: Tensor, damping: float = 1e-3) -> Tensor:
    """Magnitude over uncertainty: the weight / (damping + its standard deviation).

    Parameters
    ----------
    weight : Tensor
    deviation : Tensor, shape of `weight`
        Standard deviation of each weight over the last steps of the training (the "pseudo
        bootstrap"), as `WeightObserver.deviations` has it.
    damping : float
        Above 0; the larger, the closer to plain magnitude. The lambda of the paper.

    Returns
    -------
    Tensor, shape of `weight`; at least float32

    References
    ----------
    Ko, Oehmcke and Gieseke, "Magnitude and uncertainty pruning criterion for neural networks",
    arXiv 1912.04845.

    Examples
    --------
    >>> import torch, confprune
    >>> weight, deviation = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.5])
    >>> confprune.criteria.magnitude_uncertainty(weight, deviation=deviation, damping=0.5)
    tensor([ 1.0000, -0.5000])
    """
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping!r}")
    wide = widened(weight)
    return wide / (deviation.to(wide) + damping)


def wanda(weight: Tensor, *, input_norm: Tensor) -> Tensor:
    """The weight times the norm of the input that it multiplies.

    Its own scope is "row": the weights of one output compete with each other.

    Parameters
    ----------
    weight : Tensor
    input_norm : Tensor, broadcastable to `weight`
        Root mean square of the inputs over examples and positions, as `confprune.input_norms` has
        it. (The paper's norm, the root of the sum, orders the weights of an output alike.)

    Returns
    -------
    Tensor, shape of `weight`; at least float32

    References
    ----------
    Sun et al., "A simple and effective pruning approach for large language models",
    arXiv 2306.11695.

    Examples
    --------
    >>> import torch, confprune
    >>> weight, norm = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[10.0, 1.0]])
    >>> confprune.criteria.wanda(weight, input_norm=norm)
    tensor([[10., -2.],
            [30.,  4.]])
    """
    wide = widened(weight)
    return wide * input_norm.to(wide)


def random(weight: Tensor, *, position: int, seed: int = 0) -> Tensor:
    """Scores drawn uniformly from [0, 1): what any other criterion should beat.

    Parameters
    ----------
    weight : Tensor
        Only its shape counts.
    position : int
        Index of the parameter among the pruned ones; each has draws of its own.
    seed : int

    Returns
    -------
    Tensor, shape of `weight`; float64

    Examples
    --------
    >>> import torch, confprune
    >>> confprune.criteria.random(torch.zeros(2, 3), position=0).shape
    torch.Size([2, 3])
    """
    state = int(np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(state)
    return torch.rand(weight.shape, generator=generator, dtype=torch.float64)


def widened(weight: Tensor) -> Tensor:
    """The weight in at least float32, so that products and quotients of it keep their order."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
