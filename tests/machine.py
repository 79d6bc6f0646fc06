"""What a test may ask of the machine: a number of threads, or fewer instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from confprune import ops

INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]
"""Each has all of those before it."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_on(instruction_set: str, tests: str) -> None:
    """Run some tests in a process of their own that computes with this instruction set."""
    if INSTRUCTION_SETS.index(instruction_set) > INSTRUCTION_SETS.index(ops.instruction_set()):
        pytest.skip(f"this machine runs {ops.instruction_set()} at most")
    script = (
        "import sys, pytest\n"
        "from confprune import ops\n"
        f"assert ops.instruction_set() == {instruction_set!r}, ops.instruction_set()\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {tests!r}]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"CONFPRUNE_ISA": instruction_set, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout
