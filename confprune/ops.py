"""The compiled kernels as torch operators: their shapes for tracing, and their rules under vmap.

Importing this module loads the extension and registers ``torch.ops.confprune.*``:

``magnitude_histogram``  adds the counts of one digit of every score's key
``magnitude_collect``    the keys in narrow brackets around the cuts, sorted, and how many are under
                         each
``magnitude_select``     the thresholds of all levels at once; on CUDA, without a look at the host
``assign_levels``        prune levels of many tensors from thresholds and ties
``cut_weights``          weights masked by a cut, and where those near it are
``masked_weights``       a weight as it is at each of some levels
``masked_linear``        ``F.linear`` with the masked weight, at many levels, masked on the way; on
                         CUDA
``prefix_rows``          a weight matrix with each row ordered by prune level
``grid_linear``          ``F.linear`` with the masked weight, at many levels
``grid_mlp``             several such layers, one after the other, from one input
``grid_conv``            ``F.conv1d/2d/3d`` with the masked weight, at many levels
``short_attention``      attention over a few tokens; on the CPU

The two grid operators take ``x [1 or K, N, ...]`` (one input for all levels, or one a level) and
``level [K]``, and return ``[K, N, ...]``; by output they multiply with `scale`, add `bias`, and end
with a ReLU where that is asked for, before which a convolution may add a ``residual [1 or K, N,
...]``. Under ``torch.vmap`` over the level each call with one level becomes one call with all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

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


def build_info() -> dict[str, str | None]:
    """What the compiled part of confprune was built with.

    Returns
    -------
    dict
        ``confprune``, ``torch``: their versions, that of torch at the build; ``compiler``;
        ``instruction_set``: what the CPU kernels run on here; ``cuda``: the CUDA version of the
        kernels for GPUs, and ``architectures``: the compute capabilities that they were compiled
        for, both None in a build without.

    Examples
    --------
    >>> import confprune
    >>> built = confprune.build_info()
    >>> built["confprune"] == confprune.__version__
    True
    >>> list(built)
    ['confprune', 'torch', 'compiler', 'instruction_set', 'cuda', 'architectures']
    """
    from confprune import __version__

    built = torch.ops.confprune.build_info()
    return {
        "confprune": __version__,
        "torch": built["torch"],
        "compiler": built["compiler"],
        "instruction_set": instruction_set(),
        "cuda": built["cuda"] or None,
        "architectures": built["architectures"] or None,
    }


def check_kernels(devices: Iterable[torch.device]) -> None:
    """Raise RuntimeError where one of the devices is CUDA's and this build has no kernels for it.

    Examples
    --------
    >>> from confprune.ops import check_kernels
    >>> check_kernels([torch.device("cpu")])
    """
    if any(device.type == "cuda" for device in devices) and build_info()["cuda"] is None:
        raise RuntimeError(
            "the model is on a CUDA device, but this confprune was built without CUDA kernels. "
            "Rebuild it where the CUDA toolkit is, in its folder: CONFPRUNE_CUDA=1 pip install "
            "--no-build-isolation . Or work on the CPU: model.cpu(), or device='cpu' of "
            "confprune.calibrate"
        )


def output_positions(
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The positions of a convolution's output in each dimension, from those of its input.

    Examples
    --------
    >>> from confprune.ops import output_positions
    >>> output_positions([28, 28], [3, 5], stride=[2, 1], padding=[1, 0], dilation=[1, 1])
    [14, 24]
    """
    geometry = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in geometry]


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
    scores: Sequence[Tensor],
    key: torch.dtype,
    thresholds: Tensor,
    first_level: Tensor,
    ties: Tensor,
    straddled: Tensor,
    ranks: Tensor,
) -> tuple[list[Tensor], Tensor]:
    dtype = torch.uint8 if ties.numel() <= 255 else torch.int16
    levels = [torch.empty(own.shape, dtype=dtype, device=own.device) for own in scores]
    return levels, torch.empty_like(ranks)


@torch.library.register_fake("confprune::cut_weights")  # type: ignore[untyped-decorator]
def _(
    weights: Tensor,
    surely_pruned: int,
    pruned: int,
    unsure: int,
    out: Tensor,
    counts: Tensor,
) -> Tensor:
    return weights.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)


@torch.library.register_fake("confprune::magnitude_select")  # type: ignore[untyped-decorator]
def _(
    scores: Sequence[Tensor], key: torch.dtype, rank: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys, below, equal = (torch.empty_like(rank) for _ in range(3))
    return keys, below, equal, rank.new_empty(1)


@torch.library.register_fake("confprune::masked_weights")  # type: ignore[untyped-decorator]
def _(weight: Tensor, levels: Tensor, level: Tensor) -> Tensor:
    return weight.new_empty(level.shape[0], *weight.shape)


@torch.library.register_fake("confprune::masked_linear")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    level: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    return x.new_empty(level.shape[0], x.shape[1], weight.shape[0])


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
        weight.new_empty(cells + 2, dtype=torch.int64),
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


@torch.library.register_fake("confprune::grid_mlp")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    level: Tensor,
    rows: Sequence[Tensor],
    outputs: Sequence[int],
    blocks: Sequence[int],
    biases: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    relus: Sequence[bool],
) -> Tensor:
    return x.new_empty(level.shape[0], outputs[-1], x.shape[1]).transpose(1, 2)


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
    positions = output_positions(x.shape[3:], kernel, stride, padding, dilation)
    if x.is_cuda:
        return x.new_empty(level.shape[0], x.shape[1], outputs, *positions)
    return x.new_empty(level.shape[0], outputs, *positions, x.shape[1]).movedim(-1, 1)


@torch.library.register_fake("confprune::short_attention")  # type: ignore[untyped-decorator]
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    examples, heads, queries, width = query.shape
    return query.new_empty(examples, queries, heads, width).transpose(1, 2)


def _grid_rule(operator: Any, level_at: int, residual_at: int | None = None) -> Any:
    """The vmap rule of a grid operator: many calls with one level are one call with many.

    `level_at` and `residual_at` are places among the arguments; x is the first.
    """

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        others = [d for i, d in enumerate(in_dims) if i not in (0, level_at, residual_at)]
        if in_dims[level_at] is None or any(d is not None for d in tree_leaves(others)):
            raise NotImplementedError(f"{operator} can be vmapped over x and level only")
        if arguments[level_at].numel() != info.batch_size:
            raise NotImplementedError(f"{operator} takes one level a call under vmap")
        given = list(arguments)
        given[level_at] = arguments[level_at].reshape(-1)
        for at in (0, residual_at):
            if at is not None and at < len(given) and in_dims[at] is not None:
                given[at] = given[at].movedim(in_dims[at], 0).squeeze(1)
        return operator(*given).unsqueeze(1), 0

    return rule


for _name, _places in (("grid_linear", (2,)), ("grid_conv", (2, 13)), ("masked_linear", (3,))):
    torch.library.register_vmap(
        f"confprune::{_name}", _grid_rule(getattr(torch.ops.confprune, _name), *_places)
    )
