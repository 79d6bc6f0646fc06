"""Instructions of the two selection kernels, counted by valgrind: they repeat where times do not.

A small program runs a kernel on two numbers of weights; the difference is what more weights cost.
valgrind knows no AVX-512, so what is counted is the build for every x86-64.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import figures
from benchmarks.records import Row, Unavailable, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How many instructions does selection take per weight?"
PEERS: tuple[str, ...] = ()

CSRC = Path(__file__).parents[1] / "csrc"
DRIVER = Path(__file__).with_suffix(".cpp")
KERNELS = ("histogram", "assign")
ELEMENTS = ("float32", "bfloat16")

INSTRUCTION_SET = "baseline"

MARGIN = 1.3
"""How many times the stored count a new one may be: compilers differ."""


@dataclass(frozen=True)
class Sizes:
    """The smaller number of weights; the larger is twice as many."""

    weights: int


FULL = QUICK = Sizes(200_000)


def measure(sizes: Sizes, seed: int) -> list[Row]:
    """One row for each kernel and type of element; the weights are the same whatever the seed."""
    _check_tools()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = _compiled(Path(folder))
        for kernel in KERNELS:
            for element in ELEMENTS:
                few, many = (
                    _instructions(program, kernel, element, size)
                    for size in (sizes.weights, 2 * sizes.weights)
                )
                per_weight = round((many - few) / sizes.weights, 3)
                rows.append({"kernel": kernel, "element": element, "instructions": per_weight})
    return rows


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    compiler = _output([_compiler(), "--version"]).splitlines()[0]
    return {"compiler": compiler, "instruction_set": INSTRUCTION_SET, "levels": 100}


def exceeded(rows: list[Row], stored: list[Row]) -> list[str]:
    """The kernels that take more instructions than stored, beyond the margin, in words."""
    known = {(row["kernel"], row["element"]): row["instructions"] for row in stored}
    return [
        f"{row['kernel']} of {row['element']}: {row['instructions']} instructions per weight, "
        f"{known[row['kernel'], row['element']]} stored"
        for row in rows
        if row["instructions"] > MARGIN * known[row["kernel"], row["element"]]
    ]


def _check_tools() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"instructions are counted on x86-64, not on {platform.machine()}")
    for tool in ("valgrind", _compiler()):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is not installed")


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _compiled(folder: Path) -> Path:
    """The driver with all kernels; those that it only links are compiled in a hurry."""
    sources = sorted((CSRC / "kernels").glob("*.cpp"))
    objects = []
    for source in [DRIVER, *sources]:
        counted = source == DRIVER or source.name.startswith("selection")
        objects.append(str(folder / f"{source.stem}.o"))
        flags = ["-std=c++17", "-O3" if counted else "-O0", f"-I{CSRC}"]
        _output([_compiler(), *flags, "-c", str(source), "-o", objects[-1]])
    program = folder / "instructions"
    _output([_compiler(), *objects, "-o", str(program)])
    return program


def _instructions(program: Path, kernel: str, element: str, weights: int) -> int:
    said = _output(
        [
            "valgrind",
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            "--collect-atstart=no",
            f"--toggle-collect=counted_{kernel}",
            str(program),
            kernel,
            element,
            str(weights),
        ]
    )
    found = re.search(r"Collected : (\d+)", said)
    if found is None:
        raise RuntimeError(f"valgrind gave no count:\n{said}")
    return int(found[1])


def _output(command: list[str]) -> str:
    """What a command prints."""
    environment = {**os.environ, "CONFPRUNE_ISA": INSTRUCTION_SET}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def tables(record: Mapping[str, Any]) -> str:
    """One table."""
    body = [
        [f"`{row['kernel']}`, {row['element']}", f"{row['instructions']:.1f}"]
        for row in record["rows"]
    ]
    return markdown(["kernel", "instructions per weight"], body)


def plot(record: Mapping[str, Any]) -> Figure:
    """The counts as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    counts = [row["instructions"] for row in record["rows"]]
    axes.barh(range(len(counts)), counts, height=0.62, color=figures.BLUE)
    figures.list_rows(axes, [f"{row['kernel']}, {row['element']}" for row in record["rows"]])
    axes.set_xlabel("instructions per weight (100 levels)")
    figures.clean(axes)
    return figure
