"""Run a benchmark, or write the tables of all into README.md: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from benchmarks import records
from confprune.files import written_whole

BENCHMARKS = ("validity", "power", "looks")
FEWEST_DRAWS = 8
README = Path(__file__).parent / "README.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.benchmark is None:
        print("benchmarks; run one with: python -m benchmarks NAME\n")
        for name in BENCHMARKS:
            print(f"  {name:10s} {_module(name).QUESTION}")
        print("  tables     Write the tables of the stored results into README.md.")
    elif options.benchmark == "tables":
        _write_tables()
    else:
        _run(options.benchmark, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", nargs="?", choices=[*BENCHMARKS, "tables"])
    parser.add_argument("--quick", action="store_true", help="few draws; stored apart")
    parser.add_argument("--draws", type=int, help="number of draws")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the random numbers")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--plot", action="store_true", help="only draw the stored results again")
    return parser


def _run(name: str, options: argparse.Namespace) -> None:
    benchmark = _module(name)
    if not options.plot:
        draws = options.draws or (benchmark.QUICK_DRAWS if options.quick else benchmark.DRAWS)
        if draws < FEWEST_DRAWS:
            raise SystemExit(f"--draws {draws} is too few to say anything; at least {FEWEST_DRAWS}")
        start = time.perf_counter()
        rows = benchmark.measure(draws, options.seed, options.workers)
        path = records.save(
            name,
            rows,
            settings={
                **benchmark.settings(),
                "draws": draws,
                "seed": options.seed,
                "workers": options.workers,
            },
            seconds=time.perf_counter() - start,
            quick=options.quick,
            peers=benchmark.PEERS,
        )
        print(f"wrote {path}")
    record = records.load(name, quick=options.quick)
    if record is None:
        raise SystemExit(f"there are no results of {name} yet; run: python -m benchmarks {name}")
    print(benchmark.tables(record))
    folder = records.QUICK if options.quick else records.RESULTS
    with written_whole(folder / f"{name}.png") as temporary:
        benchmark.plot(record).savefig(temporary, dpi=150)
    print(f"wrote {folder / name}.png")


def _write_tables() -> None:
    """Replace what stands between the markers of each benchmark in README.md."""
    text = README.read_text(encoding="utf-8")
    for name in BENCHMARKS:
        record = records.load(name)
        if record is None:
            continue
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"README.md lacks the markers {begin} and {end}")
        content = f"{_module(name).tables(record)}\n\n{records.provenance(record)}"
        text = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    with written_whole(README) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


if __name__ == "__main__":
    raise SystemExit(main())
