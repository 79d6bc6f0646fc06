"""Write files whole or not at all: a crash leaves the old ones."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside `path` that takes its place once the block has ended well.

    The temporary name keeps the extension, which some writers read the format from. After an
    exception (Ctrl-C included) it is removed and `path` is as it was.

    Parameters
    ----------
    path : path
        The file to write. A link is followed: its target is what changes.

    Yields
    ------
    pathlib.Path
        Where to write, in the folder of `path`.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    IsADirectoryError
        If `path` is a folder.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     target = Path(folder) / "greeting.txt"
    ...     with written_whole(target) as temporary:
    ...         _ = temporary.write_text("hello")
    ...     target.read_text()
    'hello'
    """
    target = real_target(path)
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {os.fspath(path)}: it is a folder; name a file")
    temporary = temporary_name(target)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors puts a file of its own there, which only its owner may read.
        temporary.chmod(mode)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class Draft:
    """A file without a name until it is whole: not even a killed process leaves a part behind.

    Where the system has no such files (they need Linux, and a local disk), it has a temporary
    name, which only a killed process leaves behind.

    Parameters
    ----------
    folder : path
        Where it will be placed.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Draft(folder) as draft:
    ...     draft.write(b"hello", 0)
    ...     draft.place(Path(folder) / "greeting.txt")
    ...     (Path(folder) / "greeting.txt").read_text()
    'hello'
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._name: Path | None = None
        descriptor = _unnamed(folder)
        if descriptor is None:
            self._name = Path(folder) / f".{secrets.token_hex(8)}.part"
            descriptor = os.open(self._name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self._descriptor = descriptor

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at a place of the file."""
        rest = memoryview(data).cast("B")
        while rest:
            count = os.pwrite(self._descriptor, rest[:_WRITE], offset)
            rest, offset = rest[count:], offset + count

    def place(self, path: Path) -> None:
        """Give it its name, in place of any old file of that name, on the disk of its folder.

        What takes the place of an old file is on the disk before.
        """
        if self._name is not None or path.exists():
            os.fsync(self._descriptor)
        if self._name is not None:
            os.replace(self._name, path)
            return
        temporary = temporary_name(path)
        descriptors = os.open(_DESCRIPTORS, os.O_RDONLY)
        try:
            # Only with the descriptor of a folder does Python follow the link.
            os.link(str(self._descriptor), temporary, src_dir_fd=descriptors, follow_symlinks=True)
            os.replace(temporary, path)
        finally:
            os.close(descriptors)
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)
        if self._name is not None:
            self._name.unlink(missing_ok=True)


_WRITE = 1 << 18  # bytes at a time: ext4 takes three times as long for a million
_DESCRIPTORS = "/proc/self/fd"


def _unnamed(folder: str | os.PathLike[str]) -> int | None:
    """A descriptor of a new file without a name; None where there is no such thing."""
    if not os.path.isdir(_DESCRIPTORS):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):
        return None


def real_target(path: str | os.PathLike[str]) -> Path:
    """What a path to be written stands for, links followed.

    Raises
    ------
    FileNotFoundError
        If its folder does not exist.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {os.fspath(path)}: {target.parent} is not a folder")
    return target


def temporary_name(target: Path) -> Path:
    """A hidden name beside the target, with its extension."""
    return target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
