"""The model's own code, run with every prunable weight replaced by its masked self.

A `TorchFunctionMode` sees each torch function the model calls. Where one receives a prunable
weight it is given the masked weight of the level instead: ``F.linear``, ``addmm`` and the
convolutions through the grid operators, ``F.embedding`` by masking the rows it takes, anything else
with the masked weight written out. Under ``torch.vmap`` over the level this evaluates all levels at
once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from confprune.grid.functions import FUSED, METADATA, UNDER_VMAP
from confprune.grid.fusion import ADDITIONS, LAYER_CALLS, Fusion, Residual
from confprune.grid.layers import Layer, LinearStep, multiply_chain
from confprune.grid.levels_at_once import depends_on_level, levels_at_once

_CHANGED = "the model's functions changed from one call to the next"


class GridMode(TorchFunctionMode):
    """Replaces prunable weights by their masked selves at `level`, a scalar that vmap may batch.

    Parameters
    ----------
    layers : dict from id to Layer
        The prunable weights, by their identity.
    level : scalar tensor
    batch_minor : bool
        Whether activations are kept with the batch last in memory.
    fusions : sequence of Fusion
        What each call of a layer does besides, in the order of the calls; may be empty.

    Attributes
    ----------
    met : set of str
        Names of the weights that a function has received.
    written : int
        Bytes of the largest masked weight that was written out.
    """

    def __init__(
        self,
        layers: dict[int, Layer],
        level: Tensor,
        *,
        batch_minor: bool,
        fusions: Sequence[Fusion] = (),
    ) -> None:
        super().__init__()
        self.layers = layers
        self.level = level
        self.batch_minor = batch_minor
        self.met: set[str] = set()
        self.written = 0
        self.residual: Tensor | None = None  # that the call under way adds
        self._fusions = enumerate(fusions)
        self._fusion = Fusion()  # of the call under way
        self._layer = -1  # its number
        self._wanted = {fusion.residual for fusion in fusions}
        self._residuals: dict[Residual, Tensor] = {}
        self._done: dict[int, _Done] = {}  # outputs ahead of the model
        self._used: dict[int, Tensor] = {}  # that stood for outputs of a chain
        self._chain: list[LinearStep] = []  # that wait for the last of them
        self._head = level  # the input of the first
        self._version = 0  # of that

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, with masked weights where it was given prunable ones."""
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        ahead = self._ahead(func, args, kwargs)
        if ahead is not None:
            return ahead
        prunable = [tensor for tensor in _tensors(args, kwargs) if id(tensor) in self.layers]
        self.met.update(self.layers[id(weight)].name for weight in prunable)
        if prunable and torch.is_autocast_enabled(self.level.device.type):
            raise NotImplementedError("torch.autocast chooses other types under vmap than without")
        if prunable and func in LAYER_CALLS:
            self._begin(args)
        replacement = FUSED.get(func) if prunable else UNDER_VMAP.get(func)
        if replacement is not None:
            result = replacement(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if not prunable:
            return func(*args, **kwargs)
        args, kwargs = tree_map(self.masked, (args, kwargs))
        return func(*args, **kwargs)

    def _begin(self, args: Any) -> None:
        """Find the fusion of a call of a layer, and the residual that it adds."""
        self._layer, self._fusion = next(self._fusions, (-1, Fusion()))
        if args:
            self._keep(Residual(self._layer, None), args[0])
        self.residual = None
        if self._fusion.residual is not None:
            self.residual = self._residuals.pop(self._fusion.residual, None)
            if self.residual is None:
                self._fusion = self._fusion.without_residual()

    def _keep(self, residual: Residual, tensor: Tensor) -> None:
        if residual in self._wanted:
            self._residuals[residual] = tensor

    def fused(self, y: Tensor) -> Tensor:
        """Note that `y` is already what the functions of the call's fusion make of it."""
        fusion = self._fusion
        self._keep(Residual(self._layer, len(fusion.functions)), y)
        if fusion.functions or fusion.chained:
            self._done[id(y)] = _Done(y, fusion, 0, self.residual)
        self._layer, self._fusion, self.residual = -1, Fusion(), None
        return y

    def follow(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, bool]:
        """The shift, the scale and whether there is a ReLU, for the call under way."""
        affine = self._fusion.affine
        if affine is None:
            return bias, None, self._fusion.relu
        shift = affine.shift if bias is None else affine.shift + affine.scale * bias
        return shift, affine.scale, self._fusion.relu

    def linear(self, x: Tensor, layer: Layer, bias: Tensor | None, *, transposed: bool) -> Tensor:
        """The output of a linear layer, the call under way.

        Of a chain of layers only the last gives outputs; what stands for those before has their
        shape and nothing else.
        """
        first = not self._chain
        self._done.pop(id(x), None)
        if not first:
            self.finish(x)  # unless `x` stood for the outputs of the last of them
            self._used[id(x)] = x
        shared = first and not depends_on_level(x)
        step = LinearStep(*layer.rows(shared=shared, transposed=transposed), *self.follow(bias))
        if self._fusion.chained and (shared or not first):
            if first:
                self._head, self._version = x, _version(x)
            self._chain.append(step)
            return levels_at_once(step.stand_in, self.level, x)
        # Sequences go on to normalisations over their features, which want these to be contiguous.
        batch_minor = self.batch_minor and x.ndim == 2
        if first:
            multiply = functools.partial(step.multiply, batch_minor)
            return levels_at_once(multiply, self.level, x)
        if _version(self._head) != self._version:
            raise RuntimeError("the model works in place on an input it has used")
        chain, self._chain = [*self._chain, step], []
        multiply = functools.partial(multiply_chain, chain, batch_minor)
        return levels_at_once(multiply, self.level, self._head)

    def finish(self, outputs: Tensor) -> None:
        """Raise RuntimeError where an output was not used as the fusions took for granted."""
        if self._done or id(outputs) in self._used:
            raise RuntimeError(_CHANGED)

    def _ahead(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """The output that this call is about, if it has been made together with its layer."""
        if not self._done and not self._used:
            return None
        for tensor in _tensors(args, kwargs):
            done = self._done.get(id(tensor))
            if id(tensor) in self._used or (done and not done.is_next(func, args, kwargs)):
                raise RuntimeError(_CHANGED)
            if done and done.step < len(done.fusion.functions):
                self._done[id(tensor)] = done = done._replace(step=done.step + 1)
                if done.step == len(done.fusion.functions) and not done.fusion.chained:
                    del self._done[id(tensor)]
                return tensor
        return None

    def _is_prunable(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self.layers

    def masked(self, value: Any) -> Any:
        """A prunable weight as it is at the level, written out; anything else as it is."""
        if not self._is_prunable(value):
            return value
        self.written = max(self.written, value.nbytes)
        return self.layers[id(value)].masked(self.level)

    def layer(self, weight: Any, x: Any) -> Layer | None:
        """The layer of a prunable weight that the grid operators can multiply with `x`."""
        layer = self.layers.get(id(weight))
        return layer if layer is not None and layer.takes(x) else None


class _Done(NamedTuple):
    """An output that is ahead of the model by some functions, one of which may add a residual.

    A linear layer takes it after that, if the fusion is chained.
    """

    output: Tensor
    fusion: Fusion
    step: int  # number of the next of the functions
    residual: Tensor | None

    def is_next(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether this call is that of the next function, or of the linear layer after them."""
        if func is not [*self.fusion.functions, F.linear][self.step]:
            return False
        if func in ADDITIONS:
            return any(a is self.output and b is self.residual for a, b in (args, args[::-1]))
        return args[0] is self.output and self.fusion.repeats(func, args, kwargs)


def _version(tensor: Tensor) -> int:
    """How often a tensor has been worked on in place, where torch keeps count."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a torch function, in lists and tuples too."""
    found: list[Tensor] = []
    for value in itertools.chain(args, kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value, {})
    return found
