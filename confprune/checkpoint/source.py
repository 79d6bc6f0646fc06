"""A checkpoint on disk: one safetensors file, several with an index, or the folder around them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from confprune.checkpoint.layout import COMPRESSED, Layout, StoredTensor, read_layout

_INDEX = ".safetensors.index.json"
_FILE = ".safetensors"
# What else may hold weights: copied, but a loader that prefers it would run the dense network.
_OTHER_WEIGHTS = (_FILE, ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read.

    Attributes
    ----------
    source : pathlib.Path
        The file, index or folder that was named.
    layouts : tuple of Layout
        The files with its tensors, by name.
    tensors : tuple of StoredTensor
        The tensors, file by file, in the order in which they lie there. It is the order by which
        ties are broken.
    folder : pathlib.Path or None
        What the paths of its files start with; None for a single file.
    rest : tuple of pathlib.Path
        The files that belong to it and hold none of its tensors.
    """

    source: Path
    layouts: tuple[Layout, ...]
    tensors: tuple[StoredTensor, ...]
    folder: Path | None = None
    rest: tuple[Path, ...] = ()

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all its files."""
        return {key: value for layout in self.layouts for key, value in layout.metadata.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        files = [*(layout.path for layout in self.layouts), *self.rest]
        return sum(file.stat().st_size for file in files)

    @property
    def unpruned_weights(self) -> list[str]:
        """Files of the rest that seem to hold weights too."""
        return [path.name for path in self.rest if path.suffix.lower() in _OTHER_WEIGHTS]


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint.

    Parameters
    ----------
    source : path
        A ``.safetensors`` file; the ``.safetensors.index.json`` of several; or a folder that holds
        either, as Hugging Face's ``save_pretrained`` writes it. Of a folder all other files belong
        to the checkpoint, those of visible subfolders included.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or one that the index names is missing.
    ValueError
        If a file is not a whole safetensors file, or holds a compressed network, the index does not
        fit the files, or it is not clear which files of the folder are meant.
    """
    source = Path(source)
    if source.is_dir():
        return _in_folder(source)
    if source.name.endswith(_INDEX):
        return _indexed(source)
    layout = read_layout(source)
    if COMPRESSED in layout.metadata:
        raise ValueError(
            f"{source} holds a compressed network, of confprune.sparse.save_sparse: name the "
            "checkpoint with its dense weights"
        )
    return Checkpoint(source, (layout,), layout.tensors)


def _in_folder(folder: Path) -> Checkpoint:
    main = _main_file(folder)
    checkpoint = open_checkpoint(main)
    held = {layout.path for layout in checkpoint.layouts}
    rest = tuple(path for path in _visible_files(folder) if path not in held)
    return Checkpoint(folder, checkpoint.layouts, checkpoint.tensors, folder, rest)


def _main_file(folder: Path) -> Path:
    """The index or the single file that a loader of this folder would take."""
    for name in (f"model{_INDEX}", f"model{_FILE}"):
        if (folder / name).is_file():
            return folder / name
    indices = sorted(folder.glob(f"*{_INDEX}"))
    found = indices or sorted(folder.glob(f"*{_FILE}"))
    if not found:
        raise ValueError(
            f"{folder} holds no safetensors file: save the network in that format first "
            "(save_pretrained does)"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds several checkpoints: name one of {names}")
    return found[0]


def _visible_files(folder: Path) -> list[Path]:
    """All files but those in hidden folders, which are about the download (.git, .cache)."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place) / name for name in sorted(names)]
    return files


def _indexed(index: Path) -> Checkpoint:
    if not index.is_file():
        raise FileNotFoundError(f"there is no file {index}")
    places = _weight_map(index)
    layouts = []
    for name in sorted(set(places.values())):
        path = index.parent / name
        if not path.is_file():
            lost = next(tensor for tensor, place in places.items() if place == name)
            raise FileNotFoundError(
                f"{index} looks for tensor {lost!r} in {name}, which is missing"
            )
        layouts.append(read_layout(path))
    # A tensor in a file that the index does not look for there is not part of the network.
    tensors = tuple(
        tensor
        for layout in layouts
        for tensor in layout.tensors
        if places.get(tensor.name) == layout.path.name
    )
    lost_names = places.keys() - {tensor.name for tensor in tensors}
    if lost_names:
        name = min(lost_names)
        raise ValueError(f"{index} looks for tensor {name!r} in {places[name]}, which lacks it")
    return Checkpoint(index, tuple(layouts), tensors, index.parent, (index,))


def _weight_map(index: Path) -> Mapping[str, str]:
    """The file of each tensor, as the index has it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not places or any(Path(place).name != place for place in places.values()):
            raise ValueError("weight_map must name files beside it")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error}") from error
    return dict(places)
