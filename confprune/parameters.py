"""Which parameters of a model are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

ParameterFilter = Iterable[str] | Callable[[str, nn.Parameter], bool]

_COMPILED = "_orig_mod"  # the attribute in which torch.compile wraps a module

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def prunable_parameters(
    model: nn.Module, parameters: ParameterFilter | None = None
) -> dict[str, nn.Parameter]:
    """The parameters to prune, by name, in the model's order; tied ones once, by their first name.

    Those without any element are left out: there is nothing in them to prune.

    Parameters
    ----------
    model : torch.nn.Module
    parameters : names, or predicate (name, parameter) -> bool, optional
        Default: the weights of linear layers and of convolutions of any dimension.

    Raises
    ------
    TypeError
        If `model` is not a module, or a parameter is not of a floating type that can be pruned.
    ValueError
        If nothing is left to prune, a name is unknown, or a layer computes its weight from other
        parameters.

    Examples
    --------
    >>> from torch import nn
    >>> from confprune.parameters import prunable_parameters
    >>> list(prunable_parameters(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
    ['0.weight', '2.weight']
    """
    check_module(model)
    if parameters is None:
        chosen = _layer_weights(model)
    elif callable(parameters):
        first = named_parameters(model, remove_duplicate=True)
        chosen = {n: p for n, p in first.items() if parameters(n, p)}
    else:
        chosen = _named(model, parameters)
    for name, parameter in chosen.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is lazy: run the model once before pruning it")
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device, without values: load the weights "
                "before pruning it"
            )
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"parameter {name!r} is {parameter.dtype}; float32, float64, float16 and bfloat16 "
                "can be pruned: leave it out with parameters="
            )
    chosen = {name: parameter for name, parameter in chosen.items() if parameter.numel() > 0}
    if not chosen:
        raise ValueError(f"the model has no prunable weights: {_why_none(model)}")
    return chosen


def plain_name(name: str) -> str:
    """The name that a parameter or module has where nothing is compiled.

    Examples
    --------
    >>> from confprune.parameters import plain_name
    >>> plain_name("_orig_mod.body._orig_mod.0.weight")
    'body.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def named_parameters(
    model: nn.Module, *, remove_duplicate: bool = False
) -> dict[str, nn.Parameter]:
    """A model's parameters, by the names that they have where nothing is compiled."""
    named = model.named_parameters(remove_duplicate=remove_duplicate)
    return {plain_name(name): parameter for name, parameter in named}


def compiled_part(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile made this one of; None if it made none."""
    parts = vars(module).get("_modules")
    return parts.get(_COMPILED) if isinstance(parts, dict) else None  # TorchScript has its own


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model and all that it is made of, by the names that they have where nothing is compiled."""
    named = model.named_modules(remove_duplicate=False)
    return {plain_name(name): module for name, module in named}  # what is compiled, not its wrapper


def _why_none(model: nn.Module) -> str:
    """Why a model has no weights to prune, where its layers are of a known other kind."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"layer {name!r} is TorchScript: give the module that was scripted or traced"
        kind = type(module).__module__
        if kind.startswith(_QUANTIZED):
            return (
                f"{_layer(name)} is quantized ({type(module).__name__} of torch.ao), its weights "
                "are packed: give the network as it was before, and quantize the pruned one"
            )
        if kind.startswith("confprune.sparse"):
            return (
                f"{_layer(name)} is compressed: give the network as it was before, or "
                "confprune.sparse.decompress(model)"
            )
    return (
        "it holds no Linear or Conv layer with weights, or parameters= chose none; name them with "
        "parameters=[...] or a predicate (name, parameter) -> bool"
    )


def _layer(name: str) -> str:
    return f"layer {name!r}" if name else "the model"


def check_module(model: object) -> None:
    """Raise TypeError for what is no module, or one whose weights cannot be reached."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is TorchScript: give the module that was scripted or traced")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: ``nn.Linear``, or the Conv1D of GPT-2 in transformers."""
    conv1d = type(module).__name__ == "Conv1D" and "transformers" in type(module).__module__
    return isinstance(module, nn.Linear) or conv1d


def _layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all linear and convolution layers, each once."""
    wanted = set()
    for prefix, module in model.named_modules():
        if not (is_linear(module) or isinstance(module, _ConvNd)):
            continue
        wanted.add(id(layer_weight(prefix, module)))
    return _in_order(model, wanted)


MAKE_PARAMETER = (
    "Make the weight a parameter first: torch.nn.utils.parametrize.remove_parametrizations(layer, "
    "'weight'), torch.nn.utils.remove_weight_norm(layer) or torch.nn.utils.prune.remove(layer, "
    "'weight')"
)
"""The way out where a layer computes its weight from other parameters."""


def layer_weight(name: str, layer: nn.Module) -> nn.Parameter:
    """The weight of a layer; ValueError where the layer computes it from other parameters."""
    weight = layer._parameters.get("weight")
    if weight is None or computes_weight(layer):
        raise ValueError(
            f"layer {name!r} computes its weight from other parameters (weight norm, another "
            f"parametrization, or torch.nn.utils.prune). {MAKE_PARAMETER}; or leave the layer out "
            "with parameters="
        )
    return weight


def computes_weight(layer: nn.Module) -> bool:
    """Whether a layer computes its weight from other parameters."""
    return "weight" not in layer._parameters or parametrize.is_parametrized(layer, "weight")


def _named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters with these names; a tied parameter answers to each of its names."""
    if isinstance(names, str):
        raise TypeError(f"parameters must be a collection of names, got the string {names!r}")
    if not isinstance(names, Iterable):
        raise TypeError(
            "parameters must be names, or a predicate (name, parameter) -> bool, got "
            f"{type(names).__name__}"
        )
    every = named_parameters(model)
    wanted = set()
    for given in names:
        if not isinstance(given, str):
            raise TypeError(
                f"parameters must be names, such as {next(iter(every), 'fc.weight')!r}, or a "
                f"predicate (name, parameter) -> bool; among them is a {type(given).__name__}"
            )
        name = plain_name(given)
        if name not in every:
            raise ValueError(
                f"parameters names {name!r}, which the model does not have; its parameters are "
                f"{_listing(every)}"
            )
        wanted.add(id(every[name]))
    return _in_order(model, wanted)


def _in_order(model: nn.Module, wanted: set[int]) -> dict[str, nn.Parameter]:
    """The parameters with these identities, however they were found: ties go by this order."""
    first = named_parameters(model, remove_duplicate=True)
    return {n: p for n, p in first.items() if id(p) in wanted}


def _listing(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    rest = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def detached(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The same tensors without their history."""
    return {name: parameter.detach() for name, parameter in parameters.items()}
