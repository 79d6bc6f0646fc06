"""The values that options of the command line take, from their text."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from confprune.devices import usable_device


def to_probability(text: str) -> float:
    """A number strictly between 0 and 1."""
    return _number(text, lambda value: 0 < value < 1, "a number between 0 and 1")


def to_sparsity(text: str) -> float:
    """A number from 0 to below 1."""
    return _number(text, lambda value: 0 <= value < 1, "a sparsity: 0 or more, and below 1")


def to_count(text: str) -> int:
    """A positive integer."""
    value = _number(text, lambda value: value >= 1 and value == int(value), "a positive integer")
    return int(value)


def _number(text: str, valid: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
        if valid(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")


def to_grid(text: str) -> list[float]:
    """Sparsities from "START:STOP:COUNT" or "0.5,0.6,0.7"; the library judges their order."""
    if ":" not in text:
        return [to_sparsity(part) for part in text.split(",")]
    parts = text.split(":")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"must read START:STOP:COUNT, got {text!r}")
    grid = np.linspace(to_sparsity(parts[0]), to_sparsity(parts[1]), to_count(parts[2]))
    return [float(sparsity) for sparsity in grid]


def to_curve(text: str) -> list[tuple[float, float]]:
    """Points (sparsity, risk) from "0:0.001,0.9:0.2"."""
    points = []
    for part in text.split(","):
        sparsity, colon, risk = part.partition(":")
        if not colon:
            raise argparse.ArgumentTypeError(f"must read SPARSITY:RISK,..., got {part!r}")
        risk_value = _number(risk, lambda value: 0 <= value <= 1, "a risk from 0 to 1")
        points.append((to_sparsity(sparsity), risk_value))
    return points


def to_risk(text: str) -> tuple[str, float]:
    """A loss and its alpha from "harm=0.01"."""
    loss, equals, alpha = text.rpartition("=")
    if not (loss and equals):
        raise argparse.ArgumentTypeError(f"must read LOSS=ALPHA, such as harm=0.01, got {text!r}")
    return loss, to_probability(alpha)


def to_device(text: str) -> torch.device:
    """A device that can be used here."""
    try:
        return usable_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
