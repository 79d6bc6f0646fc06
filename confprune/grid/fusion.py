"""Steps that follow a layer and cost nothing when its product is written.

A product leaves its kernel once; on the way, a batch normalisation with fixed statistics, the
addition of a residual to a convolution, and a ReLU can be done, and idle dropout left out. Where a
model begins with linear layers, with no more than that between them, they are one product from the
model's input to the outputs of the last. Which calls are followed by what, and that nothing else
sees the tensors in between, is found by watching one plain run of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_iter

MOST_SHARED = 32767
"""Columns of a weight whose levels can share one input."""

_CONVOLUTIONS: set[Any] = {torch.conv1d, torch.conv2d, torch.conv3d}
LAYER_CALLS: set[Any] = {F.linear, torch.addmm} | _CONVOLUTIONS
ADDITIONS: set[Any] = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}
_IN_PLACE: set[Any] = {Tensor.add_, Tensor.__iadd__}
_DROPOUTS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
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


class Residual(NamedTuple):
    """What is added to a layer's output: the input or the output of a call of a layer.

    Attributes
    ----------
    layer : int
        Number of the call.
    steps : int or None
        It is the output after so many functions; None for the input.
    """

    layer: int
    steps: int | None


@dataclass
class Fusion:
    """What one call of a layer does besides its product.

    Attributes
    ----------
    convolution : bool
        Only convolutions add residuals.
    functions : list
        The torch functions that are done with it, in order.
    affine : Affine or None
    norm : tuple
        The arguments of the batch normalisation that this is, less its input.
    residual : Residual or None
    chained : bool
        What comes of it goes into the next call, of a linear layer, and nowhere else; as what came
        of all calls before.
    """

    convolution: bool = False
    functions: list[Any] = field(default_factory=list)
    affine: Affine | None = None
    norm: tuple[Any, ...] = ()
    residual: Residual | None = None
    chained: bool = False

    @property
    def relu(self) -> bool:
        """Whether negative outputs become 0."""
        return not _RELUS.isdisjoint(self.functions)

    def extended(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Take one more function in, if it is of the kind that can be."""
        if _is_idle(func, args, kwargs) or (func in _RELUS and not self.relu):
            self.functions.append(func)
            return True
        if func is F.batch_norm and not self.functions:
            self.affine = fixed_batch_norm(*args, **kwargs)
            if self.affine is not None:
                self.norm = _settings(args, kwargs)
                self.functions.append(func)
                return True
        return False

    def repeats(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether one of the functions, called again, does what it did."""
        if func is F.batch_norm:
            settings = _settings(args, kwargs)
            return len(settings) == len(self.norm) and all(map(_same, settings, self.norm))
        return func not in _DROPOUTS or _is_idle(func, args, kwargs)

    def added(self, func: Any, residual: Residual) -> bool:
        """Take an addition in, if it can be after the functions so far."""
        if self.relu or self.residual is not None or not self.convolution:
            return False
        self.functions.append(func)
        self.residual = residual
        return True

    def cut(self, length: int) -> None:
        """Keep the first functions only."""
        del self.functions[length:]
        if not self.functions or self.functions[0] is not F.batch_norm:
            self.affine = None
        if ADDITIONS.isdisjoint(self.functions):
            self.residual = None

    def without_residual(self) -> Fusion:
        """The functions before an addition, for where the residual is not at hand."""
        steps = [function in ADDITIONS for function in self.functions].index(True)
        return replace(self, functions=self.functions[:steps], residual=None)


@dataclass
class _Link:
    """A tensor on the way: the output of a layer after the first `depth` functions."""

    tensor: Tensor
    fusion: Fusion
    layer: int
    depth: int
    used: bool = False

    @property
    def tip(self) -> bool:
        """Whether a function can follow."""
        return not self.used and self.depth == len(self.fusion.functions)


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
            self._fusions.append(Fusion(convolution=func in _CONVOLUTIONS))
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
            gone = steps is not None and steps != len(found[layer].functions)
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
                in_place = func in _IN_PLACE and at == 1
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
        if known is None or known.version != other._version:
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
        if isinstance(tensor, Tensor) and not tensor.is_inference():
            self._known[id(tensor)] = _Known(tensor, residual, tensor._version)


def _is_idle(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this is a dropout that is off."""
    return func in _DROPOUTS and not kwargs.get("training", args[2] if len(args) > 2 else True)


def _settings(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a function is given besides its input."""
    return *args[1:], *(value for _, value in sorted(kwargs.items()))


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are the same; copies of a network have copies of its statistics."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return bool(one == other)
