"""Checkpoints in safetensors files: prune them without their network, and without loading them."""

from confprune.checkpoint.choice import Choice, choose
from confprune.checkpoint.layout import read_layout
from confprune.checkpoint.pruning import Pruned, prune
from confprune.checkpoint.saving import save

__all__ = ["Choice", "Pruned", "choose", "prune", "read_layout", "save"]
