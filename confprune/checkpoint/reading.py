"""Read tensors of files a block at a time: no more is ever in memory.

Blocks are read into one buffer and not mapped: mapped pages count as resident memory, cost a fault
each, and a file that shrinks, or a disk that fails, would end the process without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confprune.checkpoint.layout import StoredTensor

BLOCK = 1 << 24
"""Bytes: many enough that the counters of a histogram cost little beside them."""
_FIRST_LOOK = 1 << 12

Bytes = NDArray[np.uint8]


def tensor_blocks(tensor: StoredTensor, buffer: Bytes) -> Iterator[Bytes]:
    """The bytes of a tensor, in pieces as large as the buffer, which holds one at a time.

    Raises
    ------
    OSError
        If the file ends before the tensor does, naming both.
    """
    try:
        yield from file_blocks(tensor.path, tensor.start, tensor.end, buffer)
    except EOFError as error:
        raise OSError(f"{error} (within tensor {tensor.name!r})") from error


def file_blocks(path: Path, start: int, end: int, buffer: Bytes) -> Iterator[Bytes]:
    """Bytes `start` to `end` of a file, in pieces as large as the buffer, which holds one."""
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            block = buffer[: end - start]
            filled = 0
            while filled < len(block):
                count = file.readinto(block.data[filled:])
                if not count:
                    raise EOFError(f"{path} ends at byte {start + filled:,}, not at {end:,}")
                filled += count
            yield block
            start += len(block)


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are equal to the bit, in type and shape too."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    # Almost all pairs differ at once.
    return all(_same_start(a, b, min(a.nbytes, size)) for size in (_FIRST_LOOK, a.nbytes))


def _same_start(a: StoredTensor, b: StoredTensor, size: int) -> bool:
    left, right = (
        file_blocks(tensor.path, tensor.start, tensor.start + size, block_buffer(size))
        for tensor in (a, b)
    )
    return all(np.array_equal(x, y) for x, y in zip(left, right, strict=True))


def block_buffer(size: int = BLOCK) -> Bytes:
    """A buffer for blocks, no larger than what is to be read."""
    return np.empty(min(size, BLOCK), dtype=np.uint8)
