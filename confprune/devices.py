"""Where a network is run."""

from __future__ import annotations

import copy

import torch
from torch import nn


def usable_device(device: torch.device | str) -> torch.device:
    """The device of this name, with its index, if it can be used here.

    Raises
    ------
    ValueError
        If torch does not know such a device, or this machine has none.

    Examples
    --------
    >>> from confprune.devices import usable_device
    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device must be one that torch knows, such as 'cpu' or 'cuda:0', got {device!r}"
        ) from None
    try:
        return torch.empty(0, device=target).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {str(target)!r} cannot be used here ({str(error).splitlines()[0]}): use "
            "device='cpu', or one that torch finds"
        ) from error


def on_device(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """The model itself where it is on the device already, or None is given; else a copy there."""
    if device is None:
        return model
    target = usable_device(device)
    if all(parameter.device == target for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).to(target)
