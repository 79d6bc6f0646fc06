"""Rows that compare: what confprune takes, what a peer takes, their ratio and the target for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import figures
from benchmarks.records import Row, markdown
from benchmarks.timing import duration, round_digits, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Target(NamedTuple):
    """How the ratio should be: so many times faster than a peer, or so many times its time."""

    sense: str
    bound: float


def at_least(bound: float) -> Target:
    """`bound` times faster than the peer, or more."""
    return Target("at least", bound)


def at_most(bound: float) -> Target:
    """`bound` times what is compared with, or less."""
    return Target("at most", bound)


FASTER = Target("at least", 0.0)
"""Compared, without a target."""


def compare(
    what: str,
    ours: Sequence[float],
    peer: str,
    theirs: Sequence[float],
    *,
    part: str = "",
    scale: float = 1.0,
    target: Target = FASTER,
    agrees: bool = True,
    unit: str = "s",
    **more: Any,
) -> Row:
    """A row from the repetitions of both.

    Parameters
    ----------
    what : str
        What was done.
    ours, theirs : sequence of float
        Seconds, or another `unit`.
    peer : str
        With what it was done there.
    part, scale : str, float
        What of the work the peer did, and what its time is multiplied by for the whole.
    target : Target
    agrees : bool
        Whether both came to the same result; without that no target is met.
    **more
        Kept in the row.
    """
    own, other = spread(ours), spread(theirs, scale)
    slower, faster = (own, other) if target.sense == "at least" else (other, own)
    ratio = faster["median"] / slower["median"]
    within = ratio >= target.bound if target.sense == "at least" else ratio <= target.bound
    return {
        "what": what,
        "unit": unit,
        "ours": own,
        "peer": peer,
        "theirs": other,
        "part": part,
        "scale": round_digits(scale),
        "ratio": round_digits(ratio),
        "sense": target.sense,
        "bound": target.bound or None,
        "met": (within and agrees) if target.bound else None,
        "agrees": agrees,
        **more,
    }


def absent(what: str, peer: str, reason: str = "not installed") -> Row:
    """A row for a peer, or for work, that could not be measured."""
    return {"what": what, "peer": peer, "absent": reason}


def table(rows: Iterable[Row]) -> str:
    """All rows, with the quartiles of both times."""
    header = ["what", "confprune", "against", "its time", "ratio", "target"]
    return markdown(header, [_cells(row) for row in rows])


def summary(rows: Iterable[Row]) -> str:
    """The rows with a target against a peer, in short."""
    header = ["what", "confprune", "against", "its time", "faster", "target"]
    body = [
        [
            row["what"],
            _quantity(row["ours"]["median"], row["unit"]),
            row["peer"],
            _quantity(row["theirs"]["median"], row["unit"]),
            f"{_number(row['ratio'])} ×",
            _target(row),
        ]
        for row in rows
        if row.get("bound") and row["sense"] == "at least"
    ]
    return markdown(header, body) if body else ""


def _cells(row: Row) -> list[str]:
    if "absent" in row:
        return [row["what"], "", row["peer"], row["absent"], "", ""]
    peer = f"{row['peer']} ({row['part']}, × {row['scale']:g})" if row["part"] else row["peer"]
    return [
        row["what"],
        _spread(row["ours"], row["unit"]),
        peer,
        _spread(row["theirs"], row["unit"]),
        _ratio(row),
        _target(row),
    ]


def _spread(found: Mapping[str, float], unit: str) -> str:
    median = _quantity(found["median"], unit)
    if found["repetitions"] == 1:
        return median
    lower, upper = (_quantity(found[f"{side}_quartile"], unit) for side in ("lower", "upper"))
    return f"{median} [{lower}, {upper}]"


def _quantity(value: float, unit: str) -> str:
    return duration(value) if unit == "s" else f"{value:.3g} {unit}"


def _ratio(row: Row) -> str:
    number = f"{_number(row['ratio'])} ×"
    if row["sense"] == "at most":
        return number
    return f"{number} faster" if row["ratio"] >= 1 else f"**slower**: {number}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _target(row: Row) -> str:
    if row["bound"] is None:
        return "–"
    sign = "≥" if row["sense"] == "at least" else "≤"
    verdict = "met" if row["met"] else "**missed**"
    if not row["agrees"]:
        verdict += " (results differ)"
    return f"{sign} {row['bound']:g} ×: {verdict}"


def bars(rows: Iterable[Row], title: str) -> Figure:
    """Speed-ups over peers as horizontal bars, with a mark at each target."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.get("sense") == "at least" and "ours" in row]
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(shown):
        color = figures.BLUE if row["ratio"] >= 1 else figures.PALE
        axes.barh(place, row["ratio"] - 1, left=1, height=0.62, color=color)
        end = max(1.0, row["ratio"])
        axes.text(end, place, f" {_number(row['ratio'])} ×", va="center", fontsize=9)
        if row["bound"]:
            axes.plot([row["bound"]] * 2, [place - 0.4, place + 0.4], color=figures.LIMIT)
    figures.list_rows(axes, [f"{row['what']}\n{row['peer']}" for row in shown])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    axes.margins(x=0.12)
    axes.axvline(1, color=figures.INK, linewidth=0.8)
    axes.set_xlabel("times faster than the peer; red: the target; pale: slower")
    axes.set_title(title, fontsize=11, loc="left")
    figures.clean(axes)
    return figure
