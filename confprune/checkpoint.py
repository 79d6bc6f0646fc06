"""Weights in safetensors files: read them, write them, prune them without their network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

import confprune
from confprune.certificate.fingerprint import difference, fingerprint
from confprune.certificate.promise import promise
from confprune.criteria import CriterionLike
from confprune.files import written_whole
from confprune.levels import PruneLevels, levels_of
from confprune.parameters import DTYPES

if TYPE_CHECKING:
    from confprune.certificate import Certificate

# Without the network only names tell an embedding or a norm from a layer. The name that counts is
# the module's own: ViT's `embeddings.patch_embeddings.projection` is a convolution.
_NOT_A_LAYER = re.compile(r"emb|^wte$|^wpe$|^shared$|norm|^ln|^bn|relative_attention_bias")


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Parameters
    ----------
    path : path
        The file to read.

    Returns
    -------
    tensors : dict of str to Tensor
    metadata : dict of str to str

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a safetensors file.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    certificate: Certificate | None = None,
) -> None:
    """Write a network's state dict to a safetensors file, whole or not at all.

    Of tied weights one is stored, as `safetensors.torch.load_model` expects.

    Parameters
    ----------
    model : Module
        The network, usually a pruned one.
    path : path
        The file to write.
    certificate : Certificate, optional
        What the network was pruned by: its promise goes into the file's metadata.
    """
    metadata = {} if certificate is None else _record(certificate)
    with written_whole(path) as temporary:
        save_model(model, str(temporary), metadata)


def prune(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    sparsity: float | None = None,
    certificate: Certificate | None = None,
    scope: str | None = None,
    criterion: CriterionLike = "magnitude",
    pattern: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> PruneLevels:
    """Prune the tensors of a safetensors file: as a certificate says, or to a given sparsity.

    Everything else in the file stays as it is, to the last bit, its metadata included; the
    sparsity is added to them.

    Parameters
    ----------
    source, destination : path
        The file to read and the file to write, which may be the same.
    sparsity : float, optional
        Share of the prunable weights to prune, in [0, 1), without a guarantee.
    certificate : Certificate, optional
        Prune what it was made for, to the sparsity that it certifies.
    scope, criterion, pattern : optional
        As for `confprune.prune_levels`; with a certificate, its own.
    include : sequence of str, optional
        Patterns (``"encoder.*.weight"``) of the names to prune. By default the matrices and
        convolution kernels named ``weight``, without embeddings and norms.
    exclude : sequence of str, optional
        Patterns of the names to leave as they are.

    Returns
    -------
    PruneLevels
        The one level that was applied.

    Raises
    ------
    ValueError
        If the file is not a safetensors file; if nothing in it is to be pruned; if the
        certificate certifies nothing, was made for other weights (the difference is named), or by
        a criterion that needs more than the weights.

    Examples
    --------
    >>> import tempfile, torch
    >>> from confprune import checkpoint
    >>> from safetensors.torch import load_file, save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": torch.arange(1.0, 9).view(2, 4)}, f"{folder}/model.safetensors")
    ...     levels = checkpoint.prune(
    ...         f"{folder}/model.safetensors", f"{folder}/pruned.safetensors", sparsity=0.5
    ...     )
    ...     load_file(f"{folder}/pruned.safetensors")["fc.weight"]
    tensor([[0., 0., 0., 0.],
            [5., 6., 7., 8.]])
    """
    if (sparsity is None) == (certificate is None):
        raise ValueError("give either sparsity or certificate")
    tensors, metadata = read(source)
    if certificate is not None:
        prunable = _certified(tensors, metadata, certificate, source)
        pruning = certificate.pruning
        assert pruning is not None
        sparsity, record = certificate.sparsity, _record(certificate)
        scope, criterion, pattern = pruning.scope, pruning.criterion, pruning.pattern
        stored = dict(zip(pruning.parameters, prunable, strict=True))
        layout = {stored[name]: groups for name, groups in pruning.inputs_first.items()}
    else:
        assert sparsity is not None
        prunable, layout = _selected(tensors, include, exclude, source), {}
        record = {"confprune.sparsity": repr(sparsity), "confprune.version": confprune.__version__}
    levels = levels_of(
        prunable,
        [sparsity],
        scope=scope,
        criterion=criterion,
        pattern=pattern,
        inputs_first=layout,
    )
    pruned = {
        # Not a product with the mask: that would leave -0 behind, and NaN where inf was pruned.
        name: tensor.masked_fill(~levels.mask(name, 0), 0)
        for name, tensor in prunable.items()
    }
    if certificate is not None:
        pruned |= _tied_copies(tensors, pruned)
    with written_whole(destination) as temporary:
        save_file(tensors | pruned, temporary, metadata | record)
    return levels


def _record(certificate: Certificate) -> dict[str, str]:
    """The certificate's promise as metadata, whose values can only be text."""
    return {
        "confprune.sparsity": repr(certificate.sparsity),
        "confprune.certified": str(certificate.certified).lower(),
        "confprune.promise": promise(certificate),
        "confprune.version": confprune.__version__,
    }


def _certified(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    certificate: Certificate,
    source: str | os.PathLike[str],
) -> dict[str, Tensor]:
    """The tensors that the certificate was made for, in its order, under the file's names."""
    if certificate.pruning is None:
        raise ValueError(
            "the certificate was made from a loss matrix and does not say how to prune"
        )
    if not certificate.certified:
        raise ValueError("the certificate certifies no sparsity")
    if certificate.pruning.statistics:
        raise ValueError(
            f"criterion {certificate.pruning.criterion!r} needs more than the weights, and neither "
            "file holds it: prune the network itself, with certificate.prune(model)"
        )
    # Of tied weights the file holds one; its metadata say under which name.
    stored = {name: metadata.get(name, name) for name in certificate.pruning.parameters}
    found = {name: tensors[kept] for name, kept in stored.items() if kept in tensors}
    differs = difference(certificate.pruning.fingerprint, fingerprint(found))
    if differs is not None:
        raise ValueError(f"the certificate is not for {os.fspath(source)}: {differs}")
    return {stored[name]: tensor for name, tensor in found.items()}


def _tied_copies(tensors: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pruned values of the tensors that repeat a pruned one: tied weights stored under each name.

    Left dense, such a copy would undo the pruning where the network ties its weights on loading.
    """
    return {
        name: pruned[original].clone()
        for name, tensor in tensors.items()
        for original in pruned
        if name not in pruned and _same(tensor, tensors[original])
    }


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _selected(
    tensors: Mapping[str, Tensor],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    source: str | os.PathLike[str],
) -> dict[str, Tensor]:
    """The tensors to prune, by name and shape."""
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in tensors):
                raise ValueError(f"{argument} {pattern!r} matches no name in {os.fspath(source)}")

    def wanted(name: str, tensor: Tensor) -> bool:
        if _matches(name, exclude or ()):
            return False
        if include:
            return _matches(name, include)
        return tensor.is_floating_point() and tensor.dim() >= 2 and _names_a_layer(name)

    selected = {name: tensor for name, tensor in tensors.items() if wanted(name, tensor)}
    for name, tensor in selected.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype}; float32, float64, float16 and bfloat16 can be "
                "pruned: leave it out with exclude"
            )
    if not selected:
        raise ValueError(f"{os.fspath(source)} has no prunable weights: name some with include")
    return selected


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _names_a_layer(name: str) -> bool:
    *modules, parameter = name.split(".")
    own_name = modules[-1].lower() if modules else ""
    return parameter == "weight" and not _NOT_A_LAYER.search(own_name)
