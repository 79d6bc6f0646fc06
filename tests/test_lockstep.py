"""The stand-in for a GPU, on which the CUDA kernels are tested: what it computes and notices."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lockstep import build, sanitizer_runtime

SEEDS = range(6)


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("lockstep") / "mistakes.cpp"
    return build([source], tmp_path_factory.mktemp("lockstep") / "mistakes")


def run(program: Path, mistake: str, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, mistake, str(seed)], capture_output=True, text=True, timeout=60, check=False
    )


def test_blocks_and_warps_work_together_in_any_order(mistakes: Path) -> None:
    assert [run(mistakes, "none", seed).returncode for seed in SEEDS] == [0] * len(SEEDS)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("left", "left while others wait"),
        ("barriers", "at different barriers"),
        ("vote", "wait for ever"),
        ("half", "a part of a warp"),
        ("apart", "different operations"),
        ("forever", "wait for ever"),
        ("shared", "more shared memory"),
        ("threads", "whole warps"),
        ("empty", "an empty grid"),
        ("tall", "larger grid"),
        ("between", "not aligned to 16"),
    ],
)
def test_undefined_behaviour_is_told(mistakes: Path, mistake: str, message: str) -> None:
    assert message in run(mistakes, mistake, 0).stderr


@pytest.mark.parametrize("mistake", ["early", "others", "race", "between barriers"])
def test_what_depends_on_luck_shows(mistakes: Path, mistake: str) -> None:
    assert any(run(mistakes, mistake, seed).returncode != 0 for seed in SEEDS)


def test_what_nothing_orders_is_found_whatever_the_order(tmp_path: Path) -> None:
    sanitizer_runtime("thread")
    source = Path(__file__).with_name("lockstep") / "mistakes.cpp"
    program = build([source], tmp_path / "mistakes", "-fsanitize=thread")
    assert run(program, "none", 0).returncode == 0
    for mistake in ("race", "others", "between barriers"):
        assert "data race" in run(program, mistake, 0).stderr
