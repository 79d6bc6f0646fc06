"""What takes the place of a torch function in the grid forward: each is given the mode first.

A replacement may return NotImplemented; then the function itself is called, with masked weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from confprune.grid.attention import attention, multi_head_attention
from confprune.grid.fusion import fixed_batch_norm
from confprune.grid.levels_at_once import depends_on_level, levels_at_once

if TYPE_CHECKING:
    from confprune.grid.mode import GridMode

_FILTERED_CHANNELS = 16  # from which on minimal filtering is faster
_MAX_POOL = 3  # side of the largest window that is pooled view by view


def _linear(mode: GridMode, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _matrix_product(mode, input, weight, bias, transposed=False)


def _addmm(
    mode: GridMode, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    if beta != 1 or alpha != 1 or input.ndim != 1 or mode.layer(mat1, mat2) is not None:
        return NotImplemented
    return _matrix_product(mode, mat1, mat2, input, transposed=True)


def _matrix_product(
    mode: GridMode, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool
) -> Any:
    layer = mode.layer(weight, x)
    if layer is None or weight.ndim != 2:
        return NotImplemented
    bias = mode.masked(bias)
    if bias is not None and depends_on_level(bias):
        mode.unfuse()
        return mode.linear(x, layer, None, transposed=transposed) + bias
    return mode.fused(mode.linear(x, layer, bias, transposed=transposed))


def _conv(dimensions: int) -> Callable[..., Any]:
    def conv(
        mode: GridMode,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        layer = mode.layer(weight, input)
        margin = _padding(padding, weight, dilation)
        if layer is None or margin is None or input.ndim not in (dimensions + 1, dimensions + 2):
            return NotImplemented
        bias = mode.masked(bias)
        if bias is not None and depends_on_level(bias):
            mode.unfuse()
            y = conv(mode, input, weight, None, stride, padding, dilation, groups)
            return y + bias.view(-1, *[1] * dimensions)
        rows, outputs, block = layer.rows(shared=not depends_on_level(input))
        batched = input.ndim == dimensions + 2
        shift, scale, relu = mode.follow(bias)

        def convolve(level: Tensor, *inputs: Tensor) -> Tensor:
            x, *residual = inputs if batched else (tensor.unsqueeze(1) for tensor in inputs)
            y = torch.ops.confprune.grid_conv(
                x,
                shift,
                level,
                rows,
                outputs,
                block,
                list(weight.shape[2:]),
                each(stride, dimensions),
                margin,
                each(dilation, dimensions),
                groups,
                scale,
                relu,
                *residual,
            )
            y = y if mode.batch_minor else y.contiguous()
            return y if batched else y.squeeze(1)  # type: ignore[no-any-return]

        inputs = [input] if mode.residual is None else [input, mode.residual]
        return mode.fused(levels_at_once(convolve, mode.level, *inputs))

    return conv


def _padding(padding: Any, weight: Tensor, dilation: Any) -> list[int] | None:
    """Padding of each dimension in numbers; None where the two sides differ."""
    dimensions = weight.ndim - 2
    if padding == "valid":
        return [0] * dimensions
    if padding == "same":
        reach = [
            d * (k - 1) for d, k in zip(each(dilation, dimensions), weight.shape[2:], strict=True)
        ]
        return [r // 2 for r in reach] if all(r % 2 == 0 for r in reach) else None
    return each(padding, dimensions)


def each(value: Any, dimensions: int) -> list[int]:
    """A setting of a convolution for each of its dimensions, given for all or one by one."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values


def is_filtered(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether minimal filtering makes ``F.conv2d`` of these arguments where its weight is dense.

    As `is_winograd` of csrc/kernels/grid_product.cpp has it, of inputs that depend on the level.

    Examples
    --------
    >>> import torch
    >>> from confprune.grid.functions import is_filtered
    >>> x, weight = torch.zeros(1, 16, 9, 9), torch.zeros(16, 16, 3, 3)
    >>> is_filtered(x, weight), is_filtered(x, weight, dilation=2)
    (True, False)
    """
    steps = each(stride, 2)
    return (
        not weight.is_cuda
        and weight.dtype != torch.float64
        and weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= _FILTERED_CHANNELS
        and steps[0] == steps[1] <= 2
        and each(dilation, 2) == [1, 1]
        and groups == 1
    )


def _multi_head(mode: GridMode, *args: Any, **kwargs: Any) -> Any:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _linear(mode, x, weight, bias)
        if y is not NotImplemented:
            return y  # type: ignore[no-any-return]
        return F.linear(*tree_map(mode.masked, (x, weight, bias)))

    return multi_head_attention(linear, *args, **kwargs)


def _embedding(
    mode: GridMode,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    layer = mode.layers.get(id(weight))
    if layer is None or max_norm is not None:
        return NotImplemented
    rows, levels = F.embedding(input, layer.weight), F.embedding(input, layer.levels)
    return torch.where(levels > mode.level, rows, 0)


def _attention(mode: GridMode, *args: Any, **kwargs: Any) -> Any:
    return attention(*args, **kwargs)


def _batch_norm(mode: GridMode, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Batch norm with fixed statistics as one scale and shift: torch's own copies under vmap."""
    affine = fixed_batch_norm(input, *args, **kwargs)
    if affine is None:
        return NotImplemented
    shape = (1, -1, *[1] * (input.ndim - 2))
    return input * affine.scale.reshape(shape) + affine.shift.reshape(shape)


def _max_pool2d(
    mode: GridMode,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling as the maximum of shifted views: torch's own copies activations batch-minor."""
    kernel, step = each(kernel_size, 2), each(stride or kernel_size, 2)
    rare = ceil_mode or return_indices or each(dilation, 2) != [1, 1] or input.ndim != 4
    if rare or not mode.batch_minor or not depends_on_level(input) or max(kernel) > _MAX_POOL:
        return NotImplemented
    margin = each(padding, 2)
    if any(margin):
        input = F.pad(input, (margin[1], margin[1], margin[0], margin[0]), value=-torch.inf)
    ends = [size - k + 1 for size, k in zip(input.shape[2:], kernel, strict=True)]
    result: Tensor | None = None
    for row, column in itertools.product(range(kernel[0]), range(kernel[1])):
        view = input[:, :, row : row + ends[0] : step[0], column : column + ends[1] : step[1]]
        result = view if result is None else torch.maximum(result, view)
    return result


# Functions of prunable weights.
FUSED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.conv1d: _conv(1),
    torch.conv2d: _conv(2),
    torch.conv3d: _conv(3),
    F.embedding: _embedding,
    F.multi_head_attention_forward: _multi_head,
}

# Functions that torch runs slowly under vmap, also where no prunable weight is involved.
UNDER_VMAP: dict[Any, Callable[..., Any]] = {
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.scaled_dot_product_attention: _attention,
    F.batch_norm: _batch_norm,
    F.multi_head_attention_forward: _multi_head,
}

# How a tensor lies in memory, which is not as in the plain network.
LAYOUT: set[Any] = {Tensor.stride, Tensor.is_contiguous}

# What a weight is asked about itself, and masking does not change.
METADATA: set[Any] = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf"),
            *("is_sparse", "is_quantized", "is_meta", "is_nested", "is_mkldnn", "grad_fn"),
            *("itemsize", "nbytes"),
        )
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
    Tensor.__hash__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
