"""Prunable weights as the grid operators take them, and the linear layers made of these."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from confprune import ops  # noqa: F401  (registers torch.ops.confprune)
from confprune.grid import on_cuda  # noqa: F401  (registers the grid operators for CUDA)
from confprune.grid.fusion import MOST_SHARED

_BLOCK = 64  # columns whose inputs stay in the first-level cache
_TAPS_BLOCK = 96  # the same where neighbouring columns of a convolution share inputs


class Layer:
    """A prunable weight, its prune levels, and what the grid operators need of them."""

    def __init__(self, name: str, weight: Tensor, levels: Tensor, num_levels: int) -> None:
        self.name = name
        self.weight = weight.detach()
        self.levels = levels.to(weight.device)
        self.num_levels = num_levels
        self._rows: dict[Any, tuple[list[Tensor], int, int]] = {}

    def masked(self, level: Tensor | int) -> Tensor:
        """The weight at one level, which may be a tensor that vmap batches."""
        if isinstance(level, Tensor):
            return torch.where(self.levels > level, self.weight, 0)
        at = torch.full((1,), level, device=self.levels.device)  # made there: nothing is waited for
        masked: Tensor = torch.ops.confprune.masked_weights(self.weight, self.levels, at)
        return masked[0]

    def rows(self, *, shared: bool, transposed: bool = False) -> tuple[list[Tensor], int, int]:
        """Prefix rows, the number of rows, and their block; made when first asked for.

        Levels that share one input walk each row once, so that their rows need no blocks. On CUDA
        the grid operators take the weight and its prune levels instead.
        """
        if self.weight.is_cuda:
            shared = False  # all the same there
        if (shared, transposed) not in self._rows:
            self._rows[shared, transposed] = self._made(shared, transposed)
        return self._rows[shared, transposed]

    def _made(self, shared: bool, transposed: bool) -> tuple[list[Tensor], int, int]:
        weight, levels = self.weight, self.levels
        if transposed:
            weight, levels = weight.t(), levels.t()
        if weight.is_cuda:
            return [weight.contiguous(), levels.contiguous()], weight.shape[0], 0
        block = _TAPS_BLOCK if weight[0, 0].numel() > 1 else _BLOCK
        weight, levels = weight.flatten(1), levels.flatten(1)
        if shared:
            block = min(weight.shape[1], MOST_SHARED)
        rows = torch.ops.confprune.prefix_rows(weight, levels, self.num_levels, block)
        return list(rows), weight.shape[0], block

    def takes(self, x: Any) -> bool:
        """Whether the grid operators can multiply `x` with this weight."""
        return (
            isinstance(x, Tensor)
            and x.device == self.weight.device
            and x.device.type in ("cpu", "cuda")
            and x.dtype == self.weight.dtype
            and self.weight.numel() > 0
            and x.numel() > 0
        )


class LinearStep(NamedTuple):
    """A linear layer and what follows it, as the grid operators take them."""

    rows: list[Tensor]
    outputs: int
    block: int
    shift: Tensor | None
    scale: Tensor | None
    relu: bool

    def multiply(self, batch_minor: bool, level: Tensor, x: Tensor) -> Tensor:
        """Outputs [K, ..., outputs] of inputs [1 or K, ..., in]."""
        y = torch.ops.confprune.grid_linear(
            x.reshape(len(x), -1, x.shape[-1]),
            self.shift,
            level,
            self.rows,
            self.outputs,
            self.block,
            batch_minor,
            self.scale,
            self.relu,
        )
        return y.reshape(len(level), *x.shape[1:-1], self.outputs)  # type: ignore[no-any-return]


def multiply_chain(
    layers: Sequence[LinearStep], batch_minor: bool, level: Tensor, x: Tensor
) -> Tensor:
    """Outputs [K, N, outputs] of linear layers that follow each other, from x [1, N, in]."""
    rows, outputs, blocks, shifts, scales, relus = zip(*layers, strict=True)
    y = torch.ops.confprune.grid_mlp(
        x, level, list(itertools.chain(*rows)), outputs, blocks, shifts, scales, relus
    )
    return y if batch_minor else y.contiguous()  # type: ignore[no-any-return]
