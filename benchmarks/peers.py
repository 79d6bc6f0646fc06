"""How a loss matrix is made without confprune: dense masked, an ensemble under vmap, or CSR.

Every peer is given the prune levels and the full network's outputs, which it is not timed for, and
makes the losses [n, L] of some of the levels. The size of its batches is tuned.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from benchmarks.networks import Subject
from confprune import PruneLevels, Reference
from confprune.batches import slice_batch
from confprune.losses import Loss, resolve_loss

ENSEMBLE = 10
"""Networks stacked at a time."""


@dataclass(frozen=True)
class Task:
    """What a peer computes with: a subject, its prune levels and the full network's outputs [n]."""

    subject: Subject
    levels: PruneLevels
    full: Tensor
    loss: Loss

    @classmethod
    @torch.no_grad()
    def of(cls, subject: Subject, levels: PruneLevels) -> Task:
        """The task of all examples of a subject."""
        size = len(next(iter(subject.data.values())) if _named(subject.data) else subject.data)
        parts = [slice_batch(subject.data, begin, begin + 64) for begin in range(0, size, 64)]
        full = torch.cat([_outputs(subject.model, part) for part in parts])
        return cls(subject, levels, full, resolve_loss(subject.loss))

    def first(self, n: int) -> Task:
        """The same with the first `n` examples."""
        data = slice_batch(self.subject.data, 0, n)
        return replace(self, subject=replace(self.subject, data=data), full=self.full[:n])

    def batches(self, size: int) -> Iterator[tuple[Any, Reference]]:
        """Batches of so many examples, and what their outputs are compared with."""
        for begin in range(0, len(self.full), size):
            end = begin + size
            yield slice_batch(self.subject.data, begin, end), Reference(self.full[begin:end])


def masked(task: Task, chosen: Sequence[int], batch: int) -> Tensor:
    """Level by level: mask a copy of the network and run it."""
    network = copy.deepcopy(task.subject.model)
    weights = dict(network.named_parameters())
    originals = dict(task.subject.model.named_parameters())
    columns = []
    for j in chosen:
        for name, levels in task.levels.levels.items():
            torch.mul(originals[name], levels > j, out=weights[name].data)
        columns.append(_losses(task, network, batch))
    return torch.stack(columns, dim=1)


def ensemble(task: Task, chosen: Sequence[int], batch: int) -> Tensor:
    """Masked copies as an ensemble of models, as the documentation of torch.func has it."""
    skeleton = copy.deepcopy(task.subject.model).to("meta")

    def run(parameters: Any, buffers: Any, inputs: Any) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), *_arguments(inputs))

    columns = []
    for begin in range(0, len(chosen), ENSEMBLE):
        some = chosen[begin : begin + ENSEMBLE]
        state = stack_module_state([task.levels.prune(task.subject.model, j) for j in some])
        parts = []
        for inputs, reference in task.batches(batch):
            with warnings.catch_warnings():  # attention has no batching rule, and says so
                warnings.filterwarnings("ignore", message="There is a performance drop")
                outputs = torch.vmap(run, in_dims=(0, 0, None))(*state, inputs)
            parts.append(torch.stack([task.loss(y, reference) for y in outputs], dim=1))
        columns.append(torch.cat(parts))
    return torch.cat(columns, dim=1)


def torch_csr(task: Task, chosen: Sequence[int], batch: int) -> Tensor:
    """Level by level with torch's CSR matrices (of MKL) in linear layers and convolutions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return _sparse(task, chosen, batch, _torch_product)


def scipy_csr(task: Task, chosen: Sequence[int], batch: int) -> Tensor:
    """The same with SciPy's CSR matrices."""
    return _sparse(task, chosen, batch, _scipy_product)


LossMaker: TypeAlias = Callable[[Task, Sequence[int], int], Tensor]

PEERS: Mapping[str, LossMaker] = {
    "masked torch, level by level": masked,
    "torch.func ensemble": ensemble,
    "torch CSR, level by level": torch_csr,
    "SciPy CSR, level by level": scipy_csr,
}

COMMON = tuple(name for name in PEERS if not name.startswith("SciPy"))
"""Those that finish in time on every network."""


@dataclass(frozen=True)
class Tuned:
    """A peer with the size of batches that suits it best, and its seconds per level and example."""

    name: str
    batch: int
    seconds: float

    @torch.no_grad()
    def losses(self, task: Task, chosen: Sequence[int]) -> Tensor:
        """Losses [n, L] of the chosen levels."""
        return PEERS[self.name](task, chosen, self.batch)

    def levels_within(self, seconds: float, task: Task, most: int) -> list[int]:
        """Levels spread over the grid, as many as take so long, but at most `most`.

        An ensemble makes one pass of its networks at least.
        """
        least = ENSEMBLE if PEERS[self.name] is ensemble else 1
        fit = int(seconds / (self.seconds * len(task.full)))
        return spaced_levels(len(task.levels), max(least, min(fit, most)))


@torch.no_grad()
def tune(name: str, task: Task, batches: Sequence[int], examples: int) -> Tuned:
    """Try sizes of batches, on some of the examples and the middle of the grid."""
    losses, total = PEERS[name], len(task.levels)
    chosen = spaced_levels(total, ENSEMBLE if losses is ensemble else 1)
    some = task.first(examples)
    found = {}
    for size in sorted({min(batch, len(some.full)) for batch in batches}):
        if not found:
            losses(some.first(size), chosen, size)  # to warm up
        start = time.perf_counter()
        losses(some, chosen, size)
        found[size] = time.perf_counter() - start
    best = min(found, key=lambda size: found[size])
    return Tuned(name, best, found[best] / len(chosen) / len(some.full))


def spaced_levels(total: int, count: int) -> list[int]:
    """At most `count` levels spread evenly over a grid, with the mean sparsity of all."""
    count = min(count, total)
    return [math.floor((i + 0.5) * total / count) for i in range(count)]


def _named(inputs: Any) -> bool:
    return isinstance(inputs, Mapping)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if _named(inputs) else ((inputs,), {})


def _outputs(network: nn.Module, inputs: Any) -> Tensor:
    arguments, named = _arguments(inputs)
    return network(*arguments, **named)


def _losses(task: Task, network: nn.Module, batch: int) -> Tensor:
    """Losses [n] of one network."""
    return torch.cat(
        [
            task.loss(_outputs(network, inputs), reference)
            for inputs, reference in task.batches(batch)
        ]
    )


Product: TypeAlias = Callable[[Tensor], Tensor]
"""A matrix [O, I] times x [I, N]."""


def _torch_product(weight: Tensor) -> Product:
    return weight.to_sparse_csr().matmul


def _scipy_product(weight: Tensor) -> Product:
    matrix = sparse.csr_array(weight.numpy())
    return lambda x: torch.from_numpy(matrix @ x.numpy())


def _sparse(
    task: Task, chosen: Sequence[int], batch: int, product: Callable[[Tensor], Product]
) -> Tensor:
    network = copy.deepcopy(task.subject.model)
    originals = dict(task.subject.model.named_parameters())
    layers: dict[str, _SparseLayer] = {}
    for name in task.levels.levels:
        module_name = name.removesuffix(".weight")
        dense = network.get_submodule(module_name)
        layers[name] = _SparseConv(dense) if isinstance(dense, nn.Conv2d) else _SparseLinear(dense)
        network.set_submodule(module_name, layers[name])
    columns = []
    for j in chosen:
        for name, layer in layers.items():
            weight = originals[name] * (task.levels.levels[name] > j)
            layer.product = product(weight.detach().flatten(1))
        columns.append(_losses(task, network, batch))
    return torch.stack(columns, dim=1)


class _SparseLayer(nn.Module):
    """A layer whose weight matrix is a product with a sparse one."""

    product: Product

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.bias = dense.bias


class _SparseLinear(_SparseLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.flatten(0, -2).t()).t()
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])


class _SparseConv(_SparseLayer):
    """A convolution as a product with the patches under its kernel."""

    def __init__(self, dense: nn.Conv2d) -> None:
        super().__init__(dense)
        assert dense.groups == 1
        self._geometry = {
            "kernel_size": dense.kernel_size,
            "dilation": dense.dilation,
            "padding": dense.padding,
            "stride": dense.stride,
        }

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, **self._geometry)  # [n, I, positions]
        n, _, positions = patches.shape
        y = self.product(patches.transpose(0, 1).flatten(1)).unflatten(1, (n, positions))
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        height = (
            x.shape[2] + 2 * self._geometry["padding"][0] - self._geometry["kernel_size"][0]
        ) // self._geometry["stride"][0] + 1
        return y.transpose(0, 1).unflatten(2, (height, positions // height))
