"""The sparse kernels as torch operators: their shapes for tracing, and their rules under vmap.

``sparse_pack``    the surviving weights of a matrix, in the order of the kernels
``sparse_check``   raises unless these are a matrix of a given shape
``sparse_unpack``  the matrix again, zeros and all
``sparse_linear``  ``F.linear`` with such a matrix
``sparse_conv``    ``F.conv1d/2d/3d`` with such a matrix

The two products take `dense_from`: from so many products of the matrix with a vector on (rows of
the input; examples times positions) they unpack the matrix and call torch's own kernel.

On CUDA packing and checking are done on the CPU, and ``sparse_conv`` unpacks always. What tensors
hold is not looked at there by the host, which would have to wait: `cells` of a matrix of another
shape give NaN in the place of an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from confprune.ops import output_positions

Packed = tuple[Tensor, Tensor, Tensor, Tensor]
"""values [survivors], columns [survivors], slices [bytes], cells [cells + 3, 2]"""

pack = torch.ops.confprune.sparse_pack.default
check = torch.ops.confprune.sparse_check.default
unpack = torch.ops.confprune.sparse_unpack.default
linear = torch.ops.confprune.sparse_linear.default
conv = torch.ops.confprune.sparse_conv.default


@torch.library.register_fake("confprune::sparse_pack")  # type: ignore[untyped-decorator]
def _(weight: Tensor, groups: int) -> Packed:
    context = torch.library.get_ctx()
    survivors, bytes_, cells = (context.new_dynamic_size() for _ in range(3))
    return (
        weight.new_empty(survivors),
        weight.new_empty(survivors, dtype=torch.uint8),
        weight.new_empty(bytes_, dtype=torch.uint8),
        weight.new_empty(cells, 2, dtype=torch.int64),
    )


@torch.library.register_fake("confprune::sparse_check")  # type: ignore[untyped-decorator]
def _(
    values: Tensor,
    columns: Tensor,
    slices: Tensor,
    cells: Tensor,
    rows: int,
    row_size: int,
    groups: int,
) -> None:
    return None


@torch.library.register_fake("confprune::sparse_unpack")  # type: ignore[untyped-decorator]
def _(
    values: Tensor,
    columns: Tensor,
    slices: Tensor,
    cells: Tensor,
    rows: int,
    row_size: int,
    groups: int,
) -> Tensor:
    return values.new_empty(rows, row_size)


@torch.library.register_fake("confprune::sparse_linear")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    slices: Tensor,
    cells: Tensor,
    bias: Tensor | None,
    outputs: int,
    dense_from: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.register_fake("confprune::sparse_conv")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    slices: Tensor,
    cells: Tensor,
    bias: Tensor | None,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_from: int,
) -> Tensor:
    *batch, _ = x.shape[: -len(kernel)]
    positions = output_positions(x.shape[-len(kernel) :], kernel, stride, padding, dilation)
    return x.new_empty(*batch, outputs, *positions)


def _over_inputs(operator: Any, in_dims: Any) -> None:
    if any(d is not None for d in in_dims[1:6]):
        raise NotImplementedError(f"{operator} can be vmapped over x only")


def _linear_rule(
    info: Any, in_dims: Any, x: Tensor, *matrix_and_settings: Any
) -> tuple[Tensor, int]:
    _over_inputs(linear, in_dims)
    return linear(x.movedim(in_dims[0], 0), *matrix_and_settings), 0


def _conv_rule(info: Any, in_dims: Any, x: Tensor, *matrix_and_settings: Any) -> tuple[Tensor, int]:
    _over_inputs(conv, in_dims)
    x = x.movedim(in_dims[0], 0)
    kernel = matrix_and_settings[6]
    if x.ndim == len(kernel) + 2:  # examples without a batch become one
        return conv(x, *matrix_and_settings), 0
    y = conv(x.flatten(0, 1), *matrix_and_settings)
    return y.unflatten(0, x.shape[:2]), 0


torch.library.register_vmap("confprune::sparse_linear", _linear_rule)
torch.library.register_vmap("confprune::sparse_conv", _conv_rule)
