"""Where the tensors of a safetensors file lie, without reading them.

The format: the length of the header in 8 bytes, little-endian; the header, JSON, from names to
types, shapes and places; the bytes of all tensors, without a hole.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

PRUNABLE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
COMPRESSED = "confprune.sparse"
"""Metadata in which `confprune.sparse.save_sparse` says how a network is stored."""
_METADATA = "__metadata__"
_LENGTH = 8
_ALIGNMENT = 8
_LONGEST = 100_000_000  # of a header, by the format


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes
    ----------
    path : pathlib.Path
        The file.
    name : str
    dtype : str
        As the format has it, such as ``"BF16"``.
    shape : tuple of int
    start, end : int
        The bytes of the file that hold it, in row-major order.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Layout:
    """A safetensors file: its header, and its tensors in the order in which they lie.

    Made by `read_layout`.
    """

    path: Path
    header: dict[str, Any]
    data_start: int
    tensors: tuple[StoredTensor, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """The free text of the header."""
        return dict(self.header.get(_METADATA) or {})

    def head(self, metadata: dict[str, str]) -> bytes:
        """What stands before the tensors in a file that differs from this one in its metadata."""
        header = self.header if _METADATA in self.header else {_METADATA: {}, **self.header}
        text = json.dumps(
            header | {_METADATA: metadata}, ensure_ascii=False, separators=(",", ":")
        ).encode()
        text += b" " * (-(_LENGTH + len(text)) % _ALIGNMENT)
        return len(text).to_bytes(_LENGTH, "little") + text


def read_layout(path: str | os.PathLike[str]) -> Layout:
    """Read the header of a safetensors file.

    Raises
    ------
    FileNotFoundError, PermissionError
        If there is no such file, or it may not be read.
    ValueError
        If it is not a safetensors file, or not a whole one.

    Examples
    --------
    >>> import tempfile, torch
    >>> from confprune.checkpoint.layout import read_layout
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": torch.zeros(2, 4)}, f"{folder}/model.safetensors")
    ...     layout = read_layout(f"{folder}/model.safetensors")
    >>> [(tensor.name, tensor.dtype, tensor.shape) for tensor in layout.tensors]
    [('fc.weight', 'F32', (2, 4))]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb"):  # safetensors takes a file without permission for none
        pass
    try:
        # As NumPy: for torch, the whole file would be reserved as memory that may be written.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(
            _cut_short(path) or f"{path} is not a safetensors file: {error}"
        ) from error
    return _parse(path)


def _parse(path: Path) -> Layout:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(min(length, _LONGEST)))
    start = _LENGTH + length
    tensors = [
        StoredTensor(
            path,
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            start + entry["data_offsets"][1],
        )
        for name, entry in header.items()
        if name != _METADATA
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    return Layout(path, header, start, tuple(tensors))


def _cut_short(path: Path) -> str | None:
    """What is missing of a file that ends too early; None if something else is wrong with it."""
    size = path.stat().st_size
    try:
        layout = _parse(path)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    for tensor in layout.tensors:
        if tensor.end > size:
            return (
                f"{path} is cut short: tensor {tensor.name!r} ends at byte {tensor.end:,}, the "
                f"file at byte {size:,}; copy or download it again"
            )
    return None
