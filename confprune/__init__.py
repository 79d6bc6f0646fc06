"""Magnitude pruning with a finite-sample guarantee."""

__version__ = "0.1.0"
