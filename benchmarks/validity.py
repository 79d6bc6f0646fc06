"""Validity: how often something is certified that must not be, where that is likeliest.

Risks exactly at alpha are the worst case of every p-value. Levels at, around and far from alpha,
with losses independent between levels, are the worst case of most ways to test many of them.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks import figures
from benchmarks.curves import FloatArray, clopper_pearson
from benchmarks.parallel import run_jobs
from benchmarks.records import Row, markdown
from benchmarks.remember import remember_pure_functions
from confprune.risk.looks import default_looks
from confprune.risk.procedures import PROCEDURES
from confprune.risk.pvalues import PVALUES
from confprune.risk.sequential import RiskTarget, SequentialTest
from confprune.risk.testing import pareto_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUESTION = "How often does each test certify a level whose risk is too high?"
DRAWS = 2000
QUICK_DRAWS = 60
PEERS: tuple[str, ...] = ()

DELTA = 0.1
CHUNK = 100
"""Draws per job."""

LEVELS = 8
ORDERING = 100
"""Examples that order the candidates for split fixed-sequence testing."""

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Setting:
    """What is to be kept: R risks of K levels, each a multiple of its alpha.

    Attributes
    ----------
    n : int
        Examples. With 267 the exact test for 0/1 losses rejects a risk of alpha = 0.1 with
        probability 0.0995: no slack hides an error.
    alphas : tuple of float [R]
    multiples : tuple of tuples [R][K]
        Risk of each level divided by alpha.
    shares : tuple of float [R] or None
        With groups: the share of the examples in each.
    acceptance : tuple of float [K] or None
        With selective prediction: the share of the examples accepted at each level.
    """

    n: int
    alphas: tuple[float, ...]
    multiples: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...] | None = None
    acceptance: tuple[float, ...] | None = None

    @property
    def risks(self) -> FloatArray:
        """Risks [R, K]."""
        return np.asarray(np.array(self.alphas)[:, None] * np.array(self.multiples))

    @property
    def forbidden(self) -> BoolArray:
        """Levels [K] with some risk at or above its alpha."""
        return np.asarray(np.any(np.array(self.multiples) >= 1.0, axis=0))


# Where several risks are to be kept, each reaches its alpha at some level where the others are
# far below theirs: there a violation is as likely as with one risk.
SETTINGS: Mapping[str, Setting] = {
    "one risk": Setting(267, (0.1,), ((0.2, 0.6, 1, 1, 1, 1.1, 1.5, 3),)),
    "several risks": Setting(
        267,
        (0.1, 0.05),
        ((0.2, 0.6, 1, 0.3, 1, 1.1, 1.5, 3), (0.2, 0.3, 0.2, 1, 1, 0.3, 1.5, 3)),
    ),
    "groups": Setting(
        500,
        (0.1, 0.1, 0.1),
        (
            (0.2, 0.6, 1, 0.2, 0.2, 1.1, 1.5, 3),
            (0.2, 0.3, 0.2, 1, 0.2, 1.1, 0.3, 3),
            (0.1, 0.2, 0.2, 0.2, 1, 0.5, 0.3, 3),
        ),
        shares=(0.5, 0.3, 0.2),
    ),
    "selective": Setting(
        400,
        (0.1,),
        ((0.2, 0.6, 1, 1, 1, 1.1, 1.5, 3),),
        acceptance=(0.95, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.4),
    ),
}

FAMILIES = ("0/1", "Beta")
"""Laws of the losses: Bernoulli, or Beta with the same mean and half the variance."""

STARTS = (0, 2, 5)
"""Where the chains of fixed-sequence testing with several starts begin."""


class Variant(NamedTuple):
    """A p-value with a testing procedure."""

    pvalue: str
    procedure: str
    looks: bool


AT_ONCE = ("fixed_sequence", "several_starts", "bonferroni", "holm", "graphical", "split")
WITH_LOOKS = ("fixed_sequence", "bonferroni", "holm", "split")
_PROCEDURE_NAMES = {"several_starts": "fixed_sequence", "split": "split_fixed_sequence"}


def variants(setting: str, family: str) -> list[Variant]:
    """All that is tested in one setting, on one family of losses."""
    usable = [kind for kind in PVALUES.values() if family == "0/1" or not kind.binary_only]
    found = [Variant(kind.name, name, False) for kind in usable for name in AT_ONCE]
    every = setting == "one risk" and family == "0/1"
    for kind in usable:
        if kind.asymptotic:
            continue
        # Bonferroni is Holm's first step, split testing is a fixed sequence of other data, and
        # neither hoeffding nor bentkus ever rejects what hoeffding_bentkus does not: with looks,
        # they could show little that the others do not.
        names: tuple[str, ...] = WITH_LOOKS if every else ("fixed_sequence", "holm")
        if kind.name in ("hoeffding", "bentkus"):
            names = ("fixed_sequence",)
        found += [Variant(kind.name, name, True) for name in names]
    return found


class Draw(NamedTuple):
    """One sample: losses and counted examples of each risk, and the order learned elsewhere."""

    losses: list[FloatArray]
    counted: list[BoolArray | None]
    order: NDArray[np.int64]


class Job(NamedTuple):
    setting: str
    family: str
    chunk: int
    draws: int
    seed: int


def measure(draws: int, seed: int, workers: int) -> list[Row]:
    """One row per setting, family of losses, p-value, testing procedure, with and without looks."""
    jobs = [
        Job(setting, family, chunk, min(CHUNK, draws - chunk * CHUNK), seed)
        for setting in SETTINGS
        for family in FAMILIES
        for chunk in range(-(-draws // CHUNK))
    ]
    violations: dict[tuple[str, str], Counter[Variant]] = {
        (setting, family): Counter() for setting in SETTINGS for family in FAMILIES
    }
    for index, found in run_jobs(_count_violations, jobs, workers):
        violations[jobs[index].setting, jobs[index].family] += found
    tests = sum(len(variants(*key)) for key in violations)
    rows = []
    for (setting, family), counts in violations.items():
        for variant in variants(setting, family):
            low, high = clopper_pearson(counts[variant], draws)
            # With this many rows some intervals miss by chance; these, together, seldom do.
            joint_low, _ = clopper_pearson(counts[variant], draws, level=1.0 - 0.05 / tests)
            rows.append(
                {
                    "setting": setting,
                    "losses": family,
                    **variant._asdict(),
                    "asymptotic": PVALUES[variant.pvalue].asymptotic,
                    "draws": draws,
                    "violations": counts[variant],
                    "share": counts[variant] / draws,
                    "interval": [round(low, 5), round(high, 5)],
                    "joint_low": round(joint_low, 5),
                    "fails": low > DELTA,
                    "fails_jointly": joint_low > DELTA,
                }
            )
    return rows


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {
        "delta": DELTA,
        "settings": {
            name: {
                "n": setting.n,
                "alphas": setting.alphas,
                "multiples": setting.multiples,
                "shares": setting.shares,
                "acceptance": setting.acceptance,
            }
            for name, setting in SETTINGS.items()
        },
        "starts": STARTS,
        "ordering_examples": ORDERING,
    }


def _count_violations(job: Job) -> Counter[Variant]:
    remember_pure_functions()
    setting = SETTINGS[job.setting]
    name = f"{job.setting} {job.family} {job.chunk}"
    rng = np.random.default_rng([job.seed, zlib.crc32(name.encode())])
    draws = [_draw(setting, job.family, rng) for _ in range(job.draws)]
    found: Counter[Variant] = Counter()
    pvalues: dict[str, FloatArray] = {}
    for variant in variants(job.setting, job.family):
        if not variant.looks and variant.pvalue not in pvalues:
            pvalues[variant.pvalue] = _pvalues(draws, setting, variant.pvalue)
        for index, draw in enumerate(draws):
            if variant.looks:
                rejected = _test_early(draw, setting, variant)
            else:
                rejected = _test_at_once(pvalues[variant.pvalue][index], draw, variant)
            found[variant] += bool((rejected & setting.forbidden).any())
    return found


def _draw(setting: Setting, family: str, rng: np.random.Generator) -> Draw:
    losses, counted = _sample(setting, family, setting.n, rng)
    pilot, members = _sample(setting, family, ORDERING, rng)
    parts = [
        matrix if mask is None else matrix[mask] if mask.ndim == 1 else matrix * mask
        for matrix, mask in zip(pilot, members, strict=True)
    ]
    order = pareto_order(parts, setting.alphas, np.arange(LEVELS))
    return Draw(losses, counted, order)


def _sample(
    setting: Setting, family: str, size: int, rng: np.random.Generator
) -> tuple[list[FloatArray], list[BoolArray | None]]:
    """Losses [size, K] of each risk, and which examples count."""
    counted: list[BoolArray | None] = [None] * len(setting.alphas)
    if setting.shares is not None:
        label = rng.choice(len(setting.shares), size=size, p=setting.shares)
        counted = [label == group for group in range(len(setting.shares))]
    accepted = None
    if setting.acceptance is not None:
        accepted = rng.random((size, LEVELS)) < setting.acceptance
        counted = [accepted]
    losses = []
    for risks in setting.risks:
        # What is not accepted fails more often; it must not count.
        means = risks if accepted is None else np.where(accepted, risks, 0.5)
        if family == "0/1":
            losses.append((rng.random((size, LEVELS)) < means).astype(np.float64))
        else:
            losses.append(rng.beta(means, 1.0 - means, size=(size, LEVELS)))
    return losses, counted


def _pvalues(draws: Sequence[Draw], setting: Setting, name: str) -> FloatArray:
    """p-values [D, K] of all examples: the largest over the risks."""
    by_risk = []
    for risk, alpha in enumerate(setting.alphas):
        if draws[0].counted[risk] is None:  # All columns of all draws at once.
            columns = np.concatenate([draw.losses[risk] for draw in draws], axis=1)
            by_risk.append(PVALUES[name].from_losses(columns, alpha).reshape(-1, LEVELS))
            continue
        by_risk.append(np.stack([_masked_pvalues(draw, risk, alpha, name) for draw in draws]))
    return np.asarray(np.max(by_risk, axis=0))


def _masked_pvalues(draw: Draw, risk: int, alpha: float, name: str) -> FloatArray:
    from_losses = PVALUES[name].from_losses
    losses, counted = draw.losses[risk], draw.counted[risk]
    assert counted is not None
    if counted.ndim == 1:
        return from_losses(losses[counted], alpha)
    columns = [
        from_losses(column[mask][:, None], alpha)
        for column, mask in zip(losses.T, counted.T, strict=True)
    ]
    return np.concatenate(columns)


def _test_at_once(pvalues: FloatArray, draw: Draw, variant: Variant) -> BoolArray:
    further: dict[str, dict[str, Any]] = {
        "several_starts": {"starts": STARTS},
        "graphical": {"weights": _WEIGHTS, "transitions": _TRANSITIONS},
        "split": {"order": draw.order},
    }
    name = _PROCEDURE_NAMES.get(variant.procedure, variant.procedure)
    return PROCEDURES[name].test(pvalues, DELTA, **further.get(variant.procedure, {}))


def _test_early(draw: Draw, setting: Setting, variant: Variant) -> BoolArray:
    order = draw.order if variant.procedure == "split" else np.arange(LEVELS)
    test = SequentialTest(
        default_looks(setting.n, min(setting.alphas), DELTA, variant.pvalue),
        len(order),
        [RiskTarget(alpha, variant.pvalue) for alpha in setting.alphas],
        procedure=_PROCEDURE_NAMES.get(variant.procedure, variant.procedure),
    )
    while not test.finished:
        rows, columns = slice(test.seen, test.next_look), order[test.active]
        test.update(
            [losses[rows][:, columns] for losses in draw.losses],
            [
                mask if mask is None else mask[rows] if mask.ndim == 1 else mask[rows][:, columns]
                for mask in draw.counted
            ],
        )
    rejected = np.zeros(LEVELS, dtype=bool)
    rejected[order] = test.result().rejected
    return rejected


# A graph that is neither a chain nor Holm's: each level hands half to each of the next two.
_WEIGHTS = np.array([0.5, 0.25, 0.25, 0, 0, 0, 0, 0])
_TRANSITIONS = 0.5 * (np.eye(LEVELS, k=1) + np.eye(LEVELS, k=2))


def tables(record: Mapping[str, Any]) -> str:
    """The verdict, and the largest share of violations of each p-value and procedure."""
    rows = record["rows"]
    finite = [row for row in rows if not row["asymptotic"]]
    failed = [row for row in finite if row["fails"]]
    jointly = [row for row in finite if row["fails_jointly"]]
    worst = max(finite, key=lambda row: row["share"])
    verdict = (
        f"{len(finite)} tests with a finite-sample guarantee, {worst['draws']} draws each; "
        f"{len(failed)} of their 95 % intervals lie above delta = {DELTA:g}, {len(jointly)} after "
        f"correction for their number. The largest share is {worst['share']:.4f} "
        f"[{worst['interval'][0]:.4f}, {worst['interval'][1]:.4f}] (`{worst['pvalue']}`, "
        f"{worst['procedure']}, {worst['setting']}, {worst['losses']} losses, "
        f"{'looks' if worst['looks'] else 'no looks'})."
    )
    parts = [verdict]
    for setting in SETTINGS:
        body = []
        for family in FAMILIES:
            for pvalue in PVALUES:
                cells = [_cell(rows, setting, family, pvalue, *column) for column in _COLUMNS]
                if any(cells):
                    mark = " (asymptotic)" if PVALUES[pvalue].asymptotic else ""
                    body.append([f"`{pvalue}`{mark}, {family}", *cells])
        names = [_column_name(*column) for column in _COLUMNS]
        parts.append(f"**{setting}**\n\n{markdown(['p-value, losses', *names], body)}")
    return "\n\n".join(parts)


def _cell(
    rows: Sequence[Row], setting: str, family: str, pvalue: str, procedure: str, looks: bool
) -> str:
    wanted = (setting, family, pvalue, procedure, looks)
    for row in rows:
        if tuple(row[key] for key in _KEYS) == wanted:
            return f"{row['share']:.3f}" + (" **above**" if row["fails"] else "")
    return ""


_KEYS = ("setting", "losses", "pvalue", "procedure", "looks")


def plot(record: Mapping[str, Any]) -> Figure:
    """The share of violations of every test, against delta."""
    from matplotlib.figure import Figure

    groups = [
        (pvalue, family)
        for family in FAMILIES
        for pvalue, kind in PVALUES.items()
        if family == "0/1" or not kind.binary_only
    ]
    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = figure.subplots(1, len(SETTINGS), sharex=True, sharey=True)
    for axes, setting in zip(panels, SETTINGS, strict=True):
        for row in record["rows"]:
            if row["setting"] == setting:
                _plot_row(axes, row, groups.index((row["pvalue"], row["losses"])))
        axes.axvline(DELTA, color=figures.LIMIT, linewidth=1.2, linestyle="--")
        axes.set_title(setting, fontsize=11)
        axes.set_xlabel("share of violations")
        axes.set_xlim(left=-0.004)
        figures.clean(axes)
        for boundary in range(len(groups) - 1):
            axes.axhline(boundary + 0.5, color="#dddddd", linewidth=0.6, zorder=0)
    figures.list_rows(
        panels[0],
        [
            f"{pvalue}{' (asymptotic)' if PVALUES[pvalue].asymptotic else ''}\n{family} losses"
            for pvalue, family in groups
        ],
    )
    panels[-1].text(
        DELTA, 1.0, " δ", color=figures.LIMIT, va="top", transform=panels[-1].get_xaxis_transform()
    )
    handles = [
        axes.plot([], [], **_style(procedure, looks), label=_column_name(procedure, looks))[0]
        for procedure, looks in _COLUMNS
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    draws = record["rows"][0]["draws"]
    figure.suptitle(
        f"Certified although the risk is not below α: {draws} draws with 95 % intervals, "
        "levels exactly at α"
    )
    return figure


def _plot_row(axes: Axes, row: Mapping[str, Any], place: int) -> None:
    column = _COLUMNS.index((row["procedure"], row["looks"]))
    height = place + 0.8 * ((column + 0.5) / len(_COLUMNS) - 0.5)
    low, high = row["interval"]
    axes.plot([low, high], [height, height], color=figures.PALE, linewidth=1)
    axes.plot(row["share"], height, **_style(row["procedure"], row["looks"]))


def _style(procedure: str, looks: bool) -> dict[str, Any]:
    """Open marks are tests with looks."""
    return {
        "marker": dict(zip(AT_ONCE, "o>sDP^", strict=True))[procedure],
        "markersize": 4.5,
        "linestyle": "none",
        "color": figures.BLUE if looks else figures.INK,
        "markerfacecolor": "white" if looks else figures.INK,
    }


def _column_name(procedure: str, looks: bool) -> str:
    return procedure.replace("_", " ") + (", looks" if looks else "")


_COLUMNS = [(name, False) for name in AT_ONCE] + [(name, True) for name in WITH_LOOKS]
