"""Which kernel is the faster one on this machine: measured once for each kind of layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from confprune.sparse.modules import NEVER, SparseConv, SparseLayer, SparseLinear

ROWS = (1, 8, 64, 256)
"""Inputs of a linear layer that it is measured with."""
EXAMPLES = (1, 8)
"""Examples that a convolution is measured with, of about these positions each."""
POSITIONS = {1: 784, 2: 28, 3: 9}
SECONDS = 0.02
"""How long one measurement takes, or three calls if they take longer."""

_measured: dict[tuple[Any, ...], int] = {}


def measured_dense_from(layer: SparseLayer) -> int:
    """From how many products on the dense kernel is faster, unpacking included.

    Measured where the layer is, with its own weight, and remembered for layers of its kind: of its
    sizes to a factor of two, of its sparsity to 5 %, of its type, at the number of threads.

    Parameters
    ----------
    layer : SparseLayer
        Its `dense_from` is left as it is.

    Returns
    -------
    int
        For `SparseLayer.dense_from`: 0 if the dense kernel wins for every batch, `NEVER` if it does
        not for the largest. Convolutions have no sparse kernel on CUDA: 0 there. `NEVER` on devices
        where there are no kernels to choose from.

    Examples
    --------
    >>> from confprune.sparse.choice import measured_dense_from
    >>> layer = SparseLinear(64, 64)  # no survivors at all
    >>> measured_dense_from(layer) == NEVER
    True
    """
    device = layer.packed[0].device.type
    if device not in ("cpu", "cuda") or not layer.has_kernels:
        return NEVER
    if device == "cuda" and isinstance(layer, SparseConv):
        return 0
    kind = _kind(layer)
    if kind not in _measured:
        _measured[kind] = _measure(layer)
    return _measured[kind]


def _kind(layer: SparseLayer) -> tuple[Any, ...]:
    rows, row_size, groups = layer.matrix_shape
    sizes = tuple(round(math.log2(size)) for size in (rows, row_size, groups))
    about: tuple[Any, ...] = ()
    if isinstance(layer, SparseConv):
        about = (layer.kernel_size, layer.stride, layer.dilation)
    values, sparsity = layer.packed[0], round(layer.sparsity * 20)
    machine = values.device, torch.get_num_threads()
    return type(layer), sizes, about, sparsity, values.dtype, machine


def _measure(layer: SparseLayer) -> int:
    before, dense_from = layer.dense_from, NEVER
    try:
        with torch.inference_mode():
            for products, x in reversed(list(_inputs(layer))):
                layer.dense_from = NEVER
                sparse = _seconds(layer, x)
                layer.dense_from = 0
                if sparse <= _seconds(layer, x):
                    return dense_from
                dense_from = products
    finally:
        layer.dense_from = before
    return 0


def _inputs(layer: SparseLayer) -> Iterator[tuple[int, Tensor]]:
    """Inputs of growing size, with the number of products that each asks for."""
    like = layer.packed[0]
    if isinstance(layer, SparseLinear):
        for rows in ROWS:
            yield rows, like.new_ones(rows, layer.in_features)
    elif isinstance(layer, SparseConv):
        dims = len(layer.kernel_size)
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sizes = [max(POSITIONS[dims], r + 1) for r in reach]
        for examples in EXAMPLES:
            x = like.new_ones(examples, layer.in_channels, *sizes)
            yield layer(x)[:, 0].numel(), x


def _seconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The shortest time of a call, until its result is there."""

    def once() -> float:
        start = time.perf_counter()
        call(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - start

    once()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        times.append(once())
    return min(times)
