"""Compressed networks in one safetensors file, their certificate with them.

The file holds the state dict. Tensors that stay dense in memory but have many zeros (the fused
projection of an attention layer, say) are stored as a bitmap and their surviving values; of tied
tensors one is stored; 64-bit offsets of sparse layers are stored in 32 where they fit. The metadata
say which, name the sparse layers, and hold the certificate.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import confprune
from confprune.checkpoint.layout import COMPRESSED
from confprune.files import written_whole
from confprune.parameters import DTYPES, check_module, named_modules, plain_name
from confprune.sparse.compression import check_kernel, dense_from_of, replaced_in, sparse_like
from confprune.sparse.modules import PACKED, SparseLayer

if TYPE_CHECKING:
    from confprune.certificate import Certificate

FORMAT = 1
_MANIFEST, _CERTIFICATE = COMPRESSED, "confprune.certificate"
_BITMAP, _SURVIVORS = "confprune.bitmap", "confprune.survivors"


def save_sparse(
    model: nn.Module,
    path: str | os.PathLike[str],
    certificate: Certificate | None = None,
) -> None:
    """Write a compressed network to a safetensors file, whole or not at all.

    Parameters
    ----------
    model : torch.nn.Module
        Made by `compress`.
    path : path
        The file to write.
    certificate : Certificate, optional
        What the network was pruned by; `load_certificate` reads it from the file.

    Raises
    ------
    TypeError
        If `model` is no module, or `certificate` is none, but the path of one, say.
    ValueError
        If it cannot be this network's: a name, shape or type differs, or too few weights are zero.

    Examples
    --------
    >>> import tempfile, torch, confprune
    >>> model = torch.nn.Linear(256, 256)
    >>> pruned = confprune.prune_levels(model, [0.9]).prune(model, 0)
    >>> small = confprune.sparse.compress(pruned, kernel="sparse")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     confprune.sparse.save_sparse(small, f"{folder}/small.safetensors")
    ...     again = confprune.sparse.load_sparse(f"{folder}/small.safetensors", model)
    >>> torch.equal(again.weight, pruned.weight)
    True
    """
    check_module(model)
    if certificate is not None:
        from confprune.certificate.deployed import check_deployed

        check_deployed(certificate, model)
    modules = model.named_modules()
    layers = [plain_name(name) for name, part in modules if isinstance(part, SparseLayer)]
    state = {plain_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
    stored, tied = _without_ties(state)
    packed = {_member(layer, name) for layer in layers for name in PACKED}
    bitmaps = {}
    for name in [name for name in stored if name not in packed]:
        parts = _as_bitmap(stored[name])
        if parts is not None:
            bitmaps[name] = list(stored.pop(name).shape)
            stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    stored |= {name: _narrow(stored[name]) for name in _offsets(layers) if name in stored}
    manifest = {"format": FORMAT, "layers": layers, "tied": tied, "bitmaps": bitmaps}
    metadata = {
        "format": "pt",
        "confprune.version": confprune.__version__,
        _MANIFEST: json.dumps(manifest, separators=(",", ":")),
    }
    if certificate is not None:
        metadata[_CERTIFICATE] = certificate.to_json()
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in stored.items()}
    with written_whole(path) as temporary:
        save_file(contiguous, temporary, metadata)


def load_sparse(
    path: str | os.PathLike[str], model: nn.Module, *, kernel: str = "auto"
) -> nn.Module:
    """The compressed network of a file that `save_sparse` wrote.

    Parameters
    ----------
    path : path
        The file to read.
    model : torch.nn.Module
        The dense network, for its structure: its weights do not count. Left as it is.
    kernel : {"auto", "sparse", "dense"}
        As for `compress`, but that no layer is made dense. Measured on the CPU.

    Returns
    -------
    torch.nn.Module
        As `compress` gives it, on the CPU.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is of another kind, or does not fit the model: a name, shape or type that
        differs is named.
    """
    check_kernel(kernel)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _MANIFEST not in metadata:
        raise ValueError(f"{os.fspath(path)} was not written by confprune.sparse.save_sparse")
    manifest = json.loads(metadata[_MANIFEST])
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{os.fspath(path)} has format {manifest['format']}, this version reads {FORMAT}"
        )
    small = _empty(model, manifest["layers"], path)
    state = _decoded(tensors, manifest["bitmaps"], path)
    for name in _offsets(manifest["layers"]):
        if name in state and state[name].dtype == torch.int32:
            state[name] = state[name].long()
    state |= {name: state[kept] for name, kept in manifest["tied"].items()}
    _check_fit(state, small, path)
    ties = _tied_parameters(small)
    try:
        small.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(path)} does not fit the model: {error}") from error
    for first, *others in ties:
        for name in others:
            module, _, leaf = name.rpartition(".")
            small.get_submodule(module)._parameters[leaf] = small.get_parameter(first)
    for name, tensor in (*small.named_parameters(), *small.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name!r} is in no file, so the model has to come with its values")
    for layer in small.modules():
        if isinstance(layer, SparseLayer):
            layer.dense_from = dense_from_of(layer, kernel)
    return small


def load_certificate(path: str | os.PathLike[str]) -> Certificate | None:
    """The certificate in a file that `save_sparse` wrote.

    Parameters
    ----------
    path : path
        The file to read.

    Returns
    -------
    Certificate or None
        None if the file was written without one.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a safetensors file, or what it holds is not a certificate.
    """
    from confprune.certificate import Certificate

    with _opened(path) as file:
        text = (file.metadata() or {}).get(_CERTIFICATE)
    return None if text is None else Certificate.from_json(text)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _without_ties(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name, and the other names with that one."""
    first: dict[tuple[Any, ...], str] = {}
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        known = first.setdefault(place, name) if tensor.numel() > 0 else name
        if known == name:
            kept[name] = tensor
        else:
            tied[name] = known
    return kept, tied


def _offsets(layers: list[str]) -> list[str]:
    """The tensors of sparse layers that are 64-bit in memory."""
    return [_member(layer, "cells") for layer in layers]


def _narrow(offsets: Tensor) -> Tensor:
    """The same in 32 bits, if they fit."""
    narrow = offsets.int()
    return narrow if torch.equal(narrow.long(), offsets) else offsets


def _member(layer: str, name: str) -> str:
    """The name of a layer's tensor in the state dict; the network itself is the layer ""."""
    return f"{layer}.{name}".lstrip(".")


def _as_bitmap(tensor: Tensor) -> dict[str, Tensor] | None:
    """Where the values of a tensor are, one bit each, and what they are; None if not smaller."""
    if tensor.dtype not in DTYPES:
        return None
    flat = tensor.detach().cpu().flatten()
    survives = flat != 0
    survivors = flat[survives]
    size = survivors.numel() * flat.element_size() + (flat.numel() + 7) // 8
    if size >= flat.numel() * flat.element_size():
        return None
    bits = np.packbits(survives.numpy(), bitorder="little")
    return {_BITMAP: torch.from_numpy(bits), _SURVIVORS: survivors}


def _decoded(
    tensors: Mapping[str, Tensor], bitmaps: Mapping[str, list[int]], path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """The tensors of a file, those stored as bitmaps made dense again."""
    state = dict(tensors)
    for name, shape in bitmaps.items():
        parts = [state.pop(f"{name}.{part}", None) for part in (_BITMAP, _SURVIVORS)]
        size = math.prod(shape)
        bits, survivors = parts
        if bits is None or survivors is None or bits.numel() != (size + 7) // 8:
            raise ValueError(f"{os.fspath(path)} is damaged: the bitmap of {name!r} is not whole")
        survives = np.unpackbits(bits.numpy(), count=size, bitorder="little").astype(bool)
        if int(survives.sum()) != survivors.numel():
            raise ValueError(f"{os.fspath(path)} is damaged: {name!r} lacks values")
        flat = torch.zeros(size, dtype=survivors.dtype)
        flat[torch.from_numpy(survives)] = survivors
        state[name] = flat.view(shape)
    return state


def _empty(model: nn.Module, layers: list[str], path: str | os.PathLike[str]) -> nn.Module:
    """A copy of the model in which the named layers are sparse and hold nothing."""
    modules = named_modules(model)
    empty: dict[int, nn.Module] = {}
    for name in layers:
        if name not in modules:
            raise ValueError(f"{os.fspath(path)} has a sparse layer {name!r}, the model has not")
        try:
            empty[id(modules[name])] = sparse_like(modules[name])
        except TypeError as error:
            raise ValueError(f"{os.fspath(path)} does not fit: layer {name!r}: {error}") from error
    return replaced_in(model, empty)


def _check_fit(state: Mapping[str, Tensor], small: nn.Module, path: str | os.PathLike[str]) -> None:
    """Name what differs between the file and the model; sizes of packed tensors may."""
    expected = small.state_dict()
    packed = {
        _member(layer, name)
        for layer, module in small.named_modules(remove_duplicate=False)
        if isinstance(module, SparseLayer)
        for name in PACKED
    }
    where = os.fspath(path)
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{where} lacks {name!r}, which the model has")
        found = state[name]
        if found.dtype != tensor.dtype:
            raise ValueError(
                f"{name!r} is {found.dtype} in {where} and {tensor.dtype} in the model: "
                f"give model.to({found.dtype}), or the model that was compressed"
            )
        if name not in packed and found.shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {list(found.shape)} in {where} and {list(tensor.shape)} in "
                "the model"
            )
    for name in state:
        if name not in expected:
            raise ValueError(f"{where} has {name!r}, which the model has not")


def _tied_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]
