"""The grid forward: a network's losses at every level of a grid, in one pass over the data."""

from confprune.grid.forward import GridForward

__all__ = ["GridForward"]
