"""Pruned checkpoints on their way to the disk: all of their files appear at once, or none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from confprune.checkpoint.metadata import recorded
from confprune.checkpoint.source import Checkpoint
from confprune.checkpoint.weights import Bits
from confprune.files import Draft, real_target, temporary_name

_PLACEHOLDER = "{sparsity}"


def output_paths(
    out: str | os.PathLike[str], sparsities: Sequence[float], checkpoint: Checkpoint
) -> list[Path]:
    """Where the pruned checkpoint of each sparsity goes.

    Raises
    ------
    ValueError
        If several would go to one place, or a folder into its own source, or a file is named where
        a folder is to be written, or the other way round.
    FileExistsError
        If a folder is there already and holds something, or a file that is no checkpoint.
    FileNotFoundError
        If a path leads through a folder that does not exist.
    """
    pattern = os.fspath(out)
    if len(sparsities) > 1 and _PLACEHOLDER not in pattern:
        raise ValueError(
            f"out {pattern} is one place for {len(sparsities)} sparsities: write {_PLACEHOLDER} "
            f"where it is to be named, as in pruned-{_PLACEHOLDER}"
        )
    paths = [Path(pattern.replace(_PLACEHOLDER, repr(sparsity))) for sparsity in sparsities]
    for path in paths:
        target = real_target(path)
        if checkpoint.folder is None:
            if target.is_dir():
                raise ValueError(f"out {path} is a folder: name the file to write")
            if target.exists() and target.suffix != ".safetensors":
                raise FileExistsError(f"out {path} is there already and no .safetensors file")
            continue
        if target.is_file() or target.suffix == ".safetensors":
            raise ValueError(f"out {path} must be a folder: {checkpoint.source} has several files")
        if target.is_dir() and any(target.iterdir()):
            raise FileExistsError(f"out {path} is not empty: remove it, or name another folder")
        if Path(os.path.realpath(checkpoint.folder)) in (target, *target.parents):
            raise ValueError(f"out {path} lies within {checkpoint.folder}: name a folder outside")
    return paths


class Output:
    """One pruned checkpoint, whose files have no names until it is complete.

    Parameters
    ----------
    checkpoint : Checkpoint
        What is pruned.
    path : pathlib.Path
        Where it goes: the file, or the folder.
    record : mapping of str to str
        Goes into the metadata of its files.
    stack : ExitStack
        Closes the files.
    """

    def __init__(
        self, checkpoint: Checkpoint, path: Path, record: Mapping[str, str], stack: ExitStack
    ) -> None:
        self._checkpoint = checkpoint
        self._target = real_target(path)
        self._heads = {
            layout.path: (layout.head(recorded(layout.metadata, record)), layout.data_start)
            for layout in checkpoint.layouts
        }
        files = [*self._heads, *checkpoint.rest]
        self._drafts = {file: stack.enter_context(Draft(self._target.parent)) for file in files}
        with self._named_errors():
            for file, (head, _) in self._heads.items():
                self._drafts[file].write(head, 0)

    def write(self, file: Path, offset: int, data: memoryview) -> None:
        """Write what takes the place of bytes of a file of the source."""
        if file in self._heads:
            head, data_start = self._heads[file]
            offset += len(head) - data_start
        with self._named_errors():
            self._drafts[file].write(data, offset)

    def write_pieces(self, file: Path, offsets: Iterable[int], pieces: Bits) -> None:
        """As `write`, of elements of an array, each at its own place."""
        head, data_start = self._heads[file]
        draft, shift = self._drafts[file], len(head) - data_start
        data, size = pieces.view(np.uint8).data, pieces.itemsize
        with self._named_errors():
            for at, offset in enumerate(offsets):
                draft.write(data[at * size : (at + 1) * size], offset + shift)

    def place(self) -> None:
        """Give it its name, at once."""
        folder = self._checkpoint.folder
        if folder is None:
            (draft,) = self._drafts.values()
            with self._named_errors():
                draft.place(self._target)
            return
        temporary = temporary_name(self._target)
        temporary.mkdir()
        try:
            for file, draft in self._drafts.items():
                path = temporary / file.relative_to(folder)
                path.parent.mkdir(parents=True, exist_ok=True)
                draft.place(path)
            os.rename(temporary, self._target)
        except BaseException:
            shutil.rmtree(temporary)
            raise

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name the output: what is written to has no name yet."""
        try:
            yield
        except OSError as error:
            message = f"cannot write {self._target}: {error.strerror or error}"
            raise OSError(error.errno, message) from error


def check_space(checkpoint: Checkpoint, paths: Sequence[Path]) -> None:
    """Raise OSError if the disk is too full for all of them: better now than at the end."""
    needed = len(paths) * checkpoint.nbytes
    folder = real_target(paths[0]).parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed:,} bytes are needed in {folder}, where {free:,} are free",
        )
