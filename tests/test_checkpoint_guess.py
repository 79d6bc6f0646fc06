"""Files pruned in one read by a guessed cut: where it is guessed right, wrong, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

import confprune
from confprune import checkpoint
from confprune.checkpoint import guess, guessed, pruning, task, weights
from confprune.checkpoint.guess import Bracket, Point
from confprune.checkpoint.guessed import guessed_masks
from confprune.checkpoint.layout import read_layout
from confprune.checkpoint.weights import StoredWeights
from confprune.levels import levels_of

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DRAWS = {
    "normal": torch.randn,
    "long tails": lambda *shape: torch.randn(*shape) ** 9,
    "with ties": lambda *shape: torch.randint(-40, 41, shape).float(),
    "half are zero": lambda *shape: torch.randn(*shape).relu_(),
    "all equal": lambda *shape: torch.full(shape, -0.5),
    "rows of different size": lambda *shape: torch.randn(*shape) * torch.rand(shape[0], 1),
    "tiny": lambda *shape: torch.randn(*shape) * 1e-40,
    "infinite at times": lambda *shape: torch.randn(*shape) / torch.randint(0, 9, shape),
}
NEVER = Bracket(Point(1, 0), Point(2, 0), Point(3, 0))


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(guess, "_LEAST", 1)
    monkeypatch.setattr(pruning, "BLOCK", 1 << 12)
    monkeypatch.setattr(weights, "_BLOCK", 1 << 16)
    monkeypatch.setattr(weights, "_PIECE", 32)
    monkeypatch.setattr(weights, "_DISTANCE", 4)


@pytest.fixture
def guesses(monkeypatch):
    """What became of each guess: how many weights were wrong; None if all may be, or no guess."""
    outcomes = []

    def noted(*arguments):
        masks = guessed_masks(*arguments)
        if masks is None:
            outcomes.append(None)
            return None
        corrections = masks.corrections

        def noting():
            found = corrections()
            outcomes.append(None if found is None else sum(len(c.places) for c in found))
            return found

        masks.corrections = noting
        return masks

    monkeypatch.setattr(task, "guessed_masks", noted)
    return outcomes


def drawn(how, dtype=torch.float32):
    torch.manual_seed(0)
    return {f"w{i}.weight": DRAWS[how](70, 40 + i).to(dtype) for i in range(9)}


def stored(path, tensors):
    save_file(tensors, path)
    return StoredWeights(read_layout(path).tensors, tqdm(disable=True, total=0))


def check_pruned(folder, tensors, sparsity, scope="global"):
    """Prune a file with these tensors, and hold it to what is pruned in memory."""
    source, out = folder / "model.safetensors", folder / "pruned.safetensors"
    save_file(tensors, source)
    checkpoint.prune(source, out, sparsity=sparsity, scope=scope, progress=False)
    in_order = {tensor.name: tensors[tensor.name] for tensor in read_layout(source).tensors}
    levels = levels_of(in_order, [sparsity], scope=scope)
    pruned = load_file(out)
    for name, tensor in in_order.items():
        expected = tensor.masked_fill(~levels.mask(name, 0), 0)
        assert torch.equal(pruned[name].view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 1e-4, 0.5, 0.9999])
@pytest.mark.parametrize("how", DRAWS)
def test_a_guess_prunes_what_is_pruned_in_memory(tmp_path, guesses, how, sparsity, dtype):
    check_pruned(tmp_path, drawn(how, dtype), sparsity)
    (wrong,) = guesses
    assert wrong is not None
    # About 27,000 weights, of which the sample has a quarter.
    assert wrong < 1500


@pytest.mark.parametrize("how", ["normal", "with ties"])
def test_each_layer_has_its_own_guess(tmp_path, guesses, how):
    check_pruned(tmp_path, drawn(how), 0.4, scope="layer")
    assert len(guesses) == 9
    assert None not in guesses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [(0, 0, 0), (0, 1e-6, 2e-6), (0.1, 0.2, 0.3), (1, 2, 3)], ids=str)
def test_a_wrong_guess_is_noticed_and_costs_only_time(tmp_path, monkeypatch, guesses, ends, dtype):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bracket = Bracket(*(Point(int(torch.tensor(e, dtype=dtype).view(integer)), 17) for e in ends))
    monkeypatch.setattr(guessed, "guess", lambda *_: bracket)
    check_pruned(tmp_path, drawn("normal", dtype), 0.5)
    assert guesses == [None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cut_may_be_anywhere_in_its_bracket(tmp_path, monkeypatch, guesses, dtype):
    everything = Bracket(Point(0, 0), Point(0, 0), Point((1 << (8 * dtype.itemsize - 1)) - 1, 0))
    monkeypatch.setattr(guessed, "guess", lambda *_: everything)
    for sparsity in (0.0, 0.3, 1.0 - 1e-9):
        check_pruned(tmp_path, drawn("with ties", dtype), sparsity)
    assert guesses[0] == 0
    assert 0 < guesses[1] < guesses[2]


def test_points_among_equal_weights_split_blocks(tmp_path, monkeypatch, guesses):
    key = int(torch.tensor(-0.5).abs().view(torch.int32))
    tensors = drawn("all equal")
    total = sum(tensor.numel() for tensor in tensors.values())
    for middle in (0, 1, 5000, 5001, total - 1, total):
        bracket = Bracket(Point(key, 0), Point(key, middle), Point(key, total))
        monkeypatch.setattr(guessed, "guess", lambda *_, b=bracket: b)
        check_pruned(tmp_path, tensors, 0.4)
        assert guesses[-1] == abs(middle - round(0.4 * total))
    narrow = Bracket(Point(key, 4000), Point(key, 4001), Point(key, 4002))
    monkeypatch.setattr(guessed, "guess", lambda *_: narrow)
    check_pruned(tmp_path, tensors, 4001 / total)
    assert guesses[-1] == 0
    check_pruned(tmp_path, tensors, 4003 / total)
    assert guesses[-1] is None


def test_what_would_be_too_much_to_remember_is_not_guessed(tmp_path, monkeypatch, guesses):
    monkeypatch.setattr(guessed, "_MOST", 10)
    check_pruned(tmp_path, drawn("normal"), 0.5)
    assert guesses == [None]


def test_more_than_expected_is_not_remembered(tmp_path, monkeypatch, guesses):
    monkeypatch.setattr(guessed, "_MOST", 100)
    wide = Bracket(Point(0, 0), Point(1, 0), Point(1 << 30, 0))
    monkeypatch.setattr(guessed, "guess", lambda *_: wide)
    check_pruned(tmp_path, drawn("normal"), 0.5)
    assert guesses == [None]


def test_weights_of_several_types_are_not_guessed(tmp_path, guesses):
    check_pruned(tmp_path, drawn("normal") | {"d.weight": torch.randn(30, 30).double()}, 0.5)
    assert guesses == [None]


def test_tensors_smaller_than_a_piece_are_not_guessed(tmp_path, guesses):
    check_pruned(tmp_path, {"fc.weight": torch.randn(3, 4)}, 0.5)
    assert guesses == [None]


def test_several_sparsities_are_not_guessed(tmp_path, guesses):
    save_file(drawn("normal"), tmp_path / "model.safetensors")
    out = tmp_path / "pruned-{sparsity}.safetensors"
    checkpoint.prune(tmp_path / "model.safetensors", out, sparsity=[0.2, 0.4], progress=False)
    assert guesses == []


def test_a_sample_is_spread_over_all_weights(tmp_path):
    tensors = drawn("normal")
    weights = stored(tmp_path / "w.safetensors", tensors)
    sample = weights.sample(torch.float32)
    in_order = [tensors[tensor.name] for tensor in read_layout(tmp_path / "w.safetensors").tensors]
    everything = torch.cat([tensor.flatten() for tensor in in_order]).abs().view(torch.int32)
    for keys, place in zip(sample.keys, sample.places, strict=True):
        assert np.array_equal(keys, everything[place : place + 32].numpy())
    assert np.diff(sample.places).min() >= 32
    assert np.diff(sample.places).max() < 300
    again = weights.sample(torch.float32)
    assert np.array_equal(sample.places, again.places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (33, 21), (69, 47)])
def test_nan_is_named_wherever_it_is(tmp_path, place, dtype):
    tensors = drawn("normal", dtype)
    tensors["w8.weight"][place] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    out = tmp_path / "pruned.safetensors"
    with pytest.raises(ValueError, match=r"tensor 'w8\.weight' in .*model\.safetensors holds NaN"):
        checkpoint.prune(tmp_path / "model.safetensors", out, sparsity=0.5, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_that_is_cut_short_is_named(tmp_path):
    weights = stored(tmp_path / "w.safetensors", drawn("normal"))
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=r"'w\d\.weight' cannot be read: .*w\.safetensors"):
        weights.sample(torch.float32)


@pytest.mark.parametrize("right", [True, False])
def test_progress_reaches_its_end(tmp_path, monkeypatch, bars, right):
    if not right:
        monkeypatch.setattr(guessed, "guess", lambda *_: NEVER)
    save_file(drawn("normal"), tmp_path / "model.safetensors")
    checkpoint.prune(tmp_path / "model.safetensors", tmp_path / "out.safetensors", sparsity=0.5)
    size = (tmp_path / "model.safetensors").stat().st_size
    (bar,) = bars
    assert bar.n == bar.total
    assert (bar.n < 1.1 * size) == right


def test_copies_of_a_tied_weight_are_corrected_too(tmp_path, guesses):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4))
    certificate = confprune.calibrate(
        model, torch.randn(300, 64), loss="disagreement", alpha=0.1, delta=0.1, progress=False
    )
    state = model.state_dict()
    save_file(state | {"copy": state["0.weight"].clone()}, tmp_path / "model.safetensors")
    out = tmp_path / "pruned.safetensors"
    checkpoint.prune(tmp_path / "model.safetensors", out, certificate=certificate, progress=False)
    pruned, expected = load_file(out), certificate.prune(model).state_dict()
    assert all(torch.equal(pruned[name], expected[name]) for name in expected)
    assert torch.equal(pruned["copy"], expected["0.weight"])
    (wrong,) = guesses
    assert wrong
