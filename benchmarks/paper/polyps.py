"""Polyp-like images with exact masks: what stands in for endoscopy where there are no files."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

CENTRES = {
    # Light and colour of the wall, how far a body stands out from it, and the noise of the camera.
    "A": ((0.78, 0.42, 0.36), 0.22, 0.03),
    "B": ((0.70, 0.46, 0.34), 0.16, 0.05),
    "C": ((0.82, 0.50, 0.44), 0.11, 0.07),
}
"""Three centres, from easy to hard."""


def generate(
    number: int, size: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[str]]:
    """Images of a textured wall with blurred elliptical bodies, their masks, and their centres.

    Parameters
    ----------
    number, size : int
        How many square images of how many pixels along a side.
    seed : int

    Returns
    -------
    images : [number, size, size, 3] uint8
    masks : [number, size, size] bool
    centres : list of str

    Examples
    --------
    >>> images, masks, centres = generate(3, 32, seed=0)
    >>> images.shape, masks.shape, centres
    ((3, 32, 32, 3), (3, 32, 32), ['A', 'B', 'C'])
    """
    rng = np.random.default_rng(seed)
    images = np.empty((number, size, size, 3), dtype=np.uint8)
    masks = np.empty((number, size, size), dtype=np.bool_)
    centres = [list(CENTRES)[index % len(CENTRES)] for index in range(number)]
    for index, centre in enumerate(centres):
        image, masks[index] = _scene(rng, size, centre)
        images[index] = np.round(255 * image.clip(0, 1))
    return images, masks, centres


def _scene(
    rng: np.random.Generator, size: int, centre: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    colour, contrast, noise = CENTRES[centre]
    image = np.asarray(colour) * _wall(rng, size)[..., None]
    mask = np.zeros((size, size), dtype=np.bool_)
    for _ in range(1 + (rng.random() < 0.2)):
        body, shape = _body(rng, size)
        tint = contrast * np.array([1.0, -0.3, -0.5]) * rng.choice([1.0, 1.0, -0.8])
        image += body[..., None] * (tint + contrast / 2 * _texture(rng, size, 1.5)[..., None])
        mask |= shape
    for _ in range(rng.poisson(2)):  # reflections of the lamp
        y, x = rng.integers(0, size, 2)
        spot = np.zeros((size, size))
        spot[y, x] = 1
        image += (gaussian_filter(spot, 0.7) * 2)[..., None]
    return image + noise * rng.standard_normal(image.shape), mask


def _wall(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Brightness of the wall: folds, veins, and a lamp that does not reach the corners."""
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    lamp = 1 - 0.7 * ((x - rng.uniform(-0.2, 0.2)) ** 2 + (y - rng.uniform(-0.2, 0.2)) ** 2)
    angle, waves = rng.uniform(0, np.pi), rng.uniform(2, 5)
    along = x * np.cos(angle) + y * np.sin(angle)
    folds = 0.06 * np.sin(2 * np.pi * waves * along + rng.uniform(0, 2 * np.pi))
    return lamp + folds + 0.1 * _texture(rng, size, size / 16) + 0.04 * _texture(rng, size, 1)


def _body(rng: np.random.Generator, size: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """How much of each pixel is an ellipse with a blurred edge, and the exact ellipse."""
    y, x = np.mgrid[0:size, 0:size] / size
    v, u = rng.uniform(0.2, 0.8, 2)
    a, b = rng.uniform(0.08, 0.24, 2)
    angle = rng.uniform(0, np.pi)
    along = (x - u) * np.cos(angle) + (y - v) * np.sin(angle)
    across = -(x - u) * np.sin(angle) + (y - v) * np.cos(angle)
    inside = (along / a) ** 2 + (across / b) ** 2 <= 1
    return gaussian_filter(inside.astype(np.float64), size / 64), inside


def _texture(rng: np.random.Generator, size: int, grain: float) -> NDArray[np.float64]:
    """Smooth noise of standard deviation 1."""
    noise = gaussian_filter(rng.standard_normal((size, size)), grain, mode="wrap")
    return noise / noise.std()
