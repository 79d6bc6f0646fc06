"""One cut in one read of stored weights: where it is guessed right, wrong, or not at all."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from confprune.checkpoint import guess
from confprune.checkpoint.guess import select_one
from confprune.checkpoint.layout import read_layout
from confprune.checkpoint.weights import StoredWeights
from confprune.selection import select

DRAWS = {
    "normal": torch.randn,
    "long tails": lambda *shape: torch.randn(*shape) ** 9,
    "with ties": lambda *shape: torch.randint(-40, 41, shape).float(),
    "half are zero": lambda *shape: torch.randn(*shape).relu_(),
    "rows of different size": lambda *shape: torch.randn(*shape) * torch.rand(shape[0], 1),
    "tiny": lambda *shape: torch.randn(*shape) * 1e-40,
}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(guess, "_LEAST", 1)
    monkeypatch.setattr("confprune.checkpoint.weights._BLOCK", 1 << 16)
    monkeypatch.setattr("confprune.checkpoint.weights._PIECE", 32)
    monkeypatch.setattr("confprune.checkpoint.weights._DISTANCE", 4)


def stored(path, tensors):
    save_file(tensors, path)
    return StoredWeights(read_layout(path).tensors, tqdm(disable=True, total=0))


def drawn(how, dtype=torch.float32):
    torch.manual_seed(0)
    return {f"w{i}": DRAWS[how](70, 40 + i).to(dtype) for i in range(9)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1e-4, 0.1, 0.5, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("how", DRAWS)
def test_a_guess_finds_the_cut_or_nothing(tmp_path, how, share, dtype):
    weights = stored(tmp_path / "w.safetensors", drawn(how, dtype))
    count = round(share * weights.total)
    expected = select(weights, [count])
    found = select_one(weights, count, dtype)
    if found is None:
        assert share in (0.9999, 1.0)
        return
    for name in ("counts", "keys", "ties", "equal"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


@pytest.mark.parametrize("guessed", [(0, 0), (0, 10), (1 << 30, (1 << 30) + 5)])
def test_a_wrong_guess_is_noticed(tmp_path, monkeypatch, guessed):
    monkeypatch.setattr(guess, "_guess", lambda *_: (*guessed, 0.01))
    weights = stored(tmp_path / "w.safetensors", drawn("normal"))
    assert select_one(weights, weights.total // 2, torch.float32) is None


def test_too_wide_a_guess_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(guess, "_MOST", 10)
    monkeypatch.setattr(guess, "collect_keys", None)
    weights = stored(tmp_path / "w.safetensors", drawn("normal"))
    assert select_one(weights, weights.total // 2, torch.float32) is None


def test_more_keys_than_expected_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(guess, "_MOST", 100)
    monkeypatch.setattr(guess, "_guess", lambda *_: (0, 1 << 30, 0.001))
    weights = stored(tmp_path / "w.safetensors", drawn("normal"))
    assert select_one(weights, weights.total // 2, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_read_of_narrow_weights_needs_no_guess(tmp_path, dtype):
    weights = stored(tmp_path / "w.safetensors", drawn("normal", dtype))
    assert select_one(weights, 100, dtype) is None


def test_weights_of_several_types_are_not_guessed(tmp_path):
    tensors = drawn("normal") | {"double": torch.randn(30, 30, dtype=torch.float64)}
    weights = stored(tmp_path / "w.safetensors", tensors)
    assert select_one(weights, 100, torch.float64) is None


def test_tensors_smaller_than_a_piece_are_not_guessed(tmp_path):
    weights = stored(tmp_path / "w.safetensors", {"w": torch.randn(3, 4)})
    assert select_one(weights, 6, torch.float32) is None


@pytest.mark.parametrize("place", [(0, 0), (69, 47)])
def test_nan_is_met_wherever_it_is(tmp_path, place):
    tensors = drawn("normal")
    tensors["w8"][place] = torch.nan
    weights = stored(tmp_path / "w.safetensors", tensors)
    with pytest.raises(ValueError, match="NaN"):
        select_one(weights, weights.total // 2, torch.float32)


def test_infinities_survive(tmp_path):
    tensors = drawn("normal")
    tensors["w3"][5] = torch.inf
    weights = stored(tmp_path / "w.safetensors", tensors)
    found = select_one(weights, weights.total // 2, torch.float32)
    assert found is not None
    assert found.keys.tolist() == select(weights, [weights.total // 2]).keys.tolist()


def test_a_file_that_is_cut_short_is_named(tmp_path):
    weights = stored(tmp_path / "w.safetensors", drawn("normal"))
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=r"'w\d' cannot be read: .*w\.safetensors"):
        select_one(weights, 1000, torch.float32)
