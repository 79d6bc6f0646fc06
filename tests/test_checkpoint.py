"""Checkpoints are pruned exactly, and otherwise left as they are."""

import json
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import confprune
from confprune import checkpoint
from confprune.checkpoint import pruning, weights
from confprune.checkpoint.layout import read_layout
from confprune.levels import levels_of

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def small_blocks(monkeypatch):
    """A block holds three weights of the widest type."""
    monkeypatch.setattr(pruning, "BLOCK", 24)
    monkeypatch.setattr(weights, "_BLOCK", 24)


def stored(path):
    """The tensors of a file in the order in which they lie there."""
    tensors = load_file(path)
    return {tensor.name: tensors[tensor.name] for tensor in read_layout(path).tensors}


def metadata(path):
    with safe_open(path, framework="np") as file:
        return file.metadata()


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(actual[name]), bits(tensor)), name


def pruned_in_memory(tensors, sparsities, **options):
    """The slow, obvious reference: everything in memory."""
    weights = {n: t for n, t in tensors.items() if n.endswith(".weight") and t.dim() > 1}
    levels = levels_of(weights, sparsities, **options)
    return [
        tensors | {n: t.masked_fill(~levels.mask(n, j), 0) for n, t in weights.items()}
        for j in range(len(sparsities))
    ]


VALUES = {
    "smooth": lambda shape: torch.randn(shape),
    "ties": lambda shape: torch.randint(-3, 4, shape) / 2,
    "equal": lambda shape: torch.full(shape, -0.1),
    "extremes": lambda shape: torch.tensor([0.0, -0.0, 1e-45, 7e-6, 3e38, torch.inf, -1.0])[
        torch.randint(7, shape)
    ],
}


@pytest.mark.usefixtures("small_blocks")
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=60
)
@hypothesis.given(
    shapes=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 7), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=4,
    ).filter(lambda shapes: any(rows for rows, *_ in shapes)),
    values=st.sampled_from(sorted(VALUES)),
    sparsities=st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.77, 0.99]), min_size=1, unique=True),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 99),
)
def test_a_file_is_pruned_as_its_tensors_in_memory(folder, shapes, values, sparsities, scope, seed):
    torch.manual_seed(seed)
    tensors = {}
    for number, (rows, columns, dtype) in enumerate(shapes):
        tensors[f"{number}.weight"] = VALUES[values]((rows, columns)).to(dtype)
        tensors[f"{number}.bias"] = torch.randn(rows).to(dtype)
    source, out = folder / "model.safetensors", folder / "pruned-{sparsity}.safetensors"
    save_file(tensors, source)
    grid = sorted(sparsities)
    pruned = checkpoint.prune(source, out, sparsity=grid, scope=scope, progress=False)
    expected = pruned_in_memory(stored(source), grid, scope=scope)
    assert [path.name for path in pruned.paths] == [f"pruned-{s}.safetensors" for s in grid]
    for path, sparsity, count, tensors in zip(
        pruned.paths, grid, pruned.counts, expected, strict=True
    ):
        assert_same(stored(path), tensors)
        assert float(metadata(path)["confprune.sparsity"]) == sparsity
        if scope == "global":
            assert count == round(sparsity * pruned.total)


def test_a_file_is_pruned_as_the_network_would_be(folder):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(9, 5), nn.BatchNorm1d(5))
    save_file(model.state_dict(), folder / "model.safetensors")
    pruned = checkpoint.prune(
        folder / "model.safetensors", folder / "pruned.safetensors", sparsity=0.4, progress=False
    )
    levels = confprune.prune_levels(model, [0.4])
    expected = levels.prune(model, 0).state_dict()
    actual = load_file(folder / "pruned.safetensors")
    assert_same({name: actual[name] for name in expected}, expected)
    assert pruned.sparsities == (0.4,)
    assert pruned.counts == tuple(levels.counts.tolist())
    assert pruned.total == levels.total
    assert pruned.names == ("0.weight", "2.weight")


WAYS = [
    {"criterion": "lamp"},
    {"criterion": "magnitude(min_per_layer=9)", "scope": "layer"},
    {"criterion": "random(seed=3)", "scope": "row"},
    {"scope": "row"},
    {"pattern": "2x2"},
    {"pattern": "N:4"},
    {"pattern": "rows", "criterion": "erdos_renyi_kernel"},
]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_blocks")
def test_files_are_pruned_in_every_way_that_networks_are(folder, dtype, how):
    tensors = {"a.weight": torch.randn(8, 4).to(dtype), "b.weight": torch.rand(4, 12).to(dtype)}
    save_file(tensors, folder / "model.safetensors")
    out = folder / "pruned-{sparsity}.safetensors"
    pruned = checkpoint.prune(
        folder / "model.safetensors", out, sparsity=[0.25, 0.5], progress=False, **how
    )
    before = stored(folder / "model.safetensors")
    levels = levels_of(before, [0.25, 0.5], **how)
    assert pruned.sparsities == levels.sparsities
    assert pruned.counts == tuple(levels.counts.tolist())
    expected = pruned_in_memory(before, [0.25, 0.5], **how)
    for path, tensors, sparsity in zip(pruned.paths, expected, levels.sparsities, strict=True):
        assert path.name == f"pruned-{sparsity}.safetensors"
        assert_same(stored(path), tensors)


def test_sparsities_that_a_pattern_cannot_reach_become_those_it_can(folder):
    save_file({"fc.weight": torch.randn(4, 8)}, folder / "model.safetensors")
    pruned = checkpoint.prune(
        folder / "model.safetensors",
        folder / "pruned-{sparsity}.safetensors",
        sparsity=[0.45, 0.5],
        pattern="N:4",
        progress=False,
    )
    assert [path.name for path in pruned.paths] == ["pruned-0.5.safetensors"]
    assert pruned.counts == (16,)


def test_pruned_weights_are_plain_zeros(folder):
    weight = torch.tensor([[-1e-30, -0.0, 5.0, torch.inf]])
    save_file({"layer.weight": weight}, folder / "model.safetensors")
    checkpoint.prune(folder / "model.safetensors", folder / "pruned.safetensors", sparsity=0.5)
    pruned = load_file(folder / "pruned.safetensors")["layer.weight"]
    assert pruned.tolist() == [[0, 0, 5, torch.inf]]
    assert not pruned.signbit().any()


def written_by_hand(path, entries, metadata=None, padding=0):
    """A safetensors file whose tensors lie in this order behind a header of any length."""
    header, data = {}, b""
    for name, array in entries.items():
        raw = array.tobytes()
        dtype = {"f4": "F32", "i8": "I64", "u1": "U8"}[array.dtype.str[1:]]
        places = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": places}
        data += raw
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def parts(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.mark.parametrize("padding", range(8))
def test_everything_else_is_kept_to_the_bit(folder, padding):
    rng = np.random.default_rng(0)
    entries = {
        "z.flags": np.array([1], dtype="u1"),
        "b.weight": rng.standard_normal((4, 4)).astype("f4"),
        "codes": np.arange(3, dtype="u1"),
        "a.weight": rng.standard_normal((3, 5)).astype("f4"),
        "a.bias": np.array([np.nan, -0.0, 1e-45], dtype="f4"),
        "steps": np.arange(2, dtype="i8"),
    }
    source, out = folder / "model.safetensors", folder / "pruned.safetensors"
    written_by_hand(source, entries, {"format": "pt", "author": "Ünal"}, padding)
    checkpoint.prune(source, out, sparsity=0.5, progress=False)
    (before, data), (after, pruned) = parts(source), parts(out)
    assert list(after) == list(before)
    assert after.pop("__metadata__").items() > before.pop("__metadata__").items()
    assert after == before
    for name, entry in before.items():
        start, end = entry["data_offsets"]
        if not name.endswith("weight"):
            assert pruned[start:end] == data[start:end]
    kept = np.concatenate([entries["b.weight"].ravel(), entries["a.weight"].ravel()])
    kept[np.argsort(abs(kept), kind="stable")[: round(len(kept) / 2)]] = 0
    found = [pruned[slice(*before[name]["data_offsets"])] for name in ("b.weight", "a.weight")]
    assert b"".join(found) == kept.tobytes()
    assert len(pruned) == len(data)
    assert len(out.read_bytes()) % 8 == len(pruned) % 8


def test_ties_go_by_the_place_in_the_file(folder):
    entries = {"late.weight": np.ones((2, 2), "f4"), "early.weight": np.ones((2, 2), "f4")}
    written_by_hand(folder / "model.safetensors", entries)
    out = folder / "pruned.safetensors"
    pruned = checkpoint.prune(folder / "model.safetensors", out, sparsity=0.75, progress=False)
    assert pruned.names == ("late.weight", "early.weight")
    assert load_file(out)["late.weight"].tolist() == [[0, 0], [0, 0]]
    assert load_file(out)["early.weight"].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("before", [None, {}, {"format": "pt"}, {"author": "me"}])
def test_metadata_gain_the_sparsity_and_lose_what_is_no_longer_true(folder, before):
    weight = {"fc.weight": np.arange(1, 5, dtype="f4").reshape(2, 2)}
    source, out = folder / "model.safetensors", folder / "pruned.safetensors"
    old = {"confprune.certified": "true", "confprune.promise": "much"} if before else {}
    written_by_hand(source, weight, before and before | old)
    checkpoint.prune(source, out, sparsity=0.5, progress=False)
    # Hugging Face's loaders refuse metadata without a format.
    assert metadata(out) == {
        **(before or {"format": "pt"}),
        "confprune.sparsity": "0.5",
        "confprune.version": confprune.__version__,
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_does_not_grow_with_the_file(folder, monkeypatch, dtype):
    monkeypatch.setattr(pruning, "BLOCK", 1 << 16)
    monkeypatch.setattr(weights, "_BLOCK", 1 << 18)
    weight = torch.randn(3 << 20).to(dtype)
    weight = weight[: (6 << 20) // dtype.itemsize].view(1024, -1)
    save_file({"fc.weight": weight}, folder / "model.safetensors")
    source, out = folder / "model.safetensors", folder / "pruned-{sparsity}.safetensors"
    checkpoint.prune(source, out, sparsity=0.5, progress=False)
    tracemalloc.start()
    checkpoint.prune(source, out, sparsity=[0.2, 0.5, 0.7], scope="layer", progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


def test_several_sparsities_read_the_weights_once_for_all(folder, monkeypatch):
    save_file({"fc.weight": torch.randn(8, 8)}, folder / "model.safetensors")
    read, real = [], pruning.tensor_blocks
    monkeypatch.setattr(
        pruning,
        "tensor_blocks",
        lambda tensor, *rest: read.append(tensor.name) or real(tensor, *rest),
    )
    grid = [0.1, 0.2, 0.3]
    out = folder / "pruned-{sparsity}.safetensors"
    checkpoint.prune(folder / "model.safetensors", out, sparsity=grid, progress=False)
    assert read == ["fc.weight"]


def test_progress_reaches_its_end(folder, bars):
    for dtype in DTYPES:
        tensors = {
            "fc.weight": torch.randn(9, 9).to(dtype),
            "embed.weight": torch.randn(5, 2).to(dtype),
        }
        save_file(tensors, folder / "model.safetensors")
        out = folder / "pruned-{sparsity}.safetensors"
        checkpoint.prune(folder / "model.safetensors", out, sparsity=[0.0])
        checkpoint.prune(folder / "model.safetensors", out, sparsity=[0.3, 0.6])
    assert len(bars) == 8
    assert all(bar.n == bar.total for bar in bars)
    assert all(bar.unit == "B" for bar in bars)


# With a certificate.


@pytest.fixture
def certified(folder):
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))
    certificate = confprune.calibrate(
        model, torch.randn(300, 16), loss="disagreement", alpha=0.1, delta=0.1, progress=False
    )
    assert certificate.sparsity > 0
    return model, certificate


@pytest.mark.parametrize("reverse", [False, True])
def test_a_certificate_prunes_in_its_own_order(folder, certified, reverse, monkeypatch):
    model, certificate = certified
    state = model.state_dict()
    with torch.no_grad():
        for weight in (state["0.weight"], state["2.weight"]):
            weight.copy_((weight * 8).round() / 8)  # ties are the rule
    certificate = confprune.calibrate(
        model, torch.randn(300, 16), loss="disagreement", alpha=0.1, delta=0.1, progress=False
    )
    entries = {name: tensor.numpy() for name, tensor in state.items()}
    if reverse:
        entries = dict(reversed(entries.items()))
    written_by_hand(folder / "model.safetensors", entries)
    out = folder / "pruned.safetensors"
    pruned = checkpoint.prune(
        folder / "model.safetensors", out, certificate=certificate, progress=False
    )
    expected = certificate.prune(model).state_dict()
    actual = load_file(out)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert pruned.sparsities == (certificate.sparsity,)
    assert metadata(out)["confprune.certified"] == "true"


def test_sparsity_and_certificate_exclude_each_other(folder, certified):
    source, out = folder / "model.safetensors", folder / "pruned.safetensors"
    with pytest.raises(ValueError, match="either sparsity or certificate"):
        checkpoint.prune(source, out)
    save_file(certified[0].state_dict(), source)
    with pytest.raises(ValueError, match="go with sparsity"):
        checkpoint.prune(source, out, certificate=certified[1], include=["0.weight"])


def test_what_is_no_certificate_is_refused(folder, certified):
    checkpoint.save(certified[0], folder / "model.safetensors")
    with pytest.raises(TypeError, match=r"got str: read a file with confprune.Certificate.load"):
        checkpoint.prune(folder / "model.safetensors", folder / "out", certificate="run.json")
    assert not (folder / "out").exists()


def test_a_certificate_of_nothing_prunes_nothing(folder):
    model = nn.Linear(16, 4)
    data = (torch.randn(300, 16), torch.randint(0, 4, (300,)))
    certificate = confprune.calibrate(
        model, data, loss="error", alpha=0.05, delta=0.1, progress=False
    )
    checkpoint.save(model, folder / "model.safetensors")
    target = folder / "none.safetensors"
    with pytest.raises(ValueError, match="certifies no sparsity"):
        checkpoint.prune(folder / "model.safetensors", target, certificate=certificate)
    assert not target.exists()
