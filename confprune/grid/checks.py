"""What a network and its losses are checked for on a few examples, before any long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from confprune.batches import batch_length, slice_batch
from confprune.grid.comparison import difference
from confprune.grid.layers import Layer
from confprune.grid.network import Network, PlainNetwork
from confprune.losses import Loss
from confprune.warning import warn

_MORE_EXAMPLES = 256


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


@contextmanager
def divisible(plain: PlainNetwork, batch: Any, part: Any) -> Iterator[None]:
    """Have the error of a run on a part of a batch say so if the network takes the batch whole."""
    try:
        yield
    except Exception as error:
        size, whole = batch_length(batch), slice_batch(batch, 0, batch_length(batch))
        if size == batch_length(part) or not _fails(plain, part) or _fails(plain, whole):
            raise
        raise ValueError(
            f"the model takes {size} examples at once, but not the first {batch_length(part)} of "
            f"them ({type(error).__name__}: {first_line(error)}); batches are taken apart: pass "
            "forward= that calls the model on any number of examples"
        ) from error


def _fails(plain: PlainNetwork, batch: Any) -> bool:
    try:
        plain(batch, lambda layer: layer.weight)
    except Exception:
        return True
    return False


def check_own_weights(originals: AbstractSet[str]) -> None:
    """Raise ValueError if a copy of the model was seen to compute with weights of the original."""
    if originals:
        raise ValueError(
            f"a copy of the model computes with the original's weights ({min(originals)!r}), not "
            "its own: forward= must call the model that it is given, and a module reach its "
            "weights through its attributes"
        )


def check_unwritten(plain: PlainNetwork, weight_of: Callable[[Layer], Tensor]) -> None:
    """Raise ValueError if runs with the given weights have changed parameters."""
    name = plain.written(weight_of)
    if name is not None:
        raise ValueError(
            f"running the model changes its parameter {name!r}, as where it scales or masks it "
            "anew in every call: the weights that are pruned would not be those that it computes "
            "with. Run it once, model.eval()(inputs), so that they are, or mask a copy in forward"
        )


def is_random(network: Network, batch: Any, full: Tensor, notes: list[str]) -> bool:
    """Whether outputs are; a warning and a note then, and where an example's depend on its batch.

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


def check_state(
    plain: PlainNetwork, network: Network, batch: Any, full: Tensor, *, random: bool
) -> None:
    """Raise ValueError if the full network, after runs of pruned ones, is not what it was.

    Of one whose outputs are random the same seed tells.
    """

    def again() -> Tensor:
        return plain(batch, lambda layer: layer.weight)

    if random:
        full = _seeded(network.device, lambda: network(batch))
        if difference(_seeded(network.device, lambda: network(batch))[None], full[None]):
            return  # it has a seed of its own, or counts its calls
    if difference((_seeded(network.device, again) if random else again())[None], full[None]):
        raise ValueError(
            "the network's outputs depend on its calls before (after some with pruned weights "
            "the full ones give others), as where it keeps what it makes of its weights: what "
            "a pruned network gives cannot be told then; have it make that anew in every call"
        )


def _seeded(device: torch.device, run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives from one and the same state of torch's generators, which are put back."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(0)
        return run()
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def unused(
    plain: PlainNetwork,
    batch: Any,
    part: Any,
    full: Tensor,
    met: AbstractSet[str],
    notes: list[str],
) -> AbstractSet[str]:
    """The weights that change no output, of those that no function met: these need no mask yet.

    `full` are the outputs on `part`; of a batch some examples more are asked before one is told.

    Raises
    ------
    ValueError
        If these are all that are pruned, and change nothing there either.
    """
    unmet = plain.names - met
    if not unmet:
        return unmet

    def spoilt(layer: Layer) -> Tensor:
        return layer.weight * torch.nan if layer.name in unmet else layer.weight

    if not torch.equal(plain(part, spoilt), full):
        return frozenset()
    more = slice_batch(batch, 0, _MORE_EXAMPLES)
    if not torch.equal(plain(more, spoilt), plain(more, lambda layer: layer.weight)):
        return unmet
    if unmet == plain.names:
        raise ValueError(
            f"the outputs of the first {batch_length(more)} examples depend on none of the weights "
            "that are pruned: the network does not use them, or computes with something that it "
            "made of them in an earlier call"
        )
    many = f" (and {len(unmet) - 1} more)" if len(unmet) > 1 else ""
    notes.append(
        f"{min(unmet)!r}{many} is pruned and changes no output of the first {batch_length(more)} "
        "examples: the network does not use it, or only what it made of it in an earlier call; "
        "parameters= says what to prune"
    )
    return unmet


def warn_of_hooks(model: nn.Module, notes: list[str]) -> None:
    """A warning and a note where hooks hold modules of the model, not of its copies."""
    modules = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if any(id(held) in modules for held in _held(hook)):
                note = (
                    f"a hook of {name or type(module).__name__!r} holds a module of the model in "
                    "its closure: in copies of the model, which pruned networks are, it uses the "
                    "original's. A method of a module would be copied with it"
                )
                notes.append(note)
                warn(note)
                return


def _held(function: object) -> list[object]:
    """What the variables of a closure hold."""
    held = []
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # where one is empty
            held.append(cell.cell_contents)
    return held


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
