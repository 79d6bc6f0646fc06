"""Which calls of a model's layers are followed by what, from watching one plain run of it.

A step belongs to its layer where nothing else sees the tensors in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_iter

from confprune.grid.fusion import (
    ADDITIONS,
    CONVOLUTIONS,
    LAYER_CALLS,
    MOST_SHARED,
    Fusion,
    Residual,
    is_in_place,
)
from confprune.grid.levels_at_once import version


@dataclass
class _Link:
    """A tensor on the way: the output of a layer after the first `depth` steps."""

    tensor: Tensor
    fusion: Fusion
    layer: int
    depth: int
    used: bool = False

    @property
    def tip(self) -> bool:
        """Whether a function can follow."""
        return not self.used and self.depth == len(self.fusion.steps)


class _Known(NamedTuple):
    """A tensor that can be a residual while its version is the same."""

    tensor: Tensor
    residual: Residual
    version: int


class Watcher:
    """Finds the fusions of a model's layer calls, from every torch function of one plain run.

    Parameters
    ----------
    is_prunable : callable
        Whether a value is a prunable weight.
    """

    def __init__(self, is_prunable: Callable[[Any], bool]) -> None:
        self._fusions: list[Fusion] = []
        self._linear = 0  # calls of layers so far, as long as all are linear layers in a chain
        self._is_prunable = is_prunable
        self._links: dict[int, _Link] = {}
        self._known: dict[int, _Known] = {}

    def see(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note one call and what it returned."""
        leaves = list(tree_iter((args, kwargs)))
        prunable = any(self._is_prunable(leaf) for leaf in leaves)
        grown = None if prunable else self._grown(func, args, kwargs)
        chained = self._chained(func, args, kwargs) if prunable else None
        going_on = grown or chained
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (going_on is None or leaf is not going_on.tensor):
                self.end(leaf)
        if going_on is not None:
            going_on.used = True
        if grown is not None:
            self._note(result, grown.fusion, grown.layer, grown.depth + 1)
        elif prunable and func in LAYER_CALLS:
            layer = len(self._fusions)
            if chained is not None:
                chained.fusion.chained = True
            self._fusions.append(Fusion(convolution=func in CONVOLUTIONS))
            if args:
                self._know(args[0], Residual(layer, None))
            self._note(result, self._fusions[-1], layer, 0)

    def end(self, tensor: Tensor) -> None:
        """Note that something else needs this tensor as it is."""
        link = self._links.get(id(tensor))
        if link is not None:
            link.fusion.cut(link.depth)
            link.fusion.chained = False
            link.used = True

    def fusion_of(self, tensor: Tensor) -> Fusion | None:
        """The fusion that this tensor is on the way of."""
        link = self._links.get(id(tensor))
        return None if link is None else link.fusion

    def fusions(self) -> list[Fusion]:
        """What each call of a layer does besides, in the order of the calls."""
        found: list[Fusion] = []
        chained = True
        for fusion in self._fusions:
            chained = fusion.chained = chained and fusion.chained
            layer, steps = fusion.residual or (0, None)
            # The output of a call that has been cut since is not what it was.
            gone = steps is not None and steps != len(found[layer].steps)
            found.append(fusion.without_residual() if gone else fusion)
        return found

    def _grown(self, func: Any, args: Any, kwargs: dict[str, Any]) -> _Link | None:
        """The tensor that goes on by this call, if one does."""
        for at, tensor in enumerate(args[:2]):
            link = self._links.get(id(tensor))
            if link is None or not link.tip:
                continue
            if at == 0 and link.fusion.extended(func, args, kwargs):
                return link
            if func in ADDITIONS and len(args) == 2 and not kwargs:
                residual = self._residual(link, args[1 - at])
                in_place = at == 1 and is_in_place(func, kwargs)
                if residual is not None and not in_place and link.fusion.added(func, residual):
                    return link
        return None

    def _chained(self, func: Any, args: Any, kwargs: dict[str, Any]) -> _Link | None:
        """The output of the last call of a layer, if it goes on into this call of a linear one."""
        calls, unbroken = len(self._fusions), self._linear == len(self._fusions)
        fits = func is F.linear and len(args) > 0 and self._fits_chain(*args, **kwargs)
        link = self._links.get(id(args[0])) if fits else None
        follows = link is not None and link.tip and link.layer == calls - 1
        self._linear = calls + 1 if unbroken and fits and (follows or calls == 0) else -1
        return link if self._linear > 0 and follows else None

    def _fits_chain(self, x: Tensor, weight: Any, bias: Any = None) -> bool:
        """Whether a linear layer rounds nothing before its end, and takes one row an example."""
        exact = x.dtype in (torch.float32, torch.float64)
        prunable = self._is_prunable(weight) and weight.ndim == 2 and not self._is_prunable(bias)
        fits = x.ndim == 2 and x.shape[1] <= MOST_SHARED and x.device.type == "cpu"
        return exact and prunable and fits

    def _residual(self, link: _Link, other: Any) -> Residual | None:
        """What `other` is, if a layer that has been called can add it to its output."""
        known = self._known.get(id(other))
        if known is None or known.version != version(other):
            return None
        if other.shape != link.tensor.shape or other.dtype != link.tensor.dtype:
            return None
        layer, steps = known.residual
        before = layer < link.layer or (layer == link.layer and steps is None)
        return known.residual if before else None

    def _note(self, tensor: Tensor, fusion: Fusion, layer: int, depth: int) -> None:
        self._links[id(tensor)] = _Link(tensor, fusion, layer, depth)
        self._know(tensor, Residual(layer, depth))

    def _know(self, tensor: Any, residual: Residual) -> None:
        if isinstance(tensor, Tensor):
            self._known[id(tensor)] = _Known(tensor, residual, version(tensor))
