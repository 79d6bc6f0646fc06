"""The compiled kernels as torch operators: their shapes for tracing, and their rules under vmap.

Importing this module loads the extension and registers ``torch.ops.confprune.*``:

``magnitude_histogram``  adds the counts of one digit of every score's key
``magnitude_collect``    the keys in narrow brackets around the cuts, and the number under each
``assign_levels``        prune levels from thresholds and ties
``prefix_rows``          a weight matrix with each row ordered by prune level
``grid_linear``          ``F.linear`` with the masked weight, at many levels
``grid_conv``            ``F.conv1d/2d/3d`` with the masked weight, at many levels

The two grid operators take ``x [1 or K, N, ...]`` (one input for all levels, or one a level) and
``level [K]``, and return ``[K, N, ...]``; by output they multiply with `scale`, add `bias`, and end
with a ReLU where that is asked for, before which a convolution may add a ``residual [1 or K, N,
...]``. Under ``torch.vmap`` over the level each call with one level becomes one call with all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A plain library, not a Python module: it needs no C headers of Python, and serves every version.
_LIBRARY = Path(__file__).with_name("_C.so")
if not _LIBRARY.is_file():
    raise ImportError(
        f"confprune was not built in {_LIBRARY.parent}: run pip install --no-build-isolation -e . "
        "in the folder above, or leave that folder to import an installed confprune"
    )
torch.ops.load_library(str(_LIBRARY))


def instruction_set() -> str:
    """Name what the grid product runs on: "avx512", "avx2" or "baseline"."""
    return str(torch.ops.confprune.instruction_set())


@torch.library.register_fake("confprune::magnitude_histogram")  # type: ignore[untyped-decorator]
def _(
    scores: Tensor,
    key: torch.dtype,
    prefixes: Tensor,
    shift: int,
    digit_bits: int,
    counts: Tensor,
) -> None:
    return None


@torch.library.register_fake("confprune::magnitude_collect")  # type: ignore[untyped-decorator]
def _(
    scores: Tensor,
    key: torch.dtype,
    prefixes: Tensor,
    shift: int,
    low: Tensor,
    high: Tensor,
    limit: int,
    below: Tensor,
) -> Tensor:
    return prefixes.new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.register_fake("confprune::assign_levels")  # type: ignore[untyped-decorator]
def _(
    scores: Tensor,
    key: torch.dtype,
    thresholds: Tensor,
    first_level: Tensor,
    ties: Tensor,
    straddled: Tensor,
    ranks: Tensor,
) -> Tensor:
    dtype = torch.uint8 if ties.numel() <= 255 else torch.int16
    return torch.empty(scores.shape, dtype=dtype, device=scores.device)


@torch.library.register_fake("confprune::prefix_rows")  # type: ignore[untyped-decorator]
def _(
    weight: Tensor, levels: Tensor, num_levels: int, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alive = torch.library.get_ctx().new_dynamic_size()
    cells = weight.shape[0] * ((weight.shape[1] + block - 1) // block)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (
        weight.new_empty(alive, dtype=compute),
        weight.new_empty(alive, dtype=torch.int16),
        weight.new_empty(cells + 1, dtype=torch.int64),
        weight.new_empty(num_levels, cells, dtype=torch.int16),
    )


@torch.library.register_fake("confprune::grid_linear")  # type: ignore[untyped-decorator]
def _(
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
    if batch_minor:
        return x.new_empty(level.shape[0], outputs, x.shape[1]).transpose(1, 2)
    return x.new_empty(level.shape[0], x.shape[1], outputs)


@torch.library.register_fake("confprune::grid_conv")  # type: ignore[untyped-decorator]
def _(
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
    geometry = zip(x.shape[3:], kernel, stride, padding, dilation, strict=True)
    positions = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in geometry]
    return x.new_empty(level.shape[0], outputs, *positions, x.shape[1]).movedim(-1, 1)


def _grid_rule(operator: Any) -> Any:
    """The vmap rule of a grid operator: many calls with one level are one call with many."""

    def rule(
        info: Any,
        in_dims: Any,
        x: Tensor,
        bias: Tensor | None,
        level: Tensor,
        rows: Sequence[Tensor],
        *settings: Any,
    ) -> tuple[Tensor, int]:
        x_dim, bias_dim, level_dim, row_dims, *setting_dims = in_dims
        if bias_dim is not None or any(d is not None for d in row_dims) or level_dim is None:
            raise NotImplementedError(f"{operator} can be vmapped over x and level only")
        if level.numel() != info.batch_size:
            raise NotImplementedError(f"{operator} takes one level a call under vmap")
        if x_dim is not None:
            x = x.movedim(x_dim, 0).squeeze(1)
        batched = [  # only a residual is
            value.movedim(dim, 0).squeeze(1) if isinstance(dim, int) else value
            for value, dim in zip(settings, setting_dims, strict=True)
        ]
        return operator(x, bias, level.reshape(-1), rows, *batched).unsqueeze(1), 0

    return rule


torch.library.register_vmap("confprune::grid_linear", _grid_rule(torch.ops.confprune.grid_linear))
torch.library.register_vmap("confprune::grid_conv", _grid_rule(torch.ops.confprune.grid_conv))
