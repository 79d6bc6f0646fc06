"""Copies of a model: to prune, and to run, so that the model itself is neither."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module, memo: dict[int, Any] | None = None) -> Module:
    """A deep copy; what stands in `memo` under an object's id takes its place, as in `deepcopy`.

    Raises
    ------
    TypeError
        If some part cannot be copied.

    Examples
    --------
    >>> from torch import nn
    >>> from confprune.copies import copied
    >>> model = nn.Linear(2, 2)
    >>> copied(model).weight is model.weight
    False
    """
    memo = dict(memo or {})
    for module in model.modules():
        # Of its many empty dictionaries each is copied in far less time by itself.
        values = vars(module).values()
        memo |= {id(v): type(v)() for v in values if type(v) in (dict, OrderedDict) and not v}
        kept = [v for v in (*values, *module._buffers.values()) if isinstance(v, Tensor)]
        for tensor in kept:
            if is_functorch_wrapped_tensor(tensor):  # left of another vmap: no use, and in the way
                memo[id(tensor)] = tensor
            elif tensor.grad_fn is not None:  # left of a run with gradients
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a module may say to that
        raise TypeError(
            f"the model cannot be copied, which pruning it takes: {error}. Take out of its "
            "attributes what copy.deepcopy(model) fails on, or give its class a __deepcopy__"
        ) from error


def running_copy(model: Module, own: Iterable[nn.Parameter] = ()) -> Module:
    """A copy in evaluation mode with the model's parameters, but for the `own` ones, which it owns.

    What a module keeps of its runs is not in the model then, nor in other copies.

    Raises
    ------
    TypeError
        If the model cannot be copied.
    ValueError
        If evaluation mode changes its weights.
    """
    check_evaluation_mode(model)
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for parameter in own:
        value = parameter.detach().clone(memory_format=torch.preserve_format)
        memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    return copied(model, memo).eval()


def check_evaluation_mode(model: nn.Module) -> None:
    """Raise ValueError if ``model.eval()`` would change weights, as some adapters do."""
    own_ways = any(
        module.training
        and (type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval)
        for module in model.modules()
    )
    if not own_ways:
        return
    evaluated = dict(copied(model).eval().named_parameters())
    for name, parameter in model.named_parameters():
        if name not in evaluated or not _same(evaluated[name], parameter):
            raise ValueError(
                f"model.eval() changes the parameter {name!r}, as adapters do that are merged for "
                "evaluation: call model.eval() before pruning and calibrating"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
