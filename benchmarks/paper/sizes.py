"""How large the experiments are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Numbers of one kind of data.

    Attributes
    ----------
    training, pool : int
        Most images to train on, and to draw calibration and test sets from.
    scoring : int
        Images that scores are made from, in neither of these.
    epochs : int
    levels : int
        K, of each grid.
    """

    training: int
    pool: int
    scoring: int
    epochs: int
    levels: int


@dataclass(frozen=True)
class Sizes:
    """Numbers of everything that costs time.

    Attributes
    ----------
    classification, segmentation : Part
    pixels : int
        Side of the images for segmentation, a multiple of 8.
    splits : int
        Random splits into calibration and test set.
    curve_splits : int
        The same for each point of the curves against n, delta and alpha.
    """

    classification: Part
    segmentation: Part
    pixels: int
    splits: int
    curve_splits: int


DEFAULT = Sizes(
    classification=Part(training=20_000, pool=3000, scoring=128, epochs=6, levels=50),
    segmentation=Part(training=400, pool=500, scoring=64, epochs=25, levels=40),
    pixels=64,
    splits=200,
    curve_splits=100,
)
QUICK = Sizes(
    classification=Part(training=3000, pool=800, scoring=64, epochs=2, levels=25),
    segmentation=Part(training=120, pool=160, scoring=32, epochs=10, levels=20),
    pixels=32,
    splits=100,
    curve_splits=40,
)
