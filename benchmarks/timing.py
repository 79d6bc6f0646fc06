"""Times of things done in turn, so that a drift of the machine meets all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

FEWEST = 3
"""Repetitions of everything, however long it takes."""

LONG = 5.0
"""Seconds after which a first call counts: what it warms up is a small part of it."""


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Attributes
    ----------
    run : callable
        What is timed; it takes what `prepare` returns, if there is one.
    prepare : callable, optional
        Done before each call and not timed, such as a copy of what `run` changes in place.
    """

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None

    def seconds(self) -> float:
        """Run once."""
        prepared = () if self.prepare is None else (self.prepare(),)
        start = time.perf_counter()
        self.run(*prepared)
        return time.perf_counter() - start


def interleaved(
    contenders: Mapping[str, Contender], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Time every contender several times, all in turn: A B C A B C ...

    After one call each to warm up, the slow ones sit out some of the rounds, evenly spread, so that
    none takes much more than its share of the time.

    Parameters
    ----------
    contenders : mapping from name to Contender
    rounds : int
        Most repetitions of a contender.
    seconds : float
        What a contender may take in all; it runs `FEWEST` times nevertheless.

    Returns
    -------
    dict from name to the seconds of each repetition
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    shares = {}
    with no_collection():
        for name, contender in contenders.items():
            first = contender.seconds()
            if first >= LONG:
                times[name].append(first)
            wanted = min(rounds, max(FEWEST, int(seconds / max(first, 1e-9))))
            shares[name] = wanted - len(times[name])
        for turn in range(rounds):
            gc.collect()
            for name, contender in contenders.items():
                if (turn + 1) * shares[name] // rounds > turn * shares[name] // rounds:
                    times[name].append(contender.seconds())
    return times


def spread(times: Sequence[float], scale: float = 1.0) -> dict[str, float | int]:
    """Median, quartiles and range of some times, each multiplied by `scale`."""
    low, lower, median, upper, high = (scale * np.percentile(times, [0, 25, 50, 75, 100])).tolist()
    return {
        "median": round_digits(median),
        "min": round_digits(low),
        "lower_quartile": round_digits(lower),
        "upper_quartile": round_digits(upper),
        "max": round_digits(high),
        "repetitions": len(times),
    }


def round_digits(value: float, digits: int = 5) -> float:
    """A number with so many significant digits: the others are noise."""
    return float(f"{value:.{digits}g}")


def duration(seconds: float) -> str:
    """A time as people write it, with three significant digits."""
    if seconds >= 120:
        return f"{_short(seconds / 60)} min"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_short(seconds / size)} {unit}"
    return f"{_short(seconds / 1e-6)} µs"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection but by name, and then of what has been made since."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
