"""Processes of one gloo group, which run functions of the tests together."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

SECONDS = 120  # much more than anything here takes


class Processes:
    """A group of `size` processes; `run` returns what the function returned, or raised, on each."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(size)]
        self._ends = [ours for ours, _ in ends]
        self._processes = [
            context.Process(target=_work, args=(rank, size, str(folder / "store"), theirs))
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process, (_, theirs) in zip(self._processes, ends, strict=True):
            process.start()
            theirs.close()  # so that its end is noticed

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Each rank's outcome: what the function returns, "Type: message", or None if it died."""
        for end in self._ends:
            end.send((function, args))
        return [self._outcome(end) for end in self._ends]

    def _outcome(self, end: Any) -> Any:
        assert end.poll(SECONDS), "a rank hangs"
        try:
            good, value = end.recv()
        except EOFError:
            return None
        assert good or not value.startswith("AssertionError"), value
        return value if good else value.splitlines()[-1]

    def stop(self) -> None:
        for end in self._ends:
            with suppress(BrokenPipeError):
                end.send(None)
        for process in self._processes:
            process.join(SECONDS)
            process.kill()


def _work(rank: int, size: int, store: str, end: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS),
    )
    while (task := end.recv()) is not None:
        function, args = task
        try:
            end.send((True, function(rank, *args)))
        except AssertionError:
            end.send((False, "AssertionError: " + traceback.format_exc()))
        except Exception as error:
            end.send((False, f"{type(error).__name__}: {error}"))
    dist.destroy_process_group()
