"""The grid forward: a network's losses at every level of a grid, in one pass over the data."""

from confprune.grid.forward import ACTIVATION_BYTES, GridForward, evaluation_mode

__all__ = ["ACTIVATION_BYTES", "GridForward", "evaluation_mode"]
