"""The grid forward: a network's losses at every level of a grid, in one pass over the data."""

from confprune.grid.forward import GridForward
from confprune.grid.network import evaluation_mode

__all__ = ["GridForward", "evaluation_mode"]
