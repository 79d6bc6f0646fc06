"""Steps that follow a layer and cost nothing when its product is written.

A product leaves its kernel once; a batch normalisation with fixed statistics and a ReLU that follow
can be done on the way. Which calls are followed by what, and that nothing else sees the tensors in
between, is found by watching one plain run of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_iter

LAYER_CALLS: set[Any] = {F.linear, torch.addmm, torch.conv1d, torch.conv2d, torch.conv3d}
_RELUS: set[Any] = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class Affine(NamedTuple):
    """y = scale · x + shift, by channel."""

    scale: Tensor
    shift: Tensor


def fixed_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Affine | None:
    """``F.batch_norm`` as scale and shift; None where it has no fixed statistics.

    Examples
    --------
    >>> import torch
    >>> from confprune.grid.fusion import fixed_batch_norm
    >>> ones = torch.ones(1)
    >>> scale, shift = fixed_batch_norm(ones[None], ones, 4 * ones, eps=0)
    >>> scale.item(), shift.item()
    (0.5, -0.5)
    """
    if training or running_mean is None or running_var is None:
        return None
    if input.dtype not in (torch.float32, torch.float64):
        return None
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    return Affine(scale, shift if bias is None else shift + bias)


@dataclass
class Fusion:
    """What one call of a layer does besides its product.

    Attributes
    ----------
    functions : list
        The torch functions that are done with it, in order.
    affine : Affine or None
    """

    functions: list[Any] = field(default_factory=list)
    affine: Affine | None = None

    @property
    def relu(self) -> bool:
        """Whether negative outputs become 0."""
        return bool(self.functions) and self.functions[-1] in _RELUS

    def extended(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Take one more function in, if it is of the kind that can be."""
        if func in _RELUS and not self.relu:
            self.functions.append(func)
            return True
        if func is F.batch_norm and not self.functions:
            self.affine = fixed_batch_norm(*args, **kwargs)
            if self.affine is not None:
                self.functions.append(func)
                return True
        return False

    def cut(self, length: int) -> None:
        """Keep the first functions only."""
        del self.functions[length:]
        if not self.functions or self.functions[0] is not F.batch_norm:
            self.affine = None


@dataclass
class _Link:
    """A tensor on the way: the output of a layer after the first `depth` functions."""

    tensor: Tensor
    fusion: Fusion
    depth: int
    used: bool = False


class Watcher:
    """Finds the fusions of a model's layer calls, from every torch function of one plain run.

    Parameters
    ----------
    is_prunable : callable
        Whether a value is a prunable weight.
    """

    def __init__(self, is_prunable: Callable[[Any], bool]) -> None:
        self.fusions: list[Fusion] = []
        self._is_prunable = is_prunable
        self._links: dict[int, _Link] = {}

    def see(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note one call and what it returned."""
        leaves = list(tree_iter((args, kwargs)))
        prunable = any(self._is_prunable(leaf) for leaf in leaves)
        first = args[0] if args else None
        for leaf in leaves:
            link = self._links.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if link is None:
                continue
            tip = leaf is first and not link.used and link.depth == len(link.fusion.functions)
            if tip and not prunable and link.fusion.extended(func, args, kwargs):
                link.used = True
                self._links[id(result)] = _Link(result, link.fusion, link.depth + 1)
            else:
                self.end(leaf)
        if prunable and func in LAYER_CALLS:
            self.fusions.append(Fusion())
            self._links[id(result)] = _Link(result, self.fusions[-1], 0)

    def end(self, tensor: Tensor) -> None:
        """Note that something else needs this tensor as it is."""
        link = self._links.get(id(tensor))
        if link is not None:
            link.fusion.cut(link.depth)
            link.used = True
