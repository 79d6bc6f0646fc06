"""The data of the experiments: the user's files, or what stands in for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.paper.idx import find_mnist, read_labelled
from benchmarks.paper.images import find_pairs, read_pairs
from benchmarks.paper.polyps import generate
from benchmarks.paper.sizes import Part, Sizes


@dataclass(frozen=True)
class Examples:
    """Inputs [n, channels, height, width], their labels or masks, and their groups."""

    inputs: Tensor
    targets: Tensor
    groups: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: Tensor | slice) -> Examples:
        positions = torch.arange(len(self))[index]
        return Examples(self.inputs[index], self.targets[index], self.groups[positions.numpy()])


@dataclass(frozen=True)
class Source:
    """One set of data in three parts that have no image in common.

    Attributes
    ----------
    name : str
        As it is called in tables and figures; a stand-in says so there.
    stand_in : bool
    training, scoring, pool : Examples
        To train on; to make scores from; to draw calibration and test sets from.
    """

    name: str
    stand_in: bool
    training: Examples
    scoring: Examples
    pool: Examples


def classification(folder: Path | None, sizes: Sizes, seed: int) -> Source:
    """MNIST from IDX files below a folder; without, scikit-learn's digits."""
    part = sizes.classification
    files = None if folder is None else find_mnist(folder)
    if files is None:
        every = _shuffled(_digits(), seed)
        return _source("digits (stand-in)", True, *_parted(every, len(every) // 3), part)
    training, others = (
        _shuffled(_labelled(*read_labelled(files[f"{n}-images"], files[f"{n}-labels"])), seed)
        for n in ("train", "t10k")
    )
    return _source("MNIST", False, training.take(slice(part.training)), others, part)


def segmentation(folder: Path | None, sizes: Sizes, seed: int, *, progress: bool = True) -> Source:
    """Images and masks below a folder; without, generated ones."""
    part = sizes.segmentation
    pairs = [] if folder is None else find_pairs(folder)
    if pairs:
        images, masks = read_pairs(pairs, sizes.pixels, progress=progress)
        centres: Sequence[str] = [pair.centre for pair in pairs]
        name = f"images in {Path(folder or '.').resolve().name}"
    else:
        wanted = part.training + part.scoring + part.pool
        images, masks, centres = generate(wanted, sizes.pixels, seed)
        name = "generated polyps (stand-in)"
    every = _shuffled(
        Examples(
            torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255),
            torch.from_numpy(masks).long().unsqueeze(1),
            np.array(centres, dtype=np.str_),
        ),
        seed,
    )
    # Of a small set two fifths train, of a large one as many as are wanted.
    training = min(part.training, 2 * len(every) // 5) if pairs else part.training
    return _source(name, not pairs, *_parted(every, training), part)


def _source(name: str, stand_in: bool, training: Examples, others: Examples, part: Part) -> Source:
    scoring = min(part.scoring, len(others) // 5)
    return Source(
        name,
        stand_in,
        training,
        others.take(slice(scoring)),
        others.take(slice(scoring, scoring + part.pool)),
    )


def _parted(examples: Examples, size: int) -> tuple[Examples, Examples]:
    return examples.take(slice(size)), examples.take(slice(size, None))


def _digits() -> Examples:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _labelled(np.round(digits.images * 255 / 16).astype(np.uint8), digits.target)


def _labelled(images: NDArray[np.uint8], labels: NDArray[np.integer]) -> Examples:
    return Examples(
        torch.from_numpy(images.copy()).float().div(255).unsqueeze(1),
        torch.from_numpy(labels.astype(np.int64)),
        labels.astype(np.str_),
    )


def _shuffled(examples: Examples, seed: int) -> Examples:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return examples.take(order)
