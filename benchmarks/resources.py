"""What the CUDA kernels take of a multiprocessor: ``python -m benchmarks.resources``.

Registers, shared memory and spills, as the assembler reports them for each architecture; no GPU is
needed. Warnings are errors here, which they are not where a user builds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import records
from benchmarks.records import Row, Unavailable

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")

_FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", f"-I{CSRC}"]
_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def measure(sources: list[Path] = SOURCES) -> list[Row]:
    """A row for every kernel and architecture.

    Raises
    ------
    Unavailable
        If there is no nvcc.
    RuntimeError
        If a source does not compile, or not without warnings.
    """
    nvcc = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which(
        "nvcc"
    )
    if nvcc is None:
        raise Unavailable("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME")
    jobs = [(nvcc, source, target) for source in sources for target in ARCHITECTURES]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [row for rows in pool.map(lambda job: list(_compiled(*job)), jobs) for row in rows]


def spilling(rows: list[Row]) -> list[str]:
    """The kernels that spill registers to memory, in words."""
    return [
        f"{row['kernel']} of {row['source']} spills {row['spilled']} bytes on {row['architecture']}"
        for row in rows
        if row["spilled"]
    ]


def _compiled(nvcc: str, source: Path, architecture: str) -> Iterator[Row]:
    command = [nvcc, *_FLAGS, f"-arch={architecture}", "-c", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name} for {architecture}:\n{done.stdout}{done.stderr}")
    for found in _KERNEL.finditer(done.stdout + done.stderr):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield {
            "source": source.name,
            "architecture": found["architecture"],
            "kernel": _demangled(found["kernel"]),
            "registers": int(found["registers"]),
            "static_shared_bytes": int(shared[1]) if shared else 0,
            "stack_bytes": int(found["stack"]),
            "spilled": int(found["stores"]) + int(found["loads"]),
        }


def _demangled(name: str) -> str:
    """A kernel's name as it is written, where there is a tool for it."""
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    said = subprocess.run([tool, "-p", name], capture_output=True, text=True, check=True).stdout
    return said.strip().replace("confprune::cuda::", "").replace("(anonymous namespace)::", "")


def main() -> int:
    """Print the kernels, and store them with the versions they were compiled with."""
    start = time.perf_counter()
    try:
        rows = measure()
    except Unavailable as error:
        print(f"skipped: {error}")
        return 1
    for row in rows:
        print(
            f"{row['architecture']} {row['registers']:4d} registers, "
            f"{row['spilled']:4d} bytes spilled: {row['kernel']} ({row['source']})"
        )
    settings = {"flags": _FLAGS[:-1], "architectures": ARCHITECTURES, "nvcc": _version()}
    seconds = time.perf_counter() - start
    where = {"settings": settings, "seconds": seconds, "module": "benchmarks.resources"}
    path = records.save("resources", rows, **where)
    print(f"wrote {path}")
    return 1 if spilling(rows) else 0


def _version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V[\d.]+", said)
    return found[0] if found else said.strip()


if __name__ == "__main__":
    sys.exit(main())
