"""Write a network in memory to a safetensors file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from safetensors.torch import save_model
from torch import nn

from confprune.certificate.deployed import check_deployed
from confprune.checkpoint.metadata import certified_record
from confprune.files import written_whole

if TYPE_CHECKING:
    from confprune.certificate import Certificate


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

    Raises
    ------
    TypeError
        If `certificate` is none, but the path of one, say.
    ValueError
        If it cannot be this network's: a name, shape or type differs, or too few weights are zero.
    """
    metadata = {}
    if certificate is not None:
        check_deployed(certificate, model)
        metadata = certified_record(certificate)
    with written_whole(path) as temporary:
        save_model(model, str(temporary), metadata)
