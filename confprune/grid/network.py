"""The model as the grid calls it: with its batch alone, in evaluation mode, as it was written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from confprune.batches import copy_batch
from confprune.calling import Forward, call
from confprune.parameters import plain_name


class Network(nn.Module):
    """A model with its way of being called, as one module of the batch."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model = model
        self._forward = forward
        self.device = next(model.parameters()).device
        named = self.named_parameters(remove_duplicate=False)
        self._names = {plain_name(name.removeprefix("model.")): name for name, _ in named}

    def forward(self, batch: Any) -> Tensor:
        """The outputs on a batch [B, ...]."""
        # A copy, because some models work on their inputs in place, and this batch is used again.
        return call(self.model, copy_batch(batch), self._forward)

    def with_weights(self, weights: dict[str, Tensor], batch: Any) -> Tensor:
        """The outputs with some parameters replaced, tied ones everywhere."""
        named = {self._names[name]: weight for name, weight in weights.items()}
        return torch.func.functional_call(self, named, (batch,))  # type: ignore[no-any-return]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each module's own training flag restored in the end.

    What is compiled of it runs as it was written: the grid sees every function, and no batch of
    another size is compiled for.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with _eagerly():
            yield
    finally:
        for module, training in flags:
            module.training = training


def _eagerly() -> AbstractContextManager[object]:
    """Without the compiler of torch, which takes its time to import where nobody uses it."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager
