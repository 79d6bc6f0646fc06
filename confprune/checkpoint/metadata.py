"""What confprune writes into the metadata of a safetensors file, whose values can only be text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import confprune
from confprune.certificate.promise import promise

if TYPE_CHECKING:
    from confprune.certificate import Certificate

_OURS = "confprune."


def plain_record(sparsity: float) -> dict[str, str]:
    """Of a pruning to a sparsity that was asked for."""
    return {f"{_OURS}sparsity": repr(sparsity), f"{_OURS}version": confprune.__version__}


def certified_record(certificate: Certificate) -> dict[str, str]:
    """Of a pruning by a certificate: its promise too."""
    return plain_record(certificate.sparsity) | {
        f"{_OURS}certified": str(certificate.certified).lower(),
        f"{_OURS}promise": promise(certificate),
    }


def recorded(metadata: Mapping[str, str], record: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file with this record, in place of that of an earlier pruning.

    A file without any gets the format too: some loaders refuse metadata that do not name one.
    """
    kept = {key: value for key, value in metadata.items() if not key.startswith(_OURS)}
    return {**(kept or {"format": "pt"}), **record}
