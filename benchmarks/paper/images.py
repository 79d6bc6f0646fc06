"""A folder of images and masks, of mixed sizes and from several centres.

Masks lie beside the images, in ``masks/`` beside ``images/`` (or ``masks_C1/`` beside
``images_C1/``, as PolypGen has it), under the same name or that with ``_mask``. Subfolders below or
above the two are centres.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg")


class Pair(NamedTuple):
    """An image, its mask, and where it is from."""

    image: Path
    mask: Path
    centre: str


def find_pairs(folder: Path) -> list[Pair]:
    """All images below a folder with their masks; none where there is no folder of images.

    Raises
    ------
    ValueError
        If a folder of images has no folder of masks or is empty, or an image or a mask is alone,
        naming it.
    """
    pairs: list[Pair] = []
    for images in _image_folders(folder):
        masks = images.with_name("masks" + images.name.removeprefix("images"))
        if not masks.is_dir():
            raise ValueError(f"{images} has no masks: there is no folder {masks}")
        found = dict(_files(images))
        if not found:
            raise ValueError(f"{images} is empty: it holds no {', '.join(SUFFIXES)} files")
        drawn = {key.removesuffix("_mask"): path for key, path in _files(masks)}
        for key, image in found.items():
            if key not in drawn:
                raise ValueError(f"{image} has no mask in {masks}")
            parts = [p for p in (images.parent.relative_to(folder), Path(key).parent) if p.parts]
            pairs.append(Pair(image, drawn[key], "/".join(map(str, parts)) or "all"))
        for key, mask in drawn.items():
            if key not in found:
                raise ValueError(f"{mask} has no image in {images}")
    return pairs


def read_pairs(
    pairs: list[Pair], size: int, *, progress: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Images [n, size, size, 3] and masks [n, size, size], scaled to one size.

    Raises
    ------
    ValueError
        If a file cannot be read as an image, or a mask has another size than its image, naming it.
    """
    images = np.empty((len(pairs), size, size, 3), dtype=np.uint8)
    masks = np.empty((len(pairs), size, size), dtype=np.bool_)
    for index, pair in enumerate(tqdm(pairs, "images", disable=not progress)):
        image, mask = _read(pair.image, "RGB"), _read(pair.mask, "L")
        if image.size != mask.size:
            raise ValueError(
                f"{pair.mask} is {mask.width}x{mask.height} pixels, but its image {pair.image} is "
                f"{image.width}x{image.height}"
            )
        images[index] = np.asarray(image.resize((size, size)))
        # First which pixels belong to the object, then the scaling: a mask has no shades.
        limit = 0 if mask.getextrema()[1] == 1 else 127  # some write 1 for the object
        drawn = mask.point([255 * (value > limit) for value in range(256)])
        masks[index] = np.asarray(drawn.resize((size, size))) > 127
    return images, masks


def _image_folders(folder: Path) -> Iterator[Path]:
    """The folders of images, those within others left to them."""
    for path in sorted(folder.rglob("images*")):
        named = path.name == "images" or path.name.startswith("images_")
        above = [p.name for p in path.relative_to(folder).parents]
        if named and path.is_dir() and not any(name.startswith("images") for name in above):
            yield path


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The image files below a folder, by their relative path without the suffix."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            yield path.relative_to(folder).with_suffix("").as_posix(), path


def _read(path: Path, mode: str) -> Image:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("images are read with Pillow: pip install pillow") from error
    try:
        with Image.open(path) as file:
            return file.convert(mode)  # reads all of it, so that truncation shows here
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is corrupt or not an image: {error}") from error
