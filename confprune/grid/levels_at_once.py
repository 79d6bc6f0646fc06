"""The grid operators under vmap, called once with all levels.

``torch.vmap`` finds the rule of an operator by way of Python, which takes longer than the products
of a small layer. Here the tensors that vmap batches over the level are taken apart, the operator is
called outside of vmap, and what it returns is given back to vmap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack


def depends_on_level(x: Tensor) -> bool:
    """Whether vmap has one `x` for each level."""
    return bool(_functorch.is_batchedtensor(x))


def version(tensor: Tensor) -> int:
    """How often a tensor has been worked on in place, by itself or by a view of it."""
    tensor = _functorch.get_unwrapped(tensor) if depends_on_level(tensor) else tensor
    return 0 if tensor.is_inference() else tensor._version


def stand_in(shape: Sequence[int], dtype: torch.dtype, level: Tensor) -> Tensor:
    """What the model holds in place of a tensor that is never made: a shape, and NaN within.

    Examples
    --------
    >>> import torch
    >>> from confprune.grid.levels_at_once import stand_in
    >>> stand_in([2, 3], torch.float32, level=torch.tensor(0))
    tensor([[nan, nan, nan],
            [nan, nan, nan]])
    """
    nothing = _nothing(tuple(shape), dtype, level.device)
    if not depends_on_level(level):
        return nothing[0]
    return _functorch._add_batch_dim(nothing, 0, _functorch.maybe_get_level(level))


@functools.lru_cache
def _nothing(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN, [1, ...]; what stands for tensors is many, and torch takes its time with each."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(1, *shape)


def levels_at_once(operation: Callable[..., Tensor], level: Tensor, *inputs: Tensor) -> Tensor:
    """Call ``operation(level [K], *inputs [1 or K, ...])`` with what vmap stands for.

    Raises
    ------
    NotImplementedError
        If another vmap than that over the level is under way.

    Examples
    --------
    >>> import torch
    >>> from confprune.grid.levels_at_once import levels_at_once
    >>> x, level = torch.ones(2), torch.tensor([3, 5])
    >>> times = lambda level, x: x * level[:, None]
    >>> torch.vmap(lambda level: levels_at_once(times, level, x))(level)
    tensor([[3., 3.],
            [5., 5.]])
    """
    if not depends_on_level(level):
        return operation(level.reshape(1), *(x.unsqueeze(0) for x in inputs)).squeeze(0)
    depth = _functorch.maybe_get_level(level)
    if _functorch.maybe_current_level() != depth:
        raise NotImplementedError("the model calls torch.vmap around a layer")
    levels = _functorch.get_unwrapped(level)
    taken_apart = [
        (_functorch.get_unwrapped(x), _functorch.maybe_get_bdim(x))
        if depends_on_level(x)
        else (x, None)
        for x in inputs
    ]
    with temporarily_pop_interpreter_stack():
        of_levels = (
            x.unsqueeze(0) if dimension is None else x.movedim(dimension, 0)
            for x, dimension in taken_apart
        )
        y = operation(levels, *of_levels)
    return _functorch._add_batch_dim(y, 0, depth)
