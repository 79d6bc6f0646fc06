"""How a model is called on a batch, and what its outputs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from confprune.batches import tensors_of
from confprune.losses import Reference

Forward: TypeAlias = Callable[[nn.Module, Any], Any]

_LABELS = ("labels", "label")
_OUTPUTS = ("logits", "out", "last_hidden_state")


def call(model: nn.Module, batch: Any, forward: Forward | None) -> Tensor:
    """The model's outputs on a batch, as a tensor [B, ...].

    Without `forward`, inputs go to the model as its argument, a tuple of inputs as its arguments, a
    mapping less its labels as its keywords; of an output that has them, as a key or an attribute,
    the `logits` are taken, `out` of torchvision's, or else the `last_hidden_state`.

    Raises
    ------
    TypeError
        If the output is no tensor, or the data is of another type than the weights and the model
        does not convert it.
    """
    try:
        outputs = forward(model, batch) if forward is not None else _default_forward(model, batch)
    except RuntimeError as error:
        explained = _types_that_differ(model, batch, str(error))
        if explained is None:
            raise
        raise TypeError(explained) from error
    except (TypeError, ValueError) as error:
        without_labels = isinstance(batch, Mapping) and any(key in batch for key in _LABELS)
        if forward is not None or not (without_labels or "argument" in str(error)):
            raise
        raise type(error)(
            f"{error}: of a batch the model is given the inputs, where it is (inputs, targets), or "
            "all keys but the labels, as keywords; for another way pass forward=lambda model, "
            "batch: ..."
        ) from error
    for key in _OUTPUTS:
        found = outputs.get(key) if isinstance(outputs, Mapping) else getattr(outputs, key, None)
        if isinstance(found, Tensor) and not isinstance(outputs, Tensor):
            return found
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model's output is a {type(outputs).__name__}, not a tensor [B, ...]; pass "
            "forward=lambda model, batch: ... that returns the tensor the loss takes"
        )
    return outputs


def check_forward(forward: object) -> None:
    """Raise TypeError for what cannot be called; None is fine."""
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be a callable (model, batch) -> outputs, got {forward!r}")


def targets_of(batch: Any) -> Tensor | None:
    """The labels of a batch, if it has any."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in _LABELS if key in batch), None)
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def padding_mask_of(batch: Any) -> Tensor | None:
    """True at the positions of sequences that are not padding, if the batch says.

    Of an encoder and a decoder the outputs are at the decoder's positions.
    """
    if not isinstance(batch, Mapping):
        return None
    decodes = any(key.startswith("decoder_") for key in batch if isinstance(key, str))
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def reference_of(outputs: Tensor, batch: Any) -> Reference:
    """What pruned outputs on a batch are compared with: the full network's, labels and padding."""
    return Reference(outputs, targets_of(batch), padding_mask_of(batch))


def _default_forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key not in _LABELS})
    if isinstance(batch, tuple | list):
        if len(batch) not in (1, 2):
            raise ValueError(
                f"a batch must be (inputs, targets), inputs alone or a mapping; got {len(batch)} "
                "values: pass forward=lambda model, batch: ... that calls the model"
            )
        batch = batch[0]
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _types_that_differ(model: nn.Module, batch: Any, error: str) -> str | None:
    """What to say of an error that comes of data and weights of different types."""
    tensors = list(tensors_of(batch))
    data = {t.dtype for t in tensors if t.is_floating_point()} or {t.dtype for t in tensors}
    weights = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if "type" not in error or data <= weights:
        return None
    of_data, of_weights = (", ".join(sorted(map(str, types))) for types in (data, weights))
    return (
        f"the data is {of_data} and the model's weights are {of_weights}: convert the data, with "
        f".to({of_weights}), or the model, or do so in forward=lambda model, batch: ... "
        f"({error.splitlines()[0]})"
    )
