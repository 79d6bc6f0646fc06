"""The report: Markdown with the figures, and all numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.experiments import DELTA, Numbers
from benchmarks.records import machine, markdown, versions
from confprune.files import written_whole


def write(
    folder: Path,
    networks: Sequence[tuple[Numbers, dict[str, str]]],
    *,
    command: str,
    settings: dict[str, Any],
    seconds: float,
) -> Path:
    """Write ``report.md`` and ``numbers.json``.

    Parameters
    ----------
    networks : sequence of (numbers, figures)
        For each network what `experiments.run` gave, and its figures' files.
    settings : dict
        What to run again with; it goes into the JSON with the numbers.
    seconds : float
        How long it took; in the report alone, for the JSON is the same in every run.
    """
    content = {"settings": settings, "networks": [numbers for numbers, _ in networks]}
    with written_whole(folder / "numbers.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    where = machine()
    software = ", ".join(
        f"{name} {number}" for name, number in versions(["torch", "numpy", "confprune"]).items()
    )
    parts = [
        "# Confident magnitude-based pruning: the experiments",
        _INTRODUCTION,
        _stand_ins([numbers for numbers, _ in networks]),
        *(_network(numbers, figures) for numbers, figures in networks),
        f"`{command}`, {seconds / 60:.1f} min on {where['cores']} cores of {where['processor']}; "
        f"{software}. All numbers: [numbers.json](numbers.json).",
    ]
    with written_whole(folder / "report.md") as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")
    return folder / "report.md"


_INTRODUCTION = f"""\
The experiments of Alvarez ([arXiv 2408.04759](https://arxiv.org/abs/2408.04759)), on three
networks. A *question* is what may be lost by pruning: against the labels, against the full network
(no labels needed), or against it among the predictions that the pruned network is sure of. Three
ways to test answer on the same splits:

- *paper*: Hoeffding-Bentkus p-values and fixed-sequence testing of all levels at once;
- *confprune, one test*: the same testing with confprune's p-values (exact binomial for losses of 0
  and 1, `convex` for others);
- *confprune*: its default, early looks (with `betting` for losses that are not 0 or 1).

δ = {DELTA:g} unless said otherwise. Ranges hold four fifths of the splits. The losses of every
image at every level were computed once and rows drawn from them; scores that need data come from
images of their own, which are in no split."""


def _stand_ins(every: Sequence[Numbers]) -> str:
    names = list(dict.fromkeys(numbers["data"] for numbers in every if numbers["stand_in"]))
    if not names:
        return ""
    return (
        f"> **Stand-ins.** No files were given for a part of the data: {' and '.join(names)} took "
        "their place. What is labelled so says how the method works, and nothing about the paper's "
        "data."
    )


def _network(numbers: Numbers, figures: dict[str, str]) -> str:
    label = _label(numbers)
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in numbers["notes"])
    parts = [
        f"## {label}",
        f"{numbers['weights']:,} prunable weights, trained on {numbers['training']:,} images; "
        f"{numbers['calibration']:,} images calibrate and {numbers['test']:,} test.{notes}",
        "### Risk against sparsity",
        _picture("risk against sparsity, and what is certified", numbers, figures["curves"]),
        _curves(numbers),
        "### Certified sparsity against n, δ and α",
        _picture("certified sparsity", numbers, figures["against"]),
        _against(numbers),
        "### Random splits",
        _picture("test risks at the certified sparsity", numbers, figures["splits"]),
        _splits(numbers),
        f"### By {numbers['groups']['kind']}",
        _picture(f"risk by {numbers['groups']['kind']}", numbers, figures["groups"]),
        _groups(numbers),
        "### Criteria",
        _picture("certified sparsity of every criterion", numbers, figures["criteria"]),
        _criteria(numbers),
    ]
    if "masks" in figures:
        parts += ["### Masks", _picture("masks before and after", numbers, figures["masks"])]
    return "\n\n".join(parts)


def _curves(numbers: Numbers) -> str:
    rows = []
    for question, curve in numbers["curves"].items():
        for method, found in curve["certified"].items():
            certified = [f"{alpha}: {_percent(s)}" for alpha, s in found.items()]
            rows.append([question, curve["loss"], method, ", ".join(certified)])
    header = ["question", "loss", "test", "certified sparsity by α, one split"]
    return _table(numbers, header, rows)


def _against(numbers: Numbers) -> str:
    rows = numbers["against"]["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    points = list(dict.fromkeys((row["variable"], row["value"]) for row in rows))
    cells = {(r["variable"], r["value"], r["method"]): r for r in rows}
    names = {"n": "n", "delta": "δ", "alpha": "α"}
    body = [
        [f"{names[v]} = {value:g}", *(_range(cells[v, value, m]) for m in methods)]
        for v, value in points
    ]
    return _table(numbers, [f"{numbers['against']['loss']}", *methods], body)


def _splits(numbers: Numbers) -> str:
    rows = []
    for question, found in numbers["splits"].items():
        for method, row in found["methods"].items():
            rows.append(
                [
                    question,
                    f"{found['alpha']:g}",
                    method,
                    _range(row),
                    _share(row["above_on_test"]),
                    _share(row["above_known"]),
                ]
            )
    header = ["question", "α", "test", "certified sparsity", "test risk > α", "known risk > α"]
    text = (
        f"The share of splits whose risk is above α must not exceed δ = {numbers['delta']:g}, up "
        "to what the interval allows. A test risk is an estimate, and high where the calibration "
        "set, the other half of one pool, was lucky; so calibration sets were also drawn from the "
        "pool with replacement, where the pool's own risk is the true one (last column)."
    )
    return f"{_table(numbers, header, rows)}\n\n{text}"


def _groups(numbers: Numbers) -> str:
    found = numbers["groups"]
    rows = [
        [
            title,
            _range(row),
            f"{max(row['risks']):.4f}",
            found["groups"][row["risks"].index(max(row["risks"]))],
            _share(row["some_group_above"]),
        ]
        for title, row in found["rows"].items()
    ]
    kind = found["kind"]
    header = ["", "certified sparsity", "worst mean risk", f"of {kind}", f"some {kind} above α"]
    return f"α = {found['alpha']:g}, {found['loss']}.\n\n{_table(numbers, header, rows)}"


def _criteria(numbers: Numbers) -> str:
    found = numbers["criteria"]
    rows = [
        [
            way,
            _range(row),
            "–" if row["test_risk"] is None else f"{row['test_risk']:.4f}",
        ]
        for way, row in found["rows"].items()
    ]
    header = ["pruned by", "certified sparsity", "mean test risk"]
    picked = ", ".join(f"{way} ({times})" for way, times in found["picked"].items()) or "none"
    text = (
        f"α = {found['alpha']:g}, {found['loss']}; one test. The last row tests all of them as "
        "candidates of one choice, along an order that a fifth of the calibration set has taught; "
        f"it took: {picked}. Blocks, rows and N:4 are masked, not removed; their sparsity is that "
        "of all prunable weights."
    )
    return f"{text}\n\n{_table(numbers, header, rows)}"


def _table(numbers: Numbers, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"*{_label(numbers)}*\n\n{markdown(header, rows)}"


def _label(numbers: Numbers) -> str:
    return f"{numbers['network']} on {numbers['data']}"


def _picture(what: str, numbers: Numbers, file: str) -> str:
    return f"![{_label(numbers)}: {what}]({file})"


def _percent(share: float) -> str:
    return "–" if share == 0 else f"{100 * share:.1f} %"


def _range(row: Numbers) -> str:
    return f"{100 * row['mean']:.1f} % ({100 * row['low']:.0f}–{100 * row['high']:.0f})"


def _share(share: Numbers) -> str:
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['share']:.1f} % ({low:.1f}–{high:.1f})"
