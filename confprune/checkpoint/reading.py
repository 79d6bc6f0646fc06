"""Read files a block at a time, so that no more than a few blocks are ever in memory.

Blocks are read into buffers and not mapped: mapped pages count as resident memory, and where a file
shrinks or a disk fails, a mapping ends the process without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from confprune.checkpoint.layout import StoredTensor

BLOCK = 1 << 21
"""Bytes of a block where nothing asks for more or less: it stays in the caches."""
_FIRST_LOOK = 1 << 12

Bytes = NDArray[np.uint8]
Item = TypeVar("Item")


class Buffers:
    """Two buffers in turn: what one holds is good until the next but one is taken."""

    def __init__(self) -> None:
        self._this = self._other = np.empty(0, dtype=np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """A buffer of this size."""
        self._this, self._other = self._other, self._this
        if len(self._this) < nbytes:
            self._this = np.empty(nbytes, dtype=np.uint8)
        return self._this[:nbytes]


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def file_blocks(
    path: Path, start: int, end: int, size: int = BLOCK, buffers: Buffers | None = None
) -> Iterator[Bytes]:
    """Bytes `start` to `end` of a file, at most `size` at a time, good as `Buffers` says.

    Raises
    ------
    EOFError
        If the file ends before.
    """
    buffers = buffers or Buffers()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            block = buffers.take(min(size, end - start))
            filled = 0
            while filled < len(block):
                count = file.readinto(block.data[filled:])
                if not count:
                    raise EOFError(f"{path} ends at byte {start + filled:,}, not at {end:,}")
                filled += count
            yield block
            start += len(block)


def tensor_blocks(
    tensor: StoredTensor,
    start: int,
    end: int,
    size: int = BLOCK,
    buffers: Buffers | None = None,
) -> Iterator[Bytes]:
    """As `file_blocks`, of bytes within a tensor, for which the place counts from its start.

    Raises
    ------
    OSError
        If the file ends before, naming tensor and file.
    """
    try:
        yield from file_blocks(tensor.path, tensor.start + start, tensor.start + end, size, buffers)
    except EOFError as error:
        raise OSError(f"tensor {tensor.name!r} cannot be read: {error}") from error


def read_pieces(tensor: StoredTensor, starts: Iterable[int], pieces: NDArray[Any]) -> None:
    """Fill each row of `pieces` from one of some places in a tensor.

    Raises
    ------
    OSError
        If the file ends before, naming tensor and file.
    """
    with open(tensor.path, "rb", buffering=0) as file:
        for start, piece in zip(starts, pieces, strict=True):
            file.seek(tensor.start + start)
            if file.readinto(piece.data) < piece.nbytes:
                raise OSError(f"tensor {tensor.name!r} cannot be read: {tensor.path} is cut short")


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are equal to the bit, in type and shape too."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    # Almost all pairs differ at once.
    return all(_same_start(a, b, min(a.nbytes, size)) for size in (_FIRST_LOOK, a.nbytes))


def _same_start(a: StoredTensor, b: StoredTensor, size: int) -> bool:
    left, right = (file_blocks(t.path, t.start, t.start + size) for t in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(left, right, strict=True))
