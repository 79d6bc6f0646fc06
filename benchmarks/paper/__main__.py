"""Run the paper's experiments: ``python -m benchmarks.paper --data DIR --out DIR``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.paper import data, experiments, figures, report, tasks
from benchmarks.paper.sizes import DEFAULT, QUICK
from benchmarks.remember import remember_pure_functions

NETWORKS = ("LeNet-300-100", "small CNN", "U-Net")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    start = time.perf_counter()
    try:
        path = run(options, start)
    except (ValueError, ImportError) as error:
        print(f"benchmarks.paper: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {path} ({time.perf_counter() - start:.0f} s)")
    return 0


def run(options: argparse.Namespace, start: float) -> Path:
    """Read or make the data, train, evaluate, draw and write; the path of the report."""
    folder: Path | None = options.data
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--data {folder} is not a folder")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file, not a folder")
    sizes, seed, progress = QUICK if options.quick else DEFAULT, options.seed, not options.quiet
    # What is wrong with the files shows before anything is trained.
    digits = data.classification(folder, sizes, seed)
    polyps = data.segmentation(folder, sizes, seed, progress=progress)
    for what, source in (("MNIST", digits), ("folder of images and masks", polyps)):
        if source.stand_in:
            where = "no --data was given" if folder is None else f"{folder} holds no {what}"
            print(f"{where}: using {source.name} instead of {what}")
    if options.checkpoint is not None:
        tasks.load_unet(options.checkpoint)
    remember_pure_functions()
    options.out.mkdir(parents=True, exist_ok=True)
    networks = []
    for name in NETWORKS:
        if name == "U-Net":
            task = tasks.segmenter(
                polyps, sizes.segmentation, seed, options.checkpoint, progress=progress
            )
        else:
            task = tasks.classifier(name, digits, sizes.classification, seed, progress=progress)
        numbers = experiments.run(task, sizes, seed, progress=progress)
        stem = name.lower().replace(" ", "-")
        files = figures.draw(numbers, options.out, stem)
        if name == "U-Net":
            main_question = task.questions[1]
            certified = numbers["curves"][main_question.name]["certified"]
            sparsity = certified["confprune"][f"{main_question.alpha:g}"]
            title = f"U-Net, {polyps.name}"
            files["masks"] = figures.masks(task, sparsity, title, options.out, stem)
        networks.append((numbers, files))
    return report.write(
        options.out,
        networks,
        command=shlex.join(["python", "-m", "benchmarks.paper", *sys.argv[1:]]),
        settings={"seed": seed, "quick": options.quick, **asdict(sizes)},
        seconds=time.perf_counter() - start,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with MNIST's IDX files, with images/ and masks/, or with both, at any depth; "
        "what is missing is stood in for",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="state dict of your own U-Net, not trained"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, in two minutes")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
