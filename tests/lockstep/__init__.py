"""The sources of the CUDA kernels built as plain C++, to run on the CPU: see lockstep.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SANITIZE = "CONFPRUNE_LOCKSTEP_SANITIZE"
"""Set where the process runs with AddressSanitizer's library."""

FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


@cache
def library(*sources: str) -> ctypes.CDLL:
    """Load the library of some sources of csrc/cuda and exports beside this file.

    It is built under build/ where it is not there yet for these very sources.
    """
    flags = [*FLAGS, *(["-fsanitize=address"] if SANITIZE in os.environ else [])]
    paths = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cu")]
    digest = hashlib.sha256(repr((sources, flags)).encode())
    for path in sorted([*paths, *HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        digest.update(path.read_bytes())
    built = ROOT / "build" / "lockstep" / f"{digest.hexdigest()[:16]}.so"
    if not built.is_file():
        built.parent.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        files = [HERE / s if s.endswith(".cpp") else ROOT / "csrc" / "cuda" / s for s in sources]
        subprocess.run(
            [*shlex.split(os.environ.get("CXX", "c++")), *flags, "-shared", "-o", unfinished]
            + [f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-x", "c++", *files],
            check=True,
        )
        unfinished.rename(built)
    return ctypes.CDLL(str(built))


def build(folder: Path, *flags: str) -> ctypes.CDLL:
    """Compile all kernels, with what the tests call, to one library."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    objects = []
    steps = []
    for source in sorted([*(ROOT / "csrc").glob("cuda/*.cu"), *HERE.glob("exports*.cpp")]):
        objects.append(str(folder / f"{source.stem}.o"))
        command = [*compiler, *FLAGS, *flags, *includes, "-x", "c++", "-c", str(source)]
        steps.append(subprocess.Popen([*command, "-o", objects[-1]], stderr=subprocess.PIPE))
    for step in steps:
        assert step.wait() == 0, step.communicate()[1].decode()
    library = folder / "lockstep.so"
    subprocess.run([*compiler, *flags, "-shared", *objects, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
