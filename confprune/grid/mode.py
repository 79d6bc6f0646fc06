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
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from confprune.grid.ahead import Ahead
from confprune.grid.functions import FUSED, LAYOUT, METADATA, UNDER_VMAP
from confprune.grid.fusion import LAYER_CALLS, Fusion, Residual
from confprune.grid.layers import Layer, LinearStep, multiply_chain
from confprune.grid.levels_at_once import depends_on_level, levels_at_once, stand_in, version


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
        self._ahead = Ahead(level)
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
        tensors = _tensors(args, kwargs)
        ahead = self._ahead.next(tensors, func, args, kwargs)
        if ahead is not None:
            return ahead
        if func in LAYOUT:
            return func(*args, **kwargs)
        prunable = [tensor for tensor in tensors if id(tensor) in self.layers]
        self.met.update(self.layers[id(weight)].name for weight in prunable)
        if prunable and torch.is_autocast_enabled(self.level.device.type):
            raise NotImplementedError("torch.autocast chooses other types under vmap than without")
        if prunable:
            self._begin(func, args)
        replacement = FUSED.get(func) if prunable else UNDER_VMAP.get(func)
        if replacement is not None:
            result = replacement(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if not prunable:
            return func(*args, **kwargs)
        args, kwargs = tree_map(self.masked, (args, kwargs))
        return func(*args, **kwargs)

    def _begin(self, func: Any, args: Any) -> None:
        """Find the fusion of a call of a layer, and the residual that it adds."""
        self.unfuse()
        if func not in LAYER_CALLS:
            return
        self._layer, self._fusion = next(self._fusions, (-1, Fusion()))
        if args:
            self._keep(Residual(self._layer, None), args[0])
        if self._fusion.residual is not None:
            self.residual = self._residuals.pop(self._fusion.residual, None)
            if self.residual is None:
                self._fusion = self._fusion.without_residual()

    def _keep(self, residual: Residual, tensor: Tensor) -> None:
        if residual in self._wanted:
            self._residuals[residual] = tensor

    def fused(self, y: Tensor) -> Tensor:
        """What the model is given for `y`, which is already what the call's fusion makes of it."""
        self._keep(Residual(self._layer, len(self._fusion.steps)), y)
        return self._ahead.give(y, self._fusion, self.residual)

    def unfuse(self) -> None:
        """Let the call under way do nothing besides its product."""
        self._layer, self._fusion, self.residual = -1, Fusion(), None

    def follow(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, bool]:
        """The shift, the scale and whether there is a ReLU, for the call under way."""
        affine = self._fusion.affine
        if affine is None:
            return bias, None, self._fusion.relu
        shift = affine.shift if bias is None else affine.shift + affine.scale * bias
        return shift, affine.scale, self._fusion.relu

    def linear(self, x: Tensor, layer: Layer, bias: Tensor | None, *, transposed: bool) -> Tensor:
        """The output of a linear layer, the call under way.

        Of a chain of layers only the last gives outputs.
        """
        first = not self._chain
        self._ahead.take(x)
        if not first:
            self._ahead.finish(x)  # unless `x` stood for the outputs of the last of them
            self._ahead.use(x)
        shared = first and not depends_on_level(x)
        step = LinearStep(*layer.rows(shared=shared, transposed=transposed), *self.follow(bias))
        if self._fusion.chained and (shared or not first):
            if first:
                self._head, self._version = x, version(x)
            self._chain.append(step)
            return stand_in([len(x), step.outputs], x.dtype, self.level)
        # Sequences go on to normalisations over their features, which want these to be contiguous.
        batch_minor = self.batch_minor and x.ndim == 2
        if first:
            multiply = functools.partial(step.multiply, batch_minor)
            return levels_at_once(multiply, self.level, x)
        if version(self._head) != self._version:
            raise RuntimeError("the model works in place on an input it has used")
        chain, self._chain = [*self._chain, step], []
        multiply = functools.partial(multiply_chain, chain, batch_minor)
        return levels_at_once(multiply, self.level, self._head)

    def finish(self, outputs: Tensor) -> None:
        """Raise ChangedError where the model did not do what the fusions took for granted."""
        self._ahead.finish(outputs)

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


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a torch function, in lists and tuples too."""
    found: list[Tensor] = []
    for value in itertools.chain(args, kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value, {})
    return found
