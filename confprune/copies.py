"""Copies of a model: to prune, and to run, so that the model itself is neither."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

Module = TypeVar("Module", bound=nn.Module)


class _WithoutHistory(TorchFunctionMode):
    """Has ``deepcopy`` take what modules keep of their runs, on which it would fail."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor = args[0]
            if is_functorch_wrapped_tensor(tensor):  # left of a vmap: no use, and in the way
                return tensor
            if tensor.grad_fn is not None:  # left of a run with gradients
                return tensor.detach().clone()
        return func(*args, **(kwargs or {}))


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
    try:
        # In inference mode copies of buffers could not be written to later.
        with torch.inference_mode(mode=False), _WithoutHistory():
            return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a module may say to that
        raise TypeError(
            f"the model cannot be copied, and it is copies that are pruned and run: {error}. Take "
            "out of its attributes what copy.deepcopy(model) fails on, or give its class a "
            "__deepcopy__"
        ) from error


def running_copy(model: Module, own: Iterable[Tensor] = ()) -> Module:
    """A copy in evaluation mode with the model's parameters, but for the `own` ones, which it owns.

    It owns those, too, that embeddings with a largest norm scale as they run. What a module keeps
    of its runs is not in the model then, nor in other copies.

    Raises
    ------
    TypeError
        If the model cannot be copied.
    ValueError
        If evaluation mode changes its weights.
    """
    check_evaluation_mode(model)
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for parameter in (*own, *rescaled(model)):
        value = parameter.detach().clone(memory_format=torch.preserve_format)
        memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    return copied(model, memo).eval()


def rescaled(model: nn.Module) -> Iterator[Tensor]:
    """The weights of embeddings whose rows are scaled to a largest norm when they are looked up."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            yield module.weight


def check_evaluation_mode(model: nn.Module) -> None:
    """Raise ValueError if ``model.eval()`` makes other weights, as some adapters do."""
    own_ways = any(
        module.training
        and (type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval)
        for module in model.modules()
    )
    if not own_ways:
        return
    before, after = _tensors(model), _tensors(copied(model).eval())
    for name in before | after:
        if name not in before or name not in after or not all_same(before[name], after[name]):
            raise ValueError(
                f"model.eval() changes {name!r}, as adapters and branches do that are merged for "
                "evaluation: call model.eval() before pruning and calibrating"
            )


def _tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """What modules hold under each name, in containers too."""
    found = {}
    for path, module in model.named_modules():
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        kept = [(n, v) for n, v in vars(module).items() if n not in ("_parameters", "_buffers")]
        for name, value in [*named, *kept]:
            tensors = [leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor)]
            if tensors:
                found[f"{path}.{name}".lstrip(".")] = tensors
    return found


def all_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors are the same, bit for bit.

    Examples
    --------
    >>> import torch
    >>> from confprune.copies import all_same
    >>> all_same([torch.tensor(torch.nan)], [torch.tensor(torch.nan)])
    True
    """
    return len(some) == len(others) and all(map(_same, some, others))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)
