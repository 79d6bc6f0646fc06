"""Which way a weight lies: its outputs along rows, the inputs of each along the columns.

Linear layers and convolutions keep their outputs first. Transposed convolutions, and the Conv1D of
GPT-2, keep their inputs first, in groups; everything that goes by rows asks here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from confprune.parameters import is_linear, named_parameters


def inputs_first(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The parameters whose inputs come first, with the number of their groups.

    Examples
    --------
    >>> from torch import nn
    >>> from confprune.layout import inputs_first
    >>> model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 4, 2, groups=2))
    >>> inputs_first(model, ["0.weight", "1.weight"])
    {'1.weight': 2}
    """
    groups = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        weight = module._parameters.get("weight")
        if isinstance(module, _ConvTransposeNd):
            groups[id(weight)] = int(module.groups)
        elif is_linear(module) and not isinstance(module, nn.Linear):
            groups[id(weight)] = 1
    parameters = named_parameters(model)
    return {name: groups[id(parameters[name])] for name in names if id(parameters[name]) in groups}


def outputs_first(tensor: Tensor, groups: int = 0) -> Tensor:
    """A weight as [outputs, inputs of each, kernel...]; one without inputs is a single output.

    Parameters
    ----------
    tensor : Tensor
    groups : int
        0 where outputs come first already; else the groups of inputs that come first.

    Examples
    --------
    >>> import torch
    >>> from confprune.layout import outputs_first
    >>> outputs_first(torch.zeros(8, 3, 5), groups=2).shape, outputs_first(torch.zeros(7)).shape
    (torch.Size([6, 4, 5]), torch.Size([1, 7]))
    """
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    if groups == 0:
        return tensor
    return _swapped(tensor, groups)


def as_before(tensor: Tensor, shape: torch.Size, groups: int = 0) -> Tensor:
    """Undo `outputs_first`: values of [outputs, inputs of each, kernel...] in the weight's shape.

    Examples
    --------
    >>> import torch
    >>> from confprune.layout import as_before, outputs_first
    >>> weight = torch.arange(24).view(4, 3, 2)
    >>> torch.equal(as_before(outputs_first(weight, 2), weight.shape, 2), weight)
    True
    """
    if len(shape) < 2 or groups == 0:
        return tensor.reshape(shape).contiguous()
    return _swapped(tensor, groups).contiguous()


def _swapped(tensor: Tensor, groups: int) -> Tensor:
    """The first two dimensions swapped within each group of the first; its own inverse."""
    by_group: Tensor = tensor.unflatten(0, (groups, -1))
    return by_group.movedim(2, 1).flatten(0, 1)
