"""Fingerprints of weights: tell whether a network is the one that a certificate was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22


def fingerprint(named_parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and SHA-256 of the bytes of each tensor, ready for JSON.

    The bytes are taken in logical order, so neither strides nor device matter: a channels-last
    weight and its contiguous copy have one fingerprint. Tensors are read a chunk at a time.

    Parameters
    ----------
    named_parameters : mapping of str to Tensor
        The tensors, of any shape, dtype, device and strides.

    Returns
    -------
    dict
        name -> ``{"shape": [...], "dtype": "float32", "sha256": "..."}``

    Examples
    --------
    >>> import torch
    >>> weight = torch.arange(6.0).reshape(2, 3)
    >>> fingerprint({"weight": weight})["weight"]["shape"]
    [2, 3]
    >>> fingerprint({"weight": weight.t().contiguous().t()}) == fingerprint({"weight": weight})
    True
    """
    return {
        # A view of the bytes, because NumPy has no bfloat16.
        name: fingerprint_entry(
            tensor.shape,
            tensor.dtype,
            (chunk.cpu().view(torch.uint8).numpy().data for chunk in _chunks(tensor.detach())),
        )
        for name, tensor in named_parameters.items()
    }


def fingerprint_entry(
    shape: Sequence[int], dtype: object, pieces: Iterable[memoryview]
) -> dict[str, Any]:
    """The fingerprint of one tensor whose bytes come in pieces, in logical order."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "sha256": digest.hexdigest(),
    }


def difference(
    expected: Mapping[str, Mapping[str, Any]], actual: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Say in one phrase how two fingerprints differ, the most telling difference first.

    Parameters
    ----------
    expected, actual : mapping
        Results of `fingerprint`.

    Returns
    -------
    str or None
        None if they are the same. Otherwise, in this order: a missing parameter, an extra one,
        another shape, another dtype, other values.

    Examples
    --------
    >>> import torch
    >>> difference(fingerprint({"weight": torch.ones(2)}), fingerprint({"weight": torch.ones(3)}))
    "parameter 'weight' has shape [3] instead of [2]"
    """
    missing = [name for name in expected if name not in actual]
    if missing:
        return f"parameter {missing[0]!r} is missing{_and_more(missing)}"
    extra = [name for name in actual if name not in expected]
    if extra:
        return f"parameter {extra[0]!r} was not there{_and_more(extra)}"
    for property_ in ("shape", "dtype"):
        for name, entry in expected.items():
            found = actual[name][property_]
            if found != entry[property_]:
                wanted = entry[property_]
                return f"parameter {name!r} has {property_} {found} instead of {wanted}"
    changed = [name for name in expected if actual[name]["sha256"] != expected[name]["sha256"]]
    if changed:
        share = f"{len(changed)} of {len(expected)} prunable parameters differ"
        return f"the values of parameter {changed[0]!r} are others ({share})"
    return None


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in logical order, as contiguous one-dimensional pieces of bounded size."""
    if tensor.numel() <= CHUNK_ELEMENTS:
        # A fresh tensor, because a byte view wants stride 1 even of a single element.
        yield torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1)
    elif tensor.is_contiguous():
        yield from tensor.view(-1).split(CHUNK_ELEMENTS)
    else:
        rows = max(1, CHUNK_ELEMENTS * len(tensor) // tensor.numel())
        for piece in tensor.split(rows):
            yield from _chunks(piece.squeeze(0) if len(piece) == 1 else piece)
