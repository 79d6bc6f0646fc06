"""Run the benchmarks, all or by name, and write their tables: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import comparisons, records
from benchmarks.records import Row, Unavailable
from confprune.files import written_whole
from confprune.ops import instruction_set

STATISTICS = ("validity", "power", "looks")
"""Measured by random draws, on several processes."""

SPEED = (
    *("selection", "matrix", "calibrate", "growth"),
    *("sparse", "checkpoint", "dropin", "instructions"),
)
"""Measured with a clock, or by counting, in this process."""

BENCHMARKS = (*STATISTICS, *SPEED)
"""What is run where nothing is named."""

ON_GPU = ("gpu",)
"""Run by name only: most machines have no GPU."""

EVERY = (*BENCHMARKS, *ON_GPU)
SUMMARIZED = ("selection", "matrix", "calibrate")
"""Whose rows against peers are in the README of the repository."""

FEWEST_DRAWS = 8
FOLDER = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if something that was asked for could not be run."""
    parser = _parser()
    options = parser.parse_args(arguments)
    names = options.benchmarks or list(BENCHMARKS)
    unknown = [name for name in names if name not in (*EVERY, "tables")]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; choose from {', '.join(EVERY)}")
    if options.draws is not None and options.draws < FEWEST_DRAWS:
        parser.error(f"--draws {options.draws} is too few to say anything; at least {FEWEST_DRAWS}")
    skipped = [name for name in names if name != "tables" and not _run(name, options)]
    if not options.quick:
        write_tables()
    return 1 if skipped else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run benchmarks, all or those named; store and draw their results.",
        epilog="\n".join(
            [
                "benchmarks:",
                *(f"  {name:13s} {_module(name).QUESTION}" for name in EVERY),
                "  tables        Only write the tables of the stored results into the READMEs.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmarks", nargs="*", metavar="NAME", help="which; default: all but gpu")
    parser.add_argument("--quick", action="store_true", help="small runs, stored apart")
    parser.add_argument("--plot", action="store_true", help="only draw the stored results again")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the random numbers")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch, for speed"
    )
    parser.add_argument("--draws", type=int, help="number of draws, for statistics")
    parser.add_argument("--workers", type=int, default=2, help="processes, for statistics")
    return parser


def _run(name: str, options: argparse.Namespace) -> bool:
    """Measure, store, print and draw one benchmark; False if it cannot be run here."""
    benchmark = _module(name)
    print(f"\n{name}: {benchmark.QUESTION}")
    if not options.plot:
        start = time.perf_counter()
        try:
            rows, settings = _measured(name, benchmark, options)
            for so_far in _as_they_come(rows):
                path = records.save(
                    name,
                    so_far,
                    settings=settings,
                    seconds=time.perf_counter() - start,
                    quick=options.quick,
                    peers=benchmark.PEERS,
                )
        except (Unavailable, ModuleNotFoundError) as error:
            print(f"skipped: {error}")
            return False
        print(f"wrote {path}")
    record = records.load(name, quick=options.quick)
    if record is None:
        print(f"there are no results yet; run: python -m benchmarks {name}")
        return False
    print(f"\n{benchmark.tables(record)}\n\n{records.provenance(record)}")
    folder = records.QUICK if options.quick else records.RESULTS
    with written_whole(folder / f"{name}.png") as temporary:
        benchmark.plot(record).savefig(temporary, dpi=150)
    print(f"wrote {folder / name}.png")
    return True


def _as_they_come(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """A list once; of an iterator what there is after each row, for it may not come to its end."""
    if isinstance(rows, list):
        yield rows
        return
    found = []
    for row in rows:
        found.append(row)
        yield found


def _measured(
    name: str, benchmark: ModuleType, options: argparse.Namespace
) -> tuple[Iterable[Row], dict[str, Any]]:
    """The rows of a benchmark, and what they were measured with."""
    if name in STATISTICS:
        draws = options.draws or (benchmark.QUICK_DRAWS if options.quick else benchmark.DRAWS)
        rows = benchmark.measure(draws, options.seed, options.workers)
        how: Mapping[str, Any] = {"draws": draws, "workers": options.workers}
    else:
        sizes = benchmark.QUICK if options.quick else benchmark.FULL
        torch.set_num_threads(options.threads)
        rows = benchmark.measure(sizes, options.seed)
        how = {
            "sizes": asdict(sizes),
            "threads": options.threads,
            "instruction_set": instruction_set(),
        }
    return rows, {**how, **benchmark.settings(), "seed": options.seed}


def write_tables(folder: Path = FOLDER) -> None:
    """Write the tables of all stored results into the README of the benchmarks, and a summary.

    The summary goes into the README of the repository, one folder up.
    """
    stored = {name: records.load(name) for name in EVERY}
    content = {
        name: f"{_module(name).tables(record)}\n\n{records.provenance(record)}"
        for name, record in stored.items()
        if record is not None
    }
    _fill(folder / "README.md", content)
    measured = [record for name in SUMMARIZED if (record := stored[name])]
    if measured:
        rows = [row for record in measured for row in record["rows"]]
        short = f"{comparisons.summary(rows)}\n\n{records.place(measured[0])}"
        _fill(folder.parent / "README.md", {"benchmarks": short})


def _fill(path: Path, content: Mapping[str, str]) -> None:
    """Replace what stands between the markers of each name in a file."""
    text = path.read_text(encoding="utf-8")
    for name, table in content.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{path} lacks the markers {begin} and {end}")
        text = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


if __name__ == "__main__":
    raise SystemExit(main())
