"""Times on a GPU: between two events of its own, with the launches queued up beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.timing import no_collection

_FLUSH_BYTES = 256 << 20
"""Written between measurements: more than any cache of a GPU holds."""

_HOLD = 4_000_000
"""Cycles that the device waits while the host queues up what is timed: a few milliseconds."""


def device_seconds(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int
) -> dict[str, list[float]]:
    """Seconds that the device takes for each, all in turn, with cold caches.

    The time of the host shows only where it takes longer than the few milliseconds that the device
    is held up before.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():  # what is loaded or chosen at a first call
        run()
    with no_collection():
        for _ in range(rounds):
            for name, run in contenders.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                torch.cuda._sleep(_HOLD)
                start.record()
                run()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end) / 1e3)
    return times


def wall_seconds(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int
) -> dict[str, list[float]]:
    """Seconds until each is done, host and device, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    with no_collection():
        for _ in range(rounds):
            for name, run in contenders.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                run()
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    return times


def extra_bytes(run: Callable[[], Any]) -> int:
    """The peak of what a call allocates, its result included."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
