"""One plain run of a model, watched: what its activations cost and what follows its layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from confprune.grid.chunks import Footprint
from confprune.grid.functions import LAYOUT, METADATA, is_filtered
from confprune.grid.fusion import LAYER_CALLS, Fusion
from confprune.grid.layers import Layer
from confprune.grid.watcher import Watcher

_LANES = 128  # vectors that the products take together
_CONVOLUTION_EXAMPLES = 16  # the positions fill the lanes too
_LEAST_ACTIVATION = 320  # bytes: more examples together gain nothing, and are hard to share out


def _given(layers: dict[int, Layer], args: Any, kwargs: dict[str, Any] | None) -> list[Layer]:
    """The layers whose weights are among a function's arguments."""
    return [layers[id(leaf)] for leaf in tree_iter((args, kwargs)) if id(leaf) in layers]


class Met(TorchFunctionMode):
    """Notes which prunable weights torch functions are given."""

    def __init__(self, layers: dict[int, Layer]) -> None:
        super().__init__()
        self._layers = layers
        self.names: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in METADATA:
            self.names |= {layer.name for layer in _given(self._layers, args, kwargs)}
        return func(*args, **(kwargs or {}))


class Probe(TorchFunctionMode):
    """Watches a plain forward: its largest activation, the shapes its layers see, their fusions."""

    def __init__(self, layers: dict[int, Layer]) -> None:
        super().__init__()
        self._layers = layers
        self._largest = 0
        self._by_fusion: list[tuple[Fusion, int]] = []  # and the size of what is on its way
        self._work = 0  # of the layer with the most operations
        self._all_work = self._filtered_work = 0  # of all layers, and of some convolutions
        self._rows = 0  # vectors it takes; 0 for a convolution
        self._watcher = Watcher(lambda value: id(value) in layers)
        self.met: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in LAYOUT:
            self._watcher.end(args[0])  # the model may go on in another way
        if func in METADATA or func in LAYOUT:
            return result
        self._watcher.see(func, args, kwargs or {}, result)
        layers = _given(self._layers, args, kwargs)
        if layers:
            first, weight = not self.met, layers[0].weight
            self.met |= {layer.name for layer in layers}
            work = result.numel() * weight[0].numel() if func in LAYER_CALLS else 0
            self._all_work += work
            if func is torch.conv2d and not first and is_filtered(*args, **(kwargs or {})):
                self._filtered_work += work
            if work > self._work:
                self._work, matrix = work, weight.ndim == 2
                self._rows = result.numel() // result.shape[-1] if matrix else 0
        if self.met:  # before, all levels share their activations
            for leaf in tree_iter(result):
                if isinstance(leaf, Tensor) and id(leaf) not in self._layers:
                    self._measure(leaf)
        return result

    def _measure(self, activation: Tensor) -> None:
        fusion = self._watcher.fusion_of(activation)
        if fusion is None:
            self._largest = max(self._largest, activation.nbytes)
        else:
            self._by_fusion.append((fusion, activation.nbytes))

    def fusions(self, outputs: Tensor) -> list[Fusion]:
        """What follows each call of a layer, `outputs` being what the model returned."""
        self._watcher.end(outputs)
        return self._watcher.fusions()

    @property
    def mostly_filtered(self) -> bool:
        """Whether minimal filtering, which the plain network lacks, makes most of the products."""
        return 2 * self._filtered_work > self._all_work

    def footprint(self, size: int, weight: int) -> Footprint:
        """What one of `size` examples costs; `weight` is that of a masked weight."""
        rows = self._rows // size
        examples = _LANES // math.gcd(rows, _LANES) if rows else _CONVOLUTION_EXAMPLES
        written = [nbytes for fusion, nbytes in self._by_fusion if not fusion.chained]
        activation = max([self._largest, *written, _LEAST_ACTIVATION * size])
        plain = max([self._largest, *(nbytes for _, nbytes in self._by_fusion)])
        return Footprint(-(-activation // size), -(-plain // size), weight, examples)
