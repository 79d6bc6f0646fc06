"""Running the jobs of a benchmark in several processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def run_jobs(
    function: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[int, Outcome]]:
    """Yield ``(index of the job, outcome)`` as the jobs finish; progress goes to stderr."""
    start = time.perf_counter()
    # Each worker is one process with one thread; more would only fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(workers) as pool:
        pending = {pool.submit(function, job): index for index, job in enumerate(jobs)}
        for done, future in enumerate(as_completed(pending), start=1):
            yield pending[future], future.result()
            seconds = time.perf_counter() - start
            print(f"\r{done}/{len(jobs)} jobs, {seconds:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
