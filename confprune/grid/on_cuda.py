"""The grid operators on CUDA: masked on the way or written out, chosen by shape.

There the `rows` of ``torch.ops.confprune.grid_linear``, ``grid_mlp`` and ``grid_conv`` are each
layer's weight and prune levels, and `block` has no meaning. With few vectors a level the time goes
to the weights, and the fused kernel reads them once for all levels; with many it goes to the
product, which torch's own does best. ``python -m benchmarks gpu`` measures where the one overtakes
the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from confprune.grid import materialised
from confprune.ops import build_info

FUSED_VECTORS = {
    torch.bfloat16: 512,
    torch.float16: 512,
    torch.float32: 128,
    torch.float64: 0,
}
"""The most vectors a level that the fused kernel is given."""


def fused(vectors: int, weight: Tensor, levels: Tensor) -> bool:
    """Whether so many vectors a level are for the fused kernel.

    Examples
    --------
    >>> import torch
    >>> from confprune.grid.on_cuda import fused
    >>> weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    >>> levels = torch.empty(4096, 4096, dtype=torch.uint8, device="meta")
    >>> fused(16, weight, levels), fused(100_000, weight, levels)
    (True, False)
    """
    return levels.dtype == torch.uint8 and vectors <= FUSED_VECTORS[weight.dtype]


@torch.no_grad()
def grid_linear(
    x: Tensor,
    bias: Tensor | None,
    level: Tensor,
    rows: Sequence[Tensor],
    outputs: int,
    block: int,
    batch_minor: bool,
    scale: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``torch.ops.confprune.grid_linear`` with rows = [weight, levels]."""
    weight, levels = _rows(rows)
    _check_devices(x=x, bias=bias, level=level, weight=weight, levels=levels, scale=scale)
    if fused(x.shape[1], weight, levels):
        y = torch.ops.confprune.masked_linear(x, weight, levels, level, bias, scale, relu)
    else:
        y = materialised.grid_linear(x, weight, levels, level, bias, scale, relu)
    return y.mT.contiguous().mT if batch_minor else y  # type: ignore[no-any-return]


def grid_mlp(
    x: Tensor,
    level: Tensor,
    rows: Sequence[Tensor],
    outputs: Sequence[int],
    blocks: Sequence[int],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    relus: Sequence[bool],
) -> Tensor:
    """``torch.ops.confprune.grid_mlp``: `grid_linear` layer by layer; two `rows` for each."""
    count = len(outputs)
    given = len(blocks), len(biases), len(scales), len(relus)
    if count < 2 or len(rows) != 2 * count or any(number != count for number in given):
        raise ValueError(
            "grid_mlp takes rows=[weight, levels], outputs, block, bias, scale and relu of two "
            f"layers or more, got {len(rows)} rows and {count}, {', '.join(map(str, given))} others"
        )
    layers = zip(outputs, blocks, biases, scales, relus, strict=True)
    for i, (size, block, bias, scale, relu) in enumerate(layers):
        own, last = rows[2 * i : 2 * i + 2], i == count - 1
        x = grid_linear(x, bias, level, own, size, block, last, scale, relu)
    return x


@torch.no_grad()
def grid_conv(
    x: Tensor,
    bias: Tensor | None,
    level: Tensor,
    rows: Sequence[Tensor],
    outputs: int,
    block: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``torch.ops.confprune.grid_conv`` with rows = [weight, levels]; its result is contiguous."""
    weight, levels = _rows(rows)
    tensors = {"x": x, "bias": bias, "level": level, "weight": weight, "levels": levels}
    _check_devices(**tensors, scale=scale, residual=residual)
    return materialised.grid_conv(
        x,
        weight,
        levels,
        level,
        bias,
        scale,
        relu,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def _rows(rows: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(rows) != 2:
        raise ValueError(f"rows must be the weight and its prune levels, got {len(rows)} tensors")
    return rows


def _check_devices(**tensors: Tensor | None) -> None:
    """Raise ValueError for the first argument on another device than the first one."""
    first, *others = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, tensor in others:
        if tensor.device != first[1].device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first[0]} is on {first[1].device}: move one of "
                "them with .to(device)"
            )


if build_info()["cuda"] is not None:
    torch.library.impl("confprune::grid_linear", "cuda")(grid_linear)
    torch.library.impl("confprune::grid_mlp", "cuda")(grid_mlp)
    torch.library.impl("confprune::grid_conv", "cuda")(grid_conv)
