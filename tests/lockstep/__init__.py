"""The kernels of csrc/cuda as plain C++, run in lockstep on the CPU and called by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_CSRC = _HERE.parent.parent / "csrc"
_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def build(folder: Path, *flags: str) -> ctypes.CDLL:
    """Compile all kernels, with what the tests call, to one library."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-I{_CSRC}", f"-I{_HERE}"]
    objects = []
    steps = []
    for source in sorted([*_CSRC.glob("cuda/*.cu"), *_HERE.glob("exports*.cpp")]):
        objects.append(str(folder / f"{source.stem}.o"))
        command = [*compiler, *_FLAGS, *flags, *includes, "-x", "c++", "-c", str(source)]
        steps.append(subprocess.Popen([*command, "-o", objects[-1]], stderr=subprocess.PIPE))
    for step in steps:
        assert step.wait() == 0, step.communicate()[1].decode()
    library = folder / "lockstep.so"
    subprocess.run([*compiler, *flags, "-shared", *objects, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@cache
def library(*flags: str) -> ctypes.CDLL:
    """Load what `build` makes; it is kept under build/ for as long as no source changes."""
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted([*_CSRC.rglob("*.h"), *_CSRC.glob("cuda/*.cu"), *_HERE.glob("*.*")]):
        digest.update(path.read_bytes())
    folder = _HERE.parent.parent / "build" / "lockstep" / digest.hexdigest()[:16]
    if (folder / "lockstep.so").is_file():
        return ctypes.CDLL(str(folder / "lockstep.so"))
    folder.mkdir(parents=True, exist_ok=True)
    return build(folder, *flags)
