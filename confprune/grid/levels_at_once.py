"""The grid operators under vmap, called once with all levels.

``torch.vmap`` finds the rule of an operator by way of Python, which takes longer than the products
of a small layer. Here the tensors that vmap batches over the level are taken apart, the operator is
called outside of vmap, and what it returns is given back to vmap.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack


def depends_on_level(x: Tensor) -> bool:
    """Whether vmap has one `x` for each level."""
    return bool(_functorch.is_batchedtensor(x))


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
