"""What a benchmark leaves behind: a JSON file with its rows and how they came about."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from confprune.files import written_whole

RESULTS = Path(__file__).parent / "results"
QUICK = RESULTS / "quick"
"""Small runs go here and are not kept under version control."""

Row = dict[str, Any]


class Unavailable(Exception):
    """Says what a measurement needs that is not here."""


def save(
    name: str,
    rows: Sequence[Row],
    *,
    settings: Mapping[str, Any],
    seconds: float,
    quick: bool = False,
    peers: Sequence[str] = (),
    module: str = "benchmarks",
) -> Path:
    """Store the rows of a benchmark with the machine, the versions and the settings.

    Parameters
    ----------
    name : str
        The file is NAME.json.
    rows : sequence of dict
        What was measured.
    settings : mapping
        What it was measured with: enough to measure it again.
    seconds : float
        How long it took.
    quick : bool
        Whether this was a small run, which must not replace a full one.
    peers : sequence of str
        Distributions compared against, whose versions are recorded as well.
    module : str
        What was run.
    """
    folder = QUICK if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "name": name,
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "settings": dict(settings),
        "machine": machine(),
        "versions": versions(["numpy", "scipy", "torch", "confprune", *peers]),
        "rows": list(rows),
    }
    path = folder / f"{name}.json"
    with written_whole(path) as temporary:
        temporary.write_text(_compact(record), encoding="utf-8")
    return path


def load(name: str, *, quick: bool = False) -> dict[str, Any] | None:
    """The stored record of a benchmark, or None if it has not been run."""
    path = (QUICK if quick else RESULTS) / f"{name}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def machine() -> dict[str, Any]:
    """The machine: processor, cores this process may use, caches, memory, system."""
    return {
        "processor": _linux_field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "caches": _caches(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: text to the left in the first column, the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def provenance(record: Mapping[str, Any]) -> str:
    """One sentence: when, where and with which versions a record was made."""
    where, used = record["machine"], record["versions"]
    memory = f", {where['memory_gib']} GiB" if where["memory_gib"] else ""
    software = ", ".join(f"{name} {number}" for name, number in used.items())
    settings = record["settings"]
    threads = f" ({settings['threads']} threads)" if "threads" in settings else ""
    built = f", {settings['instruction_set']}" if "instruction_set" in settings else ""
    taken = record["seconds"]
    return (
        f"`{record['command']}`, {record['date'][:10]}, "
        f"{f'{taken / 60:.0f} min' if taken >= 60 else f'{taken:.0f} s'} on "
        f"{where['cores']} cores{threads} of {where['processor']}{built}{memory}; {software}."
    )


def place(record: Mapping[str, Any]) -> str:
    """The same in short: the machine, and the torch."""
    where, settings = record["machine"], record["settings"]
    return (
        f"Medians, on {where['cores']} cores of {where['processor']} "
        f"({settings['instruction_set']}) with torch {record['versions']['torch']}, "
        f"{record['date'][:10]}."
    )


def _compact(record: Mapping[str, Any]) -> str:
    """JSON with one row per line: small, and its changes can be read."""
    head = {key: value for key, value in record.items() if key != "rows"}
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in record["rows"])
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'


def _caches() -> dict[str, str]:
    """Sizes of the first core's caches, such as {"L1d": "32K", "L2": "1024K"}."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in _CACHE_FIELDS)
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[f"L{level}{suffix}"] = size
    return found


_CACHE_FIELDS = ("level", "type", "size")


def _linux_field(path: str, name: str) -> str | None:
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    except OSError:
        pass
    return None


def _memory() -> float | None:
    total = _linux_field("/proc/meminfo", "MemTotal")
    return None if total is None else round(int(total.split()[0]) / 2**20, 1)
