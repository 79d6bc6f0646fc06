"""How much memory something takes beyond the model: the peak of a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.pruners import layer_of
from confprune import prune_levels
from confprune.selection import select

_STATUS = Path("/proc/self/status")

ACTIONS: dict[str, Callable[[Tensor, list[float]], object]] = {
    "thresholds": lambda weights, grid: select(
        {"weight": weights}, [round(s * weights.numel()) for s in grid]
    ),
    "prune levels": lambda weights, grid: prune_levels(layer_of(weights), grid),
}


def measurable() -> bool:
    """Whether the system tells a process's peak; Linux does."""
    return _STATUS.exists()


def peak_bytes(action: str, weights: int, levels: int) -> int:
    """Bytes an action takes beyond a model of so many float32 weights, result included.

    A new process makes the model, notes what it occupies (VmRSS), does the thing once and takes the
    largest it ever occupied (VmHWM) less that. What is loaded on first use counts too.
    """
    command = [sys.executable, "-m", __name__, action, str(weights), str(levels)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{action} of {weights} weights failed:\n{done.stderr}")
    return int(done.stdout)


def _occupied(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert found
    return 1024 * int(found[1])


def _main(action: str, count: int, levels: int) -> None:
    grid = [j / levels for j in range(levels)]
    # In place, so that the model itself is the largest thing so far.
    weights = torch.empty(count).normal_()
    before = _occupied("VmRSS")
    result = ACTIONS[action](weights, grid)
    print(_occupied("VmHWM") - before)
    del result


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
