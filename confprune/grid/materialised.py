"""Grid products that write the masked weights out, for some levels at a time, and call torch's own.

What the grid operators compute, on any device: the masked weights of a chunk of levels are written,
multiplied, and dropped, so that no more than `MASKED_BYTES` of them exist at once. On CUDA this is
the way of convolutions, and of linear layers with enough vectors to a level that the time goes to
the product and not to the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from confprune.ops import output_positions

MASKED_BYTES = 256 << 20
"""Masked weights of one layer that exist at once; a single level may take more."""

_WIDE = 256  # outputs that fill the tiles of a product by themselves
_SMALL = 1 << 16  # elements of a convolution's output that take less time than its launch

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def grid_linear(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    level: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
    *,
    budget: int = MASKED_BYTES,
) -> Tensor:
    """``F.linear`` with the masked weight of each level.

    Parameters
    ----------
    x : Tensor [1 or K, N, inputs]
        One input for all levels, or one a level.
    weight, levels : Tensor [outputs, inputs]
        With any strides.
    level : Tensor [K] int64
    bias, scale : Tensor [outputs], optional
        The product is multiplied with `scale`, and `bias` is added.
    relu : bool
        Whether negative outputs become 0 in the end.
    budget : int
        Bytes of masked weights at a time.

    Returns
    -------
    Tensor [K, N, outputs]

    Examples
    --------
    >>> import torch
    >>> from confprune.grid.materialised import grid_linear
    >>> weight, levels = torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 2]], dtype=torch.uint8)
    >>> grid_linear(torch.ones(1, 1, 2), weight, levels, torch.tensor([0, 1])).flatten()
    tensor([3., 2.])
    """
    outputs = weight.shape[0]
    y = x.new_empty(level.shape[0], x.shape[1], outputs)
    inner = bias if scale is None else None  # added before the product is rounded
    for chunk in _chunks(level.shape[0], weight, budget):
        masked = torch.ops.confprune.masked_weights(weight, levels, level[chunk])
        part = y[chunk]
        if x.shape[0] == 1 and outputs < _WIDE:
            wide = F.linear(x[0], masked.flatten(0, 1), _repeated(inner, len(masked)))
            _write(wide.unflatten(1, (-1, outputs)).transpose(0, 1), part, scale, bias, relu)
            continue
        own = x.expand(len(masked), -1, -1) if x.shape[0] == 1 else x[chunk]
        if inner is None:
            torch.bmm(own, masked.mT, out=part)
        else:
            torch.baddbmm(inner, own, masked.mT, out=part)
        _write(part, part, scale, bias, relu)
    return y


def grid_conv(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    level: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    budget: int = MASKED_BYTES,
) -> Tensor:
    """``F.conv1d``, ``conv2d`` or ``conv3d`` with the masked weight of each level.

    As `grid_linear`, for ``x [1 or K, N, channels, positions...]`` and
    ``weight [outputs, channels / groups, kernel...]``; ``residual [1 or K, N, outputs,
    positions...]`` is added before the ReLU.

    Examples
    --------
    >>> import torch
    >>> from confprune.grid.materialised import grid_conv
    >>> x, weight, levels = torch.ones(1, 1, 1, 3), torch.ones(1, 1, 2), torch.tensor([[[1, 2]]])
    >>> geometry = {"stride": [1], "padding": [0], "dilation": [1], "groups": 1}
    >>> grid_conv(x, weight, levels.byte(), torch.tensor([0, 1]), **geometry).squeeze()
    tensor([[2., 2.],
            [1., 1.]])
    """
    convolution = _CONVOLUTIONS[weight.ndim - 2]
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    positions = output_positions(x.shape[3:], weight.shape[2:], stride, padding, dilation)
    y = x.new_empty(level.shape[0], x.shape[1], weight.shape[0], *positions)
    inner = bias if scale is None else None
    at_once = relu and residual is None
    follow = (_by_channel(scale, len(positions)), _by_channel(bias, len(positions)), at_once)
    for chunk in _chunks(level.shape[0], weight, budget):
        masked = torch.ops.confprune.masked_weights(weight, levels, level[chunk])
        part = y[chunk]
        count = len(masked)
        if x.shape[0] == 1:  # the outputs of all levels, group by group
            by_group = masked.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)
            own = None if inner is None else inner.view(groups, 1, -1).expand(-1, count, -1)
            own = None if own is None else own.flatten()
            wide = convolution(x[0], by_group, own, groups=groups, **settings)
            wide = wide.unflatten(1, (groups, count, -1)).movedim(2, 0).flatten(2, 3)
            _write(wide, part, *follow)
        elif part[0].numel() <= _SMALL:  # each level a group
            side_by_side = x[chunk].transpose(0, 1).flatten(1, 2)
            own, every = _repeated(inner, count), masked.flatten(0, 1)
            wide = convolution(side_by_side, every, own, groups=count * groups, **settings)
            _write(wide.unflatten(1, (count, -1)).transpose(0, 1), part, *follow)
        else:
            for one, kernel, result in zip(x[chunk], masked, part, strict=True):
                single = convolution(one, kernel, inner, groups=groups, **settings)
                _write(single, result, *follow)
    if residual is not None:
        y += residual
        if relu:
            y.relu_()
    return y


def _chunks(count: int, weight: Tensor, budget: int) -> Iterator[slice]:
    """The levels whose masked weights exist at a time."""
    step = max(1, budget // max(1, weight.nbytes))
    for begin in range(0, count, step):
        yield slice(begin, min(count, begin + step))


def _repeated(bias: Tensor | None, count: int) -> Tensor | None:
    return None if bias is None else bias.repeat(count)


def _by_channel(values: Tensor | None, dimensions: int) -> Tensor | None:
    return None if values is None else values.view(-1, *[1] * dimensions)


def _write(
    product: Tensor, out: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool
) -> None:
    """Write ``scale * product + shift`` to `out`, or the product, which then holds the shift."""
    if scale is not None:
        if shift is not None:
            torch.addcmul(shift, product, scale, out=out)
        else:
            torch.mul(product, scale, out=out)
        if relu:
            out.relu_()
    elif relu:
        torch.clamp_min(product, 0, out=out)
    elif product is not out:
        out.copy_(product)
