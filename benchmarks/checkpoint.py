"""Pruning a checkpoint on disk: its time against copying the file, and its memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import figures, memory
from benchmarks.comparisons import Target, absent, at_most, compare, table
from benchmarks.records import Row, Unavailable
from benchmarks.timing import Contender, interleaved
from confprune import checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How long does pruning a checkpoint take, against copying the file, in what memory?"
PEERS: tuple[str, ...] = ()

WIDTH = 4096
TIMES_COPYING = 2.5
MEMORY_MIB = 1024
NO_TARGET = Target("at most", 0.0)
DTYPES = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Sizes:
    """Size of the file, and effort in timing."""

    gib: float
    rounds: int
    seconds: float


FULL = Sizes(3.0, rounds=3, seconds=6.0)
QUICK = Sizes(0.3, rounds=3, seconds=1.0)


def measure(sizes: Sizes, seed: int) -> list[Row]:
    """For each type one sparsity, and the memory; then three sparsities."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="confprune-") as name:
        folder = Path(name)
        needed, free = int(2.5 * sizes.gib * 2**30), shutil.disk_usage(folder).free
        if free < needed:
            raise Unavailable(f"{needed:,} bytes in {folder}, where {free:,} are free")
        for dtype in DTYPES:
            source = folder / f"model-{dtype}.safetensors"
            write_checkpoint(source, sizes.gib, dtype, seed)
            of = f"{sizes.gib:g} GiB of {dtype}"
            rows.append(_time_row(f"one sparsity, {of}", source, [0.5], sizes))
            rows.append(_memory_row(f"memory, {of}", source))
            source.unlink()
        # As much is written in all: more would wait for the disk.
        third = sizes.gib / 3
        source = folder / "model.safetensors"
        write_checkpoint(source, third, "bfloat16", seed)
        of = f"{third:.3g} GiB of bfloat16"
        rows.append(_time_row(f"three sparsities, {of}", source, [0.3, 0.5, 0.7], sizes))
    return rows


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {"weights": f"matrices {WIDTH} x {WIDTH}, normal with standard deviation 0.02"}


def write_checkpoint(path: Path, gib: float, dtype: str, seed: int) -> None:
    """Write a file with an embedding and, layer by layer, a norm and one of two matrices."""
    kind: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(WIDTH, WIDTH, generator=generator).mul_(0.02).to(kind) for _ in "ab"]
    layers = max(1, round(gib * 2**30 / (WIDTH**2 * kind.itemsize)))
    tensors = [("model.embed_tokens.weight", torch.ones(1024, WIDTH, dtype=kind))]
    for layer in range(layers):
        tensors.append((f"model.layers.{layer}.norm.weight", torch.ones(WIDTH, dtype=kind)))
        tensors.append((f"model.layers.{layer}.proj.weight", matrices[layer % 2]))
    header, end = {}, 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * kind.itemsize
        places = [start, end]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": places}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            file.write(tensor.view(torch.uint8).numpy().data)


def _time_row(what: str, source: Path, sparsities: list[float], sizes: Sizes) -> Row:
    """Against one `cp` an output."""
    out = source.with_name("pruned-{sparsity}")

    def copy(_: object) -> None:
        for j in range(len(sparsities)):
            subprocess.run(["cp", source, source.with_name(f"copy-{j}")], check=True)

    def prune(_: object) -> None:
        checkpoint.prune(source, out, sparsity=sparsities, progress=False)

    def clean() -> None:
        """Leave no old output, and the disk idle."""
        for path in source.parent.iterdir():
            if path != source:
                path.unlink()
        os.sync()

    contenders = {"confprune": Contender(prune, clean), "cp": Contender(copy, clean)}
    times = interleaved(contenders, rounds=sizes.rounds, seconds=sizes.seconds)
    clean()
    one = len(sparsities) == 1
    return compare(
        what,
        times["confprune"],
        "`cp`" if one else f"`cp`, {len(sparsities)} times",
        times["cp"],
        target=at_most(TIMES_COPYING) if one else NO_TARGET,
    )


def _memory_row(what: str, source: Path) -> Row:
    limit = f"{MEMORY_MIB} MiB"
    if not memory.measurable():
        return absent(what, limit, "not measurable on this system")
    out = source.with_name("pruned")
    command = [sys.executable, "-c", _PEAK, source, "--sparsity=0.5", f"--out={out}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    out.unlink()
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak
    return compare(what, [int(peak[1]) / 1024], limit, [MEMORY_MIB], unit="MiB", target=at_most(1))


_PEAK = """
import sys
from confprune.cli import main
assert main(["prune", *sys.argv[1:], "--quiet"]) == 0
print(open("/proc/self/status").read())
"""
"""The whole of a process that prunes: Python and torch as well."""


def tables(record: Mapping[str, Any]) -> str:
    """One table."""
    return table(record["rows"])


def plot(record: Mapping[str, Any]) -> Figure:
    """The times of pruning and of copying."""
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row.get("unit") == "s"]
    figure = Figure(figsize=(9, 1.4 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        for side, color, shift in (("theirs", figures.PALE, -0.19), ("ours", figures.BLUE, 0.19)):
            found = row[side]
            axes.barh(place + shift, found["median"], height=0.34, color=color)
            ends = [found["min"], found["max"]]
            axes.plot(ends, [place + shift] * 2, color=figures.INK, linewidth=1)
        if row["bound"]:
            limit = row["bound"] * row["theirs"]["median"]
            axes.plot([limit] * 2, [place, place + 0.38], color=figures.LIMIT)
    figures.list_rows(axes, [row["what"] for row in rows])
    axes.set_xlabel("seconds, median and range; pale: copying; red: the target")
    axes.set_title("Pruning a checkpoint against copying it", fontsize=11, loc="left")
    figures.clean(axes)
    return figure
