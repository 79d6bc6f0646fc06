"""`torch.nn.utils.prune`, with a faster `global_unstructured` and `l1_unstructured`.

Change one import::

    import confprune.nn.utils.prune as prune  # was: import torch.nn.utils.prune as prune

Signatures, results and errors are torch's: masks are buffers, `remove` and `is_pruned` work, and
repeated pruning accumulates. Everything else of the module is torch's own. Only among equal
magnitudes, where torch's choice is unspecified, may other ones be pruned: the first.

What is faster is magnitude pruning, on the CPU, and on CUDA where confprune was built with it: the
weights to prune are found by confprune's selection, without sorting or copying the weights. Few
weights, weights on several or other devices, and weights with NaN go to torch.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.prune import (
    BasePruningMethod,
    CustomFromMask,
    Identity,
    LnStructured,
    PruningContainer,
    RandomStructured,
    RandomUnstructured,
    custom_from_mask,
    identity,
    is_pruned,
    ln_structured,
    random_structured,
    random_unstructured,
    remove,
)

from confprune.ops import build_info
from confprune.parameters import DTYPES
from confprune.selection import assign, select

_FEW = 1 << 14  # weights below which torch is as fast
_DEVICES = ("cpu",) if build_info()["cuda"] is None else ("cpu", "cuda")

__all__ = [
    "BasePruningMethod",
    "CustomFromMask",
    "Identity",
    "L1Unstructured",
    "LnStructured",
    "PruningContainer",
    "RandomStructured",
    "RandomUnstructured",
    "custom_from_mask",
    "global_unstructured",
    "identity",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "random_structured",
    "random_unstructured",
    "remove",
]


class L1Unstructured(torch_prune.L1Unstructured):
    """Prune the currently unpruned entries with the smallest magnitudes.

    Parameters
    ----------
    amount : int or float
        How many to prune, or, between 0 and 1, which share of them.

    Raises
    ------
    TypeError, ValueError
        As torch's, for an amount that is no number, negative, or, as a share, above 1.

    Examples
    --------
    >>> import torch
    >>> from confprune.nn.utils import prune
    >>> prune.L1Unstructured(amount=1).prune(torch.tensor([3.0, -1.0, 2.0]))
    tensor([3., -0., 2.])
    """

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask with the smallest magnitudes of `t` pruned too, of its shape."""
        kept = _kept([t], self.amount)
        if kept is None:
            by_torch: Tensor = super().compute_mask(t, default_mask)  # type: ignore[no-untyped-call]
            return by_torch
        mask = default_mask.clone(memory_format=torch.contiguous_format)
        return mask.mul_(kept[0].to(mask.dtype))


def l1_unstructured(
    module: nn.Module,
    name: str,
    amount: int | float,
    importance_scores: Tensor | None = None,
) -> nn.Module:
    """Prune the entries of a parameter that have the smallest magnitudes.

    As `torch.nn.utils.prune.l1_unstructured`: the module gets a buffer ``name_mask`` and the
    parameter ``name_orig``, from which ``name`` is computed before each forward.

    Parameters
    ----------
    module : Module
    name : str
        Of the parameter.
    amount : int or float
        How many of its unpruned entries to prune, or, between 0 and 1, which share of them.
    importance_scores : Tensor, optional
        Whose magnitudes decide in place of the parameter's own; of its shape.

    Returns
    -------
    Module
        The module, changed in place.

    Raises
    ------
    TypeError, ValueError
        As torch's, for a bad amount.

    Examples
    --------
    >>> import torch
    >>> from confprune.nn.utils import prune
    >>> layer = prune.l1_unstructured(torch.nn.Linear(4, 3), "weight", amount=0.5)
    >>> int(layer.weight_mask.sum()), prune.is_pruned(layer)
    (6, True)
    """
    L1Unstructured.apply(  # type: ignore[no-untyped-call]
        module, name, amount=amount, importance_scores=importance_scores
    )
    return module


def global_unstructured(
    parameters: Iterable[tuple[nn.Module, str]],
    pruning_method: type[BasePruningMethod],
    importance_scores: dict[tuple[nn.Module, str], Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Prune the entries of several parameters, all competing, as `pruning_method` chooses.

    As `torch.nn.utils.prune.global_unstructured`, and fast for `L1Unstructured`, this module's or
    torch's. Other methods are given to torch.

    Parameters
    ----------
    parameters : iterable of (Module, str)
        Modules, and names of their parameters.
    pruning_method : class
        Usually `L1Unstructured`.
    importance_scores : dict, optional
        From a pair (Module, str) to the tensor whose magnitudes decide in place of the parameter's
        own; of its shape.
    **kwargs
        Arguments of the pruning method: ``amount``, an int, or a share between 0 and 1.

    Raises
    ------
    TypeError, ValueError
        As torch's, for parameters that are no iterable, scores that are no dict, a method that
        prunes structures, or a bad amount.

    Examples
    --------
    >>> import torch
    >>> from confprune.nn.utils import prune
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
    >>> prune.global_unstructured(
    ...     [(net[0], "weight"), (net[1], "weight")],
    ...     pruning_method=prune.L1Unstructured,
    ...     amount=0.25,
    ... )
    >>> int(net[0].weight_mask.sum() + net[1].weight_mask.sum())
    30
    """
    if isinstance(parameters, Iterable):
        parameters = list(parameters)
    masks = _masks(parameters, pruning_method, importance_scores, **kwargs)
    if masks is None:
        torch_prune.global_unstructured(parameters, pruning_method, importance_scores, **kwargs)
        return
    for (module, name), mask in zip(parameters, masks, strict=True):
        custom_from_mask(module, name, mask=mask)


def _masks(
    parameters: object, pruning_method: object, importance_scores: object, **kwargs: Any
) -> list[Tensor] | None:
    """The new masks, those of earlier prunings included; None where torch has to do it."""
    by_magnitude = pruning_method in (L1Unstructured, torch_prune.L1Unstructured)
    scores_given = {} if importance_scores is None else importance_scores
    if not (by_magnitude and isinstance(parameters, list) and isinstance(scores_given, dict)):
        return None
    amount = L1Unstructured(**kwargs).amount
    scores, masks = [], []
    for module, name in parameters:
        parameter = getattr(module, name)
        score = scores_given.get((module, name), parameter)
        if score.shape != parameter.shape:
            return None
        mask = getattr(module, f"{name}_mask", None)
        scores.append(score if mask is None else score[mask == 1])
        masks.append(mask)
    kept = _kept(scores, amount)
    if kept is None:
        return None
    return [
        new if mask is None else mask.masked_scatter(mask == 1, new.to(mask.dtype))
        for mask, new in zip(masks, kept, strict=True)
    ]


def _kept(scores: Sequence[Tensor], amount: int | float) -> list[Tensor] | None:
    """Whether each entry is kept, all competing; None where torch has to say."""
    if not scores or not all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device == scores[0].device
        and tensor.device.type in _DEVICES
        and tensor.layout == torch.strided
        and tensor.dtype in DTYPES
        for tensor in scores
    ):
        return None
    total = sum(tensor.numel() for tensor in scores)
    if total < _FEW:
        return None
    count = amount if isinstance(amount, numbers.Integral) else round(amount * total)
    if count > total:
        raise ValueError(f"amount={amount} is more than the {total} parameters there are to prune")
    named = {str(place): tensor.detach() for place, tensor in enumerate(scores)}
    try:
        cuts = select(named, [int(count)])
    except ValueError:  # NaN, which torch keeps as the largest of all
        return None
    return [levels.bool() for levels in assign(named, cuts).values()]


def __getattr__(name: str) -> Any:
    """Whatever else torch's module has."""
    return getattr(torch_prune, name)
