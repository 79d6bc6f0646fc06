"""The model as the grid calls it: with its batch alone, in evaluation mode, as it was written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from confprune.batches import copy_batch
from confprune.calling import Forward, call
from confprune.copies import all_same, rescaled, running_copy
from confprune.grid.layers import Layer
from confprune.parameters import named_parameters


class Network:
    """A copy of a model with its way of being called, as one function of the batch.

    It has the model's parameters, but for the `own` ones, and nothing else of it: a module may keep
    what it likes of a run.
    """

    def __init__(
        self, model: nn.Module, forward: Forward | None, own: Iterable[nn.Parameter] = ()
    ) -> None:
        self.model = running_copy(model, own)
        self._forward = forward
        self.device = next(model.parameters()).device

    def __call__(self, batch: Any) -> Tensor:
        """The outputs on a batch [B, ...]."""
        # A copy, because some models work on their inputs in place, and this batch is used again.
        return call(self.model, copy_batch(batch), self._forward)


class PlainNetwork:
    """The masked network as `PruneLevels.prune` makes it: a copy whose weights are overwritten.

    What computes with a prunable weight by whatever way, an alias say, computes with the masked one
    here; not so where torch's ``functional_call`` takes the place of parameters.

    Parameters
    ----------
    model : torch.nn.Module
    forward : callable (model, batch) -> outputs, or None
    layers : dict from id to Layer
        The prunable weights, by their identity.

    Attributes
    ----------
    names : frozenset of str
        Of the prunable weights.
    """

    def __init__(
        self, model: nn.Module, forward: Forward | None, layers: Mapping[int, Layer]
    ) -> None:
        parameters = named_parameters(model, remove_duplicate=True)
        self._network = Network(model, forward, own=parameters.values())
        copies = named_parameters(self._network.model)
        self._weights = [
            (layers[id(p)], copies[n]) for n, p in parameters.items() if id(p) in layers
        ]
        ours = {id(parameter) for parameter in rescaled(self._network.model)}
        self._others = [
            (name, parameter, copies[name])
            for name, parameter in parameters.items()
            if id(parameter) not in layers and id(copies[name]) not in ours
        ]
        self.names = frozenset(layer.name for layer, _ in self._weights)

    def __call__(self, batch: Any, weight_of: Callable[[Layer], Tensor]) -> Tensor:
        """The outputs on a batch [B, ...] with the given weight for each layer."""
        for layer, parameter in self._weights:
            parameter.copy_(weight_of(layer))
        return self._network(batch)

    def written(self, weight_of: Callable[[Layer], Tensor]) -> str | None:
        """The first parameter that a run with the given weights has changed, if there is one."""
        for layer, parameter in self._weights:
            if not all_same([weight_of(layer)], [parameter]):
                return layer.name
        for name, before, after in self._others:
            if not all_same([before], [after]):
                return name
        return None


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32 within, on a GPU too, where they may round to TensorFloat-32.

    Kernels do that in ways of their own, and differ by more than what should be compared may.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    backends: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def eagerly() -> AbstractContextManager[object]:
    """What is compiled of a model runs as it was written within.

    So the grid sees every function, and no batch of another size is compiled for. The compiler
    itself takes its time to import where nobody uses it.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager
