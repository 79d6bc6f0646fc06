"""The picture of a certificate: what it shows, and what making it leaves alone."""

from __future__ import annotations

import builtins
import sys

import numpy as np
import pytest

from confprune.certificate import Certificate
from confprune.plot import plot_certificate


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


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_extension_decides_the_format(tmp_path, suffix, start):
    path = tmp_path / f"risk.{suffix}"
    make_certificate(CURVE, 5).plot(path)
    assert path.read_bytes().startswith(start)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


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
    with pytest.raises(ImportError, match=r"pip install confprune\[plot\]"):
        make_certificate(CURVE, 5).plot()
