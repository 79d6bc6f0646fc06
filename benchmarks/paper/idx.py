"""IDX files, as MNIST comes in: plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PARTS = {
    "train-images": "images to train on",
    "train-labels": "their digits",
    "t10k-images": "other images",
    "t10k-labels": "their digits",
}
_GZIP = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes.

    Raises
    ------
    ValueError
        If the file is corrupt, truncated or of another kind, naming it.
    """
    content = path.read_bytes()
    if content[:2] == _GZIP:
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is truncated or corrupt: {error}") from error
    if len(content) < 4 or content[:2] != b"\x00\x00":
        raise ValueError(f"{path} is not an IDX file: it does not begin with two zero bytes")
    kind, dimensions = content[2], content[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(f"{path} holds values of type 0x{kind:02x}, not unsigned bytes (0x08)")
    begin = 4 + 4 * dimensions
    if len(content) < begin:
        raise ValueError(f"{path} is truncated: it ends within its header")
    shape = struct.unpack(f">{dimensions}I", content[4:begin])
    size, found = math.prod(shape), len(content) - begin
    if found != size:
        what = "truncated" if found < size else "corrupt"
        raise ValueError(
            f"{path} is {what}: its header announces {'x'.join(map(str, shape))} = {size:,} values "
            f"and {found:,} follow"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=begin).reshape(shape)


def find_mnist(folder: Path) -> dict[str, Path] | None:
    """The four files of MNIST somewhere below a folder; None where there is none of them.

    Raises
    ------
    ValueError
        If some of them are missing.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*idx?-ubyte*"), reverse=True):  # the plain one last
        name = re.fullmatch(r"(.+)[-.]idx[13]-ubyte(\.gz)?", path.name)
        if name and name[1] in PARTS and path.is_file():
            found[name[1]] = path
    if not found:
        return None
    missing = [f"{name} ({what})" for name, what in PARTS.items() if name not in found]
    if missing:
        raise ValueError(f"{folder} holds a part of MNIST only; missing: {', '.join(missing)}")
    return found


def read_labelled(
    images: Path, labels: Path, classes: int = 10
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [n, height, width] and their labels [n] from two IDX files.

    Raises
    ------
    ValueError
        If either file is bad, or they do not fit each other.
    """
    pixels, digits = read_idx(images), read_idx(labels)
    if pixels.ndim != 3:
        raise ValueError(f"{images} holds an array of shape {list(pixels.shape)}, not images")
    if digits.ndim != 1:
        raise ValueError(f"{labels} holds an array of shape {list(digits.shape)}, not labels")
    if len(pixels) != len(digits):
        raise ValueError(f"{images} holds {len(pixels)} images and {labels} {len(digits)} labels")
    if len(pixels) == 0:
        raise ValueError(f"{images} holds no images")
    if digits.max() >= classes:
        raise ValueError(f"{labels} holds the label {digits.max()}, not one of {classes} classes")
    return pixels, digits
