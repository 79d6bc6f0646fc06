"""The tensors of a checkpoint that a certificate was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from confprune.certificate.deployed import check_certificate
from confprune.certificate.fingerprint import difference, fingerprint_entry
from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.reading import ahead, same_bytes, tensor_blocks
from confprune.checkpoint.source import Checkpoint

if TYPE_CHECKING:
    from confprune.certificate import Certificate


def certified_tensors(checkpoint: Checkpoint, certificate: Certificate) -> list[StoredTensor]:
    """The tensors that the certificate was made for, in its order.

    Raises
    ------
    TypeError
        If it is no certificate.
    ValueError
        If it certifies nothing, or was made for other weights, naming the difference.
    """
    check_certificate(certificate)
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
    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    # Of tied weights the file may hold one; its metadata say under which name.
    kept = checkpoint.metadata
    found = {
        name: stored[kept.get(name, name)]
        for name in certificate.pruning.parameters
        if kept.get(name, name) in stored
    }
    actual = {name: _entry(tensor) for name, tensor in found.items()}
    differs = difference(certificate.pruning.fingerprint, actual)
    if differs is not None:
        raise ValueError(f"the certificate is not for {checkpoint.source}: {differs}")
    return list(found.values())


def tied_copies(
    checkpoint: Checkpoint, pruned: list[StoredTensor]
) -> dict[str, list[StoredTensor]]:
    """The tensors that repeat a pruned one, by its name: tied weights stored under each name.

    Left dense, such a copy would undo the pruning where the network ties its weights on loading.
    """
    names = {tensor.name for tensor in pruned}
    others = [tensor for tensor in checkpoint.tensors if tensor.name not in names]
    return {
        tensor.name: [other for other in others if same_bytes(other, tensor)] for tensor in pruned
    }


def _entry(tensor: StoredTensor) -> dict[str, object]:
    dtype = PRUNABLE_DTYPES.get(tensor.dtype, tensor.dtype)
    blocks = tensor_blocks(tensor, 0, tensor.nbytes)
    return fingerprint_entry(tensor.shape, dtype, (block.data for block in ahead(blocks)))
