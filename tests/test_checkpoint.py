"""Safetensors files are pruned exactly, and otherwise left as they are."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import confprune
from confprune import checkpoint

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@hypothesis.given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.floats(0, 0.99),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 99),
)
def test_a_file_is_pruned_as_the_network_would_be(folder, shapes, dtype, sparsity, scope, seed):
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(*shape) for shape in shapes).to(dtype)
    source, destination = folder / "model.safetensors", folder / "pruned.safetensors"
    save_file(model.state_dict(), source)
    levels = checkpoint.prune(source, destination, sparsity=sparsity, scope=scope)
    expected = confprune.prune_levels(model, [sparsity], scope=scope).prune(model, 0).state_dict()
    pruned = load_file(destination)
    assert pruned.keys() == expected.keys()
    assert all(torch.equal(pruned[name], expected[name]) for name in expected)
    assert levels.sparsities == (sparsity,)


def test_pruned_weights_are_plain_zeros(folder):
    weight = torch.tensor([[-1e-30, -0.0, 5.0, torch.inf]])
    save_file({"layer.weight": weight}, folder / "model.safetensors")
    checkpoint.prune(folder / "model.safetensors", folder / "pruned.safetensors", sparsity=0.5)
    pruned = load_file(folder / "pruned.safetensors")["layer.weight"]
    assert pruned.tolist() == [[0, 0, 5, torch.inf]]
    assert not pruned.signbit().any()


def test_everything_else_is_kept_to_the_bit(folder):
    odd = {
        "layer.bias": torch.tensor([torch.nan, -0.0, 1e-45]),
        "layer.codes": torch.arange(5, dtype=torch.uint8),
        "layer.scale": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "flag": torch.tensor(True),
    }
    save_file({"layer.weight": torch.randn(4, 4), **odd}, folder / "model.safetensors")
    checkpoint.prune(folder / "model.safetensors", folder / "pruned.safetensors", sparsity=0.5)
    pruned = load_file(folder / "pruned.safetensors")
    for name, tensor in odd.items():
        assert pruned[name].dtype == tensor.dtype
        assert torch.equal(bits(pruned[name]), bits(tensor))


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    "name",
    ["embed_tokens", "word_embeddings", "wte", "shared", "final_norm", "ln_f", "bn1", "LayerNorm"],
)
def test_embeddings_and_norms_are_not_layers(name):
    assert not checkpoint._names_a_layer(f"model.{name}.weight")


@pytest.mark.parametrize("name", ["0", "fc1", "q_proj", "lm_head", "embeddings.patch.projection"])
def test_layers_are_told_by_their_own_name(name):
    assert checkpoint._names_a_layer(f"{name}.weight")
    assert not checkpoint._names_a_layer(f"{name}.bias")


def test_sparsity_and_certificate_exclude_each_other(folder):
    with pytest.raises(ValueError, match="either sparsity or certificate"):
        checkpoint.prune(folder / "model.safetensors", folder / "pruned.safetensors")


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


def test_written_files_have_the_rights_of_any_new_file(folder):
    (folder / "any").write_text("")
    save_file({"layer.weight": torch.randn(4, 4)}, folder / "model.safetensors")
    checkpoint.prune(folder / "model.safetensors", folder / "rights.safetensors", sparsity=0.5)
    checkpoint.save(nn.Linear(2, 2), folder / "saved.safetensors")
    for name in ("rights.safetensors", "saved.safetensors"):
        assert (folder / name).stat().st_mode == (folder / "any").stat().st_mode


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    save_file({"layer.weight": torch.randn(4, 4)}, folder / "model.safetensors")
    (folder / "pruned.safetensors").write_text("of last time")

    def full_disk(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    before = sorted(folder.iterdir())
    with pytest.raises(OSError, match="no space"):
        checkpoint.prune(folder / "model.safetensors", folder / "pruned.safetensors", sparsity=0.5)
    assert (folder / "pruned.safetensors").read_text() == "of last time"
    assert sorted(folder.iterdir()) == before
