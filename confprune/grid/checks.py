"""What a network and its losses are checked for on a few examples, before any long work."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from confprune.batches import batch_length, slice_batch
from confprune.grid.comparison import difference
from confprune.grid.network import Network, PlainNetwork
from confprune.losses import Loss
from confprune.warning import warn


def check_outputs(outputs: Tensor, size: int) -> None:
    """Raise ValueError unless there is one row for each of so many examples."""
    if outputs.ndim == 0 or outputs.shape[0] != size:
        raise ValueError(
            f"the model's output has shape {list(outputs.shape)} for a batch of {size} examples; "
            "its first dimension must be the batch: pass forward= to arrange that"
        )


def check_values(loss: Loss, values: object, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a loss gave one value per example, [B] or [levels, B]."""
    if not isinstance(values, Tensor) or values.shape != shape:
        # What it returns for one network, without the levels.
        found = list(values.shape[len(shape) - 1 :]) if isinstance(values, Tensor) else None
        raise ValueError(
            f"loss {loss.name!r} returned {type(values).__name__ if found is None else found} for "
            f"{shape[-1]} examples; it must return one value per example, a tensor [B]"
        )


def check_divisible(network: Network, batch: Any, part: Any, error: Exception) -> None:
    """Raise ValueError if the network, which fails with `error` on a part, takes a batch whole."""
    if batch_length(batch) == batch_length(part):
        return
    try:
        network(slice_batch(batch, 0, batch_length(batch)))
    except Exception:
        return
    raise ValueError(
        f"the model takes {batch_length(batch)} examples at once, but not the first "
        f"{batch_length(part)} of them ({type(error).__name__}: {first_line(error)}); batches "
        "are taken apart: pass forward= that calls the model on any number of examples"
    ) from error


def check_own_weights(originals: AbstractSet[str]) -> None:
    """Raise ValueError if a copy of the model was seen to compute with weights of the original."""
    if originals:
        raise ValueError(
            f"a copy of the model computes with the original's weights ({min(originals)!r}), not "
            "its own: forward= must call the model that it is given, and a module reach its "
            "weights through its attributes"
        )


def is_random(network: Network, batch: Any, full: Tensor, notes: list[str]) -> bool:
    """Whether outputs are; a warning and a note, too, where an example's depend on its batch.

    The losses of such examples are not independent.
    """
    half = len(full) // 2
    if half == 0:
        return False
    part = slice_batch(batch, 0, half)
    apart = network(part)
    if not difference(apart[None], full[None, :half]):
        return False
    note = (
        "the outputs of an example depend on the other examples of its batch (as with a "
        "BatchNorm without running statistics); the guarantee needs independent losses"
    )
    random = bool(difference(network(part)[None], apart[None]))
    if random:
        note = (
            "the network's outputs are random (as with a dropout that is on in evaluation mode "
            "too), or change with what it keeps from call to call: the risk is an average over "
            "that, and a certificate may not verify"
        )
    notes.append(note)
    warn(note)
    return random


def check_state(plain: PlainNetwork, batch: Any, full: Tensor) -> None:
    """Raise ValueError if the full network, after runs of pruned ones, is not what it was."""
    again = plain(batch, lambda layer: layer.weight)
    if difference(again[None], full[None]):
        raise ValueError(
            "the network's outputs depend on its calls before (after some with pruned weights "
            "the full ones give others), as where it keeps what it makes of its weights: what "
            "a pruned network gives cannot be told then; have it make that anew in every call"
        )


def unused(
    plain: PlainNetwork, batch: Any, full: Tensor, met: AbstractSet[str], notes: list[str]
) -> AbstractSet[str]:
    """The weights that change no output, of those that no function met: these need no mask.

    Raises
    ------
    ValueError
        If these are all that are pruned.
    """
    unmet = plain.names - met
    if not unmet:
        return unmet
    outputs = plain(
        batch, lambda layer: layer.weight * torch.nan if layer.name in unmet else layer.weight
    )
    if not torch.equal(outputs, full):
        return frozenset()
    if unmet == plain.names:
        raise ValueError(
            "the outputs depend on none of the weights that are pruned: the network does not "
            "use them, or computes with something that it made of them in an earlier call"
        )
    many = f" (and {len(unmet) - 1} more)" if len(unmet) > 1 else ""
    notes.append(
        f"{min(unmet)!r}{many} is pruned and changes no output: the network does not use it, "
        "or only what it made of it in an earlier call"
    )
    return unmet


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
