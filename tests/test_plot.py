"""The picture of a certificate: what it shows, and what making it leaves alone."""

from __future__ import annotations

import builtins
import dataclasses
import sys

import numpy as np
import pytest
from certificates import certify, controlled, of_parts, part

from confprune.certificate import Certificate, Looks
from confprune.certificate.plot import plot_certificate


def make_certificate(risks: list[float], certified: int, alpha: float = 0.05) -> Certificate:
    levels = len(risks)
    return Certificate(
        sparsities=tuple(j / levels for j in range(levels)),
        alpha=alpha,
        delta=0.1,
        n=500,
        loss="disagreement",
        pvalue="convex",
        procedure="fixed_sequence",
        risks=tuple(risks),
        pvalues=tuple(0.01 if j < certified else 1.0 for j in range(levels)),
        bounds=tuple(min(1.0, risk + 0.01) for risk in risks),
        rejected=tuple(j < certified for j in range(levels)),
    )


CURVE = [0.0, 0.0, 0.01, 0.02, 0.03, 0.2, 0.6, 0.9]


def lines_of(figure) -> dict[str, np.ndarray]:
    return {line.get_label(): np.array(line.get_data()) for line in figure.axes[0].lines}


def texts_of(figure) -> str:
    return "\n".join(text.get_text() for text in figure.axes[0].texts)


def test_the_picture_shows_risk_bound_alpha_and_the_certified_point():
    figure = plot_certificate(make_certificate(CURVE, 5))
    lines = lines_of(figure)
    sparsity = 100 * np.arange(8) / 8
    np.testing.assert_allclose(
        lines["risk on the calibration data: certified"], [sparsity[:5], CURVE[:5]]
    )
    np.testing.assert_allclose(
        lines["risk on the calibration data: not certified"], [sparsity[5:], CURVE[5:]]
    )
    bound = lines["upper bound on the risk, each level at 90 %"]
    np.testing.assert_allclose(bound[1], np.array(CURVE) + 0.01)
    assert "50.0 % certified\nrisk 0.0300, bound 0.0400" in texts_of(figure)
    assert "α = 0.05" in texts_of(figure)
    axes = figure.axes[0]
    title = axes.get_title(loc="left").replace("\n", " ")
    assert title.startswith("With probability at least 90 %, the network pruned to 50.0 % sparsity")
    assert "%" in axes.get_xlabel()
    assert "(0 to 1)" in axes.get_ylabel()


def several(count: int, levels: int = 8, **fields) -> Certificate:
    """Groups of which only the last fails, at the last level; before that it has no loss."""
    sums = [[0.0] * (levels - 2) + [1 + p % 3, 1 + p % 3] for p in range(count)]
    sums[-1][-2:] = [0, 90]
    return of_parts(*(part(one, 100, group=str(p)) for p, one in enumerate(sums)), **fields)


def styles_of(axes) -> list[tuple]:
    return [
        (line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "white")
        for line in axes.lines
        if not line.get_label().startswith("_") and len(line.get_xdata())
    ]


def test_a_few_risks_are_drawn_relative_to_their_alphas_each_in_its_style():
    certificate = of_parts(
        part([0, 5, 20], 300, loss="disagreement", alpha=0.1),
        part([0, 1, 30], 300, loss="harm", alpha=0.03),
        part([0, 3, 6], 300, loss="error", alpha=0.2),
        part([0, 1, 2], 300, loss="dice", alpha=0.4),
        n=300,
    )
    figure = plot_certificate(certificate, test_risks=[0, 0.03, 0.06])
    assert len(figure.axes) == 1
    lines = lines_of(figure)
    np.testing.assert_allclose(lines["harm (binds)"][1], np.array([0, 1, 30]) / 300 / 0.03)
    np.testing.assert_allclose(lines["error"][1], np.array([0, 3, 6]) / 300 / 0.2)
    np.testing.assert_allclose(lines["what binds, on held-out data"][1], [0, 1, 2])
    np.testing.assert_allclose(lines["upper bound on what binds, each level at 90 %"][1],
                               np.array(certificate.bounds) / 0.03)  # fmt: skip
    styles = styles_of(figure.axes[0])
    assert len(set(styles)) == len(styles) >= 6
    assert "α of each risk" in texts_of(figure)
    assert "50.0 % certified\nbinding: harm\nrisk 0.0033, bound 0.0533" in texts_of(figure)
    assert figure.axes[0].get_ylabel() == "Risk relative to its α"


def test_of_many_risks_the_one_that_binds_stands_out_and_each_has_a_row():
    certificate = several(10)
    figure = plot_certificate(certificate)
    main, rows = figure.axes
    lines = {line.get_label(): line for line in main.lines}
    grey = lines["the other 9 risks"]
    assert lines["disagreement, group 9 (binds)"].get_linewidth() > 2 * grey.get_linewidth()
    assert sum(line.get_color() == grey.get_color() for line in main.lines) == 9
    names = [label.get_text() for label in rows.get_yticklabels()]
    assert names[0] == "binds ▸ group 9"
    assert [label.get_fontweight() for label in rows.get_yticklabels()].count("bold") == 1
    bounds, risks = (np.array(line.get_xdata()) for line in rows.lines[:2])
    assert (np.diff(bounds) >= 0).all()
    at = certificate.level
    by_name = {f"group {part.group}": part for part in certificate.parts}
    for name, bound, risk in zip(names, bounds, risks, strict=True):
        part_of_row = by_name[name.removeprefix("binds ▸ ")]
        assert (bound, risk) == (part_of_row.bounds[at] / 0.1, part_of_row.risks[at] / 0.1)
    assert rows.get_title(loc="left") == "Each risk at 77.8 % sparsity"
    assert figure.get_suptitle().startswith("With probability at least 90 %")


def test_of_too_many_risks_the_closest_to_their_alpha_have_a_row():
    certificate = several(60)
    # The one that binds has a row, however far from its alpha it is at the certified level.
    assert certificate.binding is certificate.parts[-1]
    rows = plot_certificate(certificate).axes[1]
    names = [label.get_text() for label in rows.get_yticklabels()]
    assert len(names) == 24
    assert "binds ▸ group 59" in names
    assert rows.get_title(loc="left").startswith("24 of 60 risks at")


def test_where_nothing_is_certified_the_rows_are_of_the_first_level():
    certificate = of_parts(*(part([20 + p], 100, group=str(p)) for p in range(6)))
    main, rows = plot_certificate(certificate).axes
    assert rows.get_title(loc="left") == "Each risk at 50.0 % sparsity"
    assert rows.get_xlim()[1] <= 4
    assert not any("certified" in text.get_text() for text in main.texts)


def test_early_looks_show_the_examples_used_by_each_level():
    looks = Looks((50, 200), (0.05, 0.05), (50, 200), 250, 0.375, "given")
    figure = plot_certificate(certify([0, 60], looks=looks))
    main, used = figure.axes
    assert [bar.get_height() for bar in used.patches] == [50, 200]
    assert used.texts[0].get_text() == "37.5 % of the evaluations saved"
    assert (main.get_xlabel(), used.get_xlabel()) == ("", "Sparsity (% of the prunable weights)")
    assert used.get_xlim() == main.get_xlim()
    single = dataclasses.replace(looks, seen=(50,))
    assert plot_certificate(certify([0], looks=single)).axes[1].patches[0].get_height() == 50
    # One look is none early.
    once = Looks((200,), (0.1,), (200,), 200, 0, "given")
    assert len(plot_certificate(certify([0], looks=once)).axes) == 1


def test_the_acceptance_rate_has_its_panel():
    looks = Looks((50, 200), (0.05, 0.05), (50, 200), 250, 0.375, "given")
    certificate = certify([0, 60], accept="sure", acceptance=[0.75, 0.5], looks=looks)
    figure = plot_certificate(certificate)
    _, accepted, used = figure.axes
    np.testing.assert_allclose(accepted.lines[0].get_ydata(), [75, 50])
    assert accepted.texts[0].get_text() == "75.0 % accepted at the certified level"
    assert accepted.get_xlabel() == ""
    assert used.get_xlabel().startswith("Sparsity")
    nothing = certify([60], accept="sure", acceptance=[0.75])
    assert not plot_certificate(nothing).axes[1].texts


@pytest.mark.parametrize("guarantee", ["expectation", "monotone"])
def test_other_guarantees_are_told_apart(guarantee):
    figure = plot_certificate(controlled([0, 5, 60], guarantee))
    axes = figure.axes[0]
    assert ("With probability" in axes.get_title(loc="left")) == (guarantee == "monotone")
    assert "monotonised" in axes.get_ylabel()
    labels = lines_of(figure)
    assert "monotonised risk on the calibration data: certified" in labels
    assert any("upper bound" in label for label in labels) == (guarantee == "monotone")
    assert ("bound" in texts_of(figure)) == (guarantee == "monotone")


def test_levels_that_were_not_tested_leave_gaps():
    nan = float("nan")
    gaps = {"risks": [0, nan, 0.3], "pvalues": [0, nan, 1], "bounds": [0.05, nan, 0.4]}
    figure = plot_certificate(dataclasses.replace(certify([0, 0, 60]), rejected=[1, 0, 0], **gaps))
    lines = lines_of(figure)
    assert lines["risk on the calibration data: certified"].shape == (2, 1)
    assert lines["risk on the calibration data: not certified"].shape == (2, 1)


def test_the_window_is_around_alpha():
    low, high = plot_certificate(make_certificate(CURVE, 5)).axes[0].get_ylim()
    assert low < 0 < 0.05 < high < 0.5


def test_lines_differ_in_more_than_colour():
    figure = plot_certificate(make_certificate(CURVE, 5), test_risks=CURVE)
    styles = [
        (line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "white")
        for line in figure.axes[0].lines
    ]
    assert len(set(styles)) == len(styles)


def test_held_out_risks_are_drawn_over_it():
    test_risks = [*CURVE[:-1], float("nan")]
    lines = lines_of(plot_certificate(make_certificate(CURVE, 5), test_risks=test_risks))
    np.testing.assert_array_equal(lines["risk on held-out data"][1], test_risks)
    with pytest.raises(ValueError, match="test_risks has 3 values for 8 sparsities"):
        plot_certificate(make_certificate(CURVE, 5), test_risks=CURVE[:3])


@pytest.mark.parametrize(
    ("risks", "certified", "alpha"),
    [
        ([0.2, 0.3], 0, 0.05),
        ([0.0], 1, 0.05),
        ([0.01, 0.3, 0.5, 0.9], 1, 0.05),
        ([0.11, 0.9, 0.9, 0.9], 1, 0.12),
        ([0.0, 0.0, 0.0, 0.0], 4, 0.9),
        ([0.0, 0.0, 0.0, 0.5], 4, 0.6),
        (list(np.linspace(0, 1, 1000)), 900, 0.95),
    ],
)
def test_every_outcome_can_be_drawn_with_its_texts_inside(risks, certified, alpha):
    figure = plot_certificate(make_certificate(risks, certified, alpha))
    figure.canvas.draw()
    window = figure.axes[0].get_window_extent()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert window.x0 - 5 <= box.x0 < box.x1 <= window.x1 + 5
        assert box.y1 <= window.y1 + 5
    assert ("certified\n" in texts_of(figure)) == bool(certified)


@pytest.mark.parametrize("count", [2, 4, 12, 60])
@pytest.mark.parametrize("levels", [3, 20])
def test_the_texts_of_several_risks_lie_inside(count, levels):
    figure = plot_certificate(several(count, levels))
    figure.canvas.draw()
    window = figure.axes[0].get_window_extent()
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert window.x0 - 5 <= box.x0 < box.x1 <= window.x1 + 5
        assert box.y1 <= window.y1 + 5
    assert figure.get_tightbbox().x1 * figure.dpi <= figure.bbox.x1 + 5


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_extension_decides_the_format(tmp_path, suffix, start):
    path = tmp_path / f"risk.{suffix}"
    make_certificate(CURVE, 5).plot(path)
    assert path.read_bytes().startswith(start)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_name_without_an_extension_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path .*risk has no extension: name a format, as in"):
        make_certificate(CURVE, 5).plot(tmp_path / "risk")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_drawing_leaves_the_old_file(tmp_path):
    path = tmp_path / "risk.unknown"
    path.write_text("old")
    with pytest.raises(ValueError, match="unknown"):
        plot_certificate(make_certificate(CURVE, 5), path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_pyplot_is_not_touched(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    make_certificate(CURVE, 5).plot()


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        make_certificate(CURVE, 5).plot()
