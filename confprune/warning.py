"""Warnings that point to the line of the caller's code, not to one of ours or torch's."""

from __future__ import annotations

import sys
import warnings

_OURS = ("confprune", "torch", "contextlib")


def warn(message: str) -> None:
    """Warn with a UserWarning, in the name of the nearest line outside."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _OURS
