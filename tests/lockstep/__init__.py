"""The kernels of csrc/cuda as plain C++, run in lockstep on the CPU and called by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_CSRC = _HERE.parent.parent / "csrc"
FLAGS = "CONFPRUNE_LOCKSTEP_FLAGS"
"""Further flags for the compiler, of a process that runs some tests once more."""

_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def build(sources: Iterable[Path], target: Path, *flags: str) -> Path:
    """Compile sources for the stand-in, to a program, or to a library if that is what flags say."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-I{_CSRC}", f"-I{_HERE}"]
    objects = []
    steps = []
    for source in sources:
        objects.append(str(target.with_name(f"{source.stem}.o")))
        command = [*compiler, *_FLAGS, *flags, *includes, "-x", "c++", "-c", str(source)]
        steps.append(subprocess.Popen([*command, "-o", objects[-1]], stderr=subprocess.PIPE))
    for step in steps:
        assert step.wait() == 0, step.communicate()[1].decode()
    subprocess.run([*compiler, *flags, *objects, "-o", str(target)], check=True)
    return target


@cache
def library(*flags: str) -> ctypes.CDLL:
    """Load all kernels, with what the tests call.

    The library is kept under build/ for as long as no source changes.
    """
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted([*_CSRC.rglob("*.h"), *_CSRC.glob("cuda/*.cu"), *_HERE.glob("*.*")]):
        digest.update(path.read_bytes())
    target = _HERE.parent.parent / "build" / "lockstep" / digest.hexdigest()[:16] / "lockstep.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = sorted([*_CSRC.glob("cuda/*.cu"), *_HERE.glob("exports*.cpp")])
        build(sources, target, "-shared", *flags)
    return ctypes.CDLL(str(target))


def kernels(
    multiprocessors: int = 3, shared_bytes: int = 99 << 10, resident: int = 2, seed: int = 0
) -> ctypes.CDLL:
    """The library, for a device with so many multiprocessors and so much shared memory a block.

    So many blocks of it are at work at once, and take turns in an order drawn from `seed`.
    """
    found = library(*os.environ.get(FLAGS, "").split())
    found.configure(multiprocessors, shared_bytes, resident, seed)
    return found


_SANITIZERS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"},
}


def sanitizer_runtime(sanitizer: str) -> str:
    """The library of a sanitizer; skips the test where the compiler has none."""
    name = f"lib{sanitizer[0]}san.so"
    path = _library_of_the_compiler(name)
    if not os.path.isabs(path):
        pytest.skip(f"the compiler has no {name}")
    return path


def _library_of_the_compiler(name: str) -> str:
    """Where it is; the name itself if the compiler has none of it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    return subprocess.run(
        [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def check_sanitized(file: str, tests: str, sanitizer: str) -> None:
    """Run the tests of a file that match an expression (`pytest -k`) under a sanitizer.

    "address" finds accesses outside of memory, "thread" those that nothing orders.
    """
    # A sanitizer stops at exceptions that torch throws, unless it finds their library at the start.
    preload = f"{sanitizer_runtime(sanitizer)} {_library_of_the_compiler('libstdc++.so.6')}"
    flags = {FLAGS: f"-fsanitize={sanitizer} -O1", "LD_PRELOAD": preload}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, file],
        env=os.environ | flags | _SANITIZERS[sanitizer] | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "passed" in run.stdout
