"""Compressed networks in files, verified by their certificates, and as ONNX."""

from __future__ import annotations

import builtins
import copy
import json
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

import confprune
from confprune.certificate import VerificationError
from confprune.cli import main
from confprune.sparse import (
    SparseLinear,
    compress,
    export_onnx,
    is_compressed,
    load_certificate,
    load_sparse,
    save_sparse,
)
from confprune.sparse import file as sparse_file


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv1d(3, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 8, classes)
    )
    return model.eval()


class Language(nn.Module):
    """Tied weights, attention, a buffer that is not stored, and layers to compress."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 64)
        self.block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.twin = nn.Linear(64, 64)
        self.other = nn.Linear(64, 64)
        self.other.weight = self.twin.weight
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(7), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[:, None]
        return self.head(self.other(self.twin(self.block(x))))


def pruned(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    return confprune.prune_levels(model, [sparsity], scope="layer").prune(model, 0).eval()


def small(model: nn.Module) -> nn.Module:
    return compress(model, kernel="sparse")


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("make", [network, Language])
    def test_what_is_saved_is_loaded(self, tmp_path, make, dtype):
        model = pruned(make()).to(dtype)
        compressed = small(model)
        save_sparse(compressed, tmp_path / "small.safetensors")
        again = load_sparse(tmp_path / "small.safetensors", make().to(dtype), kernel="sparse")
        words = torch.randint(0, 40, (2, 7))
        x = words if make is Language else torch.randn(2, 3, 8).to(dtype)
        with torch.no_grad():
            assert torch.equal(again(x), compressed(x))
        state, expected = again.state_dict(), compressed.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert not any(parameter.requires_grad for parameter in again.parameters())
        assert repr(again) == repr(compressed)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
    def test_the_file_is_in_proportion_to_the_survivors(self, tmp_path, sparsity, dtype):
        model = pruned(nn.Linear(1024, 1024, bias=False), sparsity).to(dtype)
        save_sparse(small(model), tmp_path / "small.safetensors")
        size = (tmp_path / "small.safetensors").stat().st_size
        assert size <= 1.6 * (1 - sparsity) * 1024 * 1024 * dtype.itemsize

    @pytest.mark.parametrize("stored", [torch.int32, torch.int64])
    def test_offsets_are_stored_in_32_bits_where_they_fit(self, tmp_path, monkeypatch, stored):
        if stored == torch.int64:
            monkeypatch.setattr(sparse_file, "_narrow", lambda offsets: offsets)
        model = small(pruned(network()))
        save_sparse(model, tmp_path / "small.safetensors")
        assert load_file(tmp_path / "small.safetensors")["3.cells"].dtype == stored
        again = load_sparse(tmp_path / "small.safetensors", network(), kernel="sparse")
        assert torch.equal(again.state_dict()["3.cells"], model.state_dict()["3.cells"])

    def test_offsets_too_large_for_32_bits_keep_64(self):
        offsets = torch.tensor([[0, 0], [2**31 - 1, 5]])
        assert sparse_file._narrow(offsets).dtype == torch.int32
        assert sparse_file._narrow(offsets + 1).dtype == torch.int64

    def test_pruned_tensors_that_stay_dense_are_stored_as_bitmaps(self, tmp_path):
        model = confprune.prune_levels(
            Language(), [0.9], parameters=lambda name, parameter: parameter.ndim == 2
        ).prune(Language(), 0)
        name = "block.self_attn.in_proj_weight"
        path = tmp_path / "small.safetensors"
        save_sparse(small(model), path)
        stored = load_file(path)
        assert name not in stored
        parts = [stored[f"{name}.confprune.{part}"] for part in ("bitmap", "survivors")]
        assert parts[0].numel() == 192 * 64 // 8
        assert parts[1].numel() == torch.count_nonzero(model.state_dict()[name])
        again = load_sparse(path, Language(), kernel="sparse")
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])

    def test_ties_are_kept(self, tmp_path):
        save_sparse(small(pruned(Language())), tmp_path / "small.safetensors")
        stored = load_file(tmp_path / "small.safetensors")
        assert "other.values" not in stored
        assert "head.weight" not in stored
        again = load_sparse(tmp_path / "small.safetensors", Language(), kernel="sparse")
        assert again.head.weight is again.embedding.weight
        assert again.twin.values.data_ptr() == again.other.values.data_ptr()

    def test_the_structure_may_come_without_memory(self, tmp_path):
        compressed = small(pruned(network()))
        path = tmp_path / "small.safetensors"
        save_sparse(compressed, path)
        with torch.device("meta"):
            empty = network()
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            assert torch.equal(load_sparse(path, empty, kernel="sparse")(x), compressed(x))
        save_sparse(small(pruned(Language())), path)
        with torch.device("meta"):
            empty = Language()
        with pytest.raises(ValueError, match="'positions' is in no file"):
            load_sparse(path, empty)

    def test_the_model_is_left_as_it_was(self, tmp_path):
        save_sparse(small(pruned(network())), tmp_path / "small.safetensors")
        model = network().train()
        before = copy.deepcopy(model.state_dict())
        load_sparse(tmp_path / "small.safetensors", model)
        assert type(model[3]) is nn.Linear
        assert model.training
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())

    def test_one_layer_alone(self, tmp_path):
        layer = small(pruned(nn.Linear(64, 64)))
        save_sparse(layer, tmp_path / "small.safetensors")
        again = load_sparse(tmp_path / "small.safetensors", nn.Linear(64, 64), kernel="dense")
        assert isinstance(again, SparseLinear)
        assert torch.equal(again.weight, layer.weight)
        assert again.dense_from == 0

    def test_an_old_file_survives_a_failure(self, tmp_path, monkeypatch):
        path = tmp_path / "small.safetensors"
        compressed = small(pruned(network()))
        save_sparse(compressed, path)
        before = path.read_bytes()

        def fail(*args):
            raise OSError("no space left on device")

        monkeypatch.setattr("confprune.sparse.file.save_file", fail)
        with pytest.raises(OSError, match="no space"):
            save_sparse(compressed, path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["small.safetensors"]

    def test_networks_without_sparse_layers_have_bitmaps(self, tmp_path):
        model, path = pruned(network(), 0.3), tmp_path / "small.safetensors"
        assert not is_compressed(small(model))
        save_sparse(small(model), path)
        again = load_sparse(path, network())
        assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
        assert path.stat().st_size < 0.9 * sum(4 * t.numel() for t in model.parameters())

    def test_files_that_do_not_fit_are_refused(self, tmp_path):
        path = tmp_path / "small.safetensors"
        save_sparse(small(pruned(network())), path)

        def without_bias() -> nn.Module:
            model = network()
            model[3] = nn.Linear(256, 4, bias=False)
            return model

        def more() -> nn.Module:
            return nn.Sequential(*network(), nn.BatchNorm1d(4))

        def other_kind() -> nn.Module:
            model = network()
            model[3] = nn.Bilinear(4, 4, 4)
            return model

        for model, message in [
            (network(5), r"3: values, columns, slices and cells|'3.bias' has shape \[4\] in"),
            (network().half(), r"is torch.float32 in .* and torch.float16 in the model: give"),
            (without_bias(), "has '3.bias', which the model has not"),
            (more(), "lacks '4.weight', which the model has"),
            (other_kind(), "layer '3': a Bilinear has no sparse form"),
            (network()[:3], "has a sparse layer '3', the model has not"),
            (
                nn.Sequential(nn.Conv1d(3, 32, 5), *network()[1:]),
                r"does not fit the model: .*\n\t0: ",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                load_sparse(path, model)
        with pytest.raises(ValueError, match="kernel 'fast' is unknown"):
            load_sparse(path, network(), kernel="fast")

    def test_files_of_other_kinds_are_refused(self, tmp_path):
        path = tmp_path / "small.safetensors"
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_sparse(path, network())
        path.write_bytes(b"nothing")
        with pytest.raises(ValueError, match="is not a safetensors file"):
            load_sparse(path, network())
        save_file(network().state_dict(), path)
        with pytest.raises(ValueError, match="was not written by"):
            load_sparse(path, network())
        save_file({"weight": torch.ones(1)}, path, {"confprune.sparse": '{"format": 2}'})
        with pytest.raises(ValueError, match="has format 2, this version reads 1"):
            load_sparse(path, network())

    def test_a_compressed_network_is_no_checkpoint_to_prune(self, tmp_path):
        save_sparse(small(pruned(network())), tmp_path / "small.safetensors")
        for source in (tmp_path, tmp_path / "small.safetensors"):
            with pytest.raises(ValueError, match="holds a compressed network"):
                confprune.checkpoint.prune(
                    source, tmp_path / "out.safetensors", sparsity=0.5, include=["*"]
                )

    @pytest.mark.parametrize("damage", ["missing", "short", "surplus"])
    def test_damaged_bitmaps_are_refused(self, tmp_path, damage):
        path = tmp_path / "small.safetensors"
        model = pruned(network())
        model[3].bias.data[1:] = 0
        model[0].bias.data[1:] = 0
        save_sparse(small(model), path)
        stored, about = load_file(path), metadata(path)
        assert json.loads(about["confprune.sparse"])["bitmaps"] == {"0.bias": [32], "3.bias": [4]}
        name = "0.bias.confprune.bitmap"
        if damage == "missing":
            del stored[name]
        elif damage == "short":
            stored[name] = stored[name][1:].clone()
        else:
            stored[name][2] = 7
        save_file(stored, path, about)
        with pytest.raises(ValueError, match=r"is damaged: .*'0.bias'"):
            load_sparse(path, network())


@pytest.fixture(scope="module")
def labelled() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(300, 3, 8)
    with torch.no_grad():
        return x, network()(x).argmax(-1)


@pytest.fixture(scope="module")
def against_labels(labelled) -> confprune.Certificate:
    """Of a loss that the full network is not needed for."""
    return confprune.calibrate(
        network(), labelled, loss="error", alpha=0.5, delta=0.1, progress=False
    )


@pytest.fixture(scope="module")
def against_full(labelled) -> confprune.Certificate:
    return confprune.calibrate(
        network(), labelled[0], loss="disagreement", alpha=0.5, delta=0.1, progress=False
    )


def deployed(certificate: confprune.Certificate) -> nn.Module:
    return compress(certificate.prune(network()), kernel="sparse", min_sparsity=0)


class TestCertificates:
    def test_a_file_holds_its_certificate(self, tmp_path, against_full):
        path = tmp_path / "small.safetensors"
        save_sparse(deployed(against_full), path, against_full)
        assert load_certificate(path) == against_full
        save_sparse(deployed(against_full), path)
        assert load_certificate(path) is None
        with pytest.raises(FileNotFoundError):
            load_certificate(tmp_path / "none")

    def test_a_compressed_network_verifies_against_labels(self, labelled, against_labels):
        model = deployed(against_labels)
        assert is_compressed(model)
        risk = against_labels.verify(model, labelled, progress=False)
        assert risk == pytest.approx(against_labels.risk, abs=2 / 300 + 1e-3)
        whole = against_labels.verify(model, labelled, progress=False, full=network())
        assert whole == risk

    def test_a_loaded_network_verifies_against_the_full_one(self, tmp_path, labelled, against_full):
        path = tmp_path / "small.safetensors"
        save_sparse(deployed(against_full), path, against_full)
        model = load_sparse(path, network(), kernel="sparse")
        certificate = load_certificate(path)
        risk = certificate.verify(model, labelled[0], progress=False, full=network())
        assert risk == pytest.approx(against_full.risk, abs=2 / 300 + 1e-3)

    def test_the_full_network_is_asked_for_where_it_is_needed(self, labelled, against_full):
        model = deployed(against_full)
        with pytest.raises(ValueError, match="pass full=, the network that was calibrated"):
            against_full.verify(model, labelled[0], progress=False)
        with pytest.raises(ValueError, match=r"for another network: the values of parameter"):
            against_full.verify(network(), labelled[0], progress=False, full=network())
        masked = against_full.prune(network())
        with pytest.raises(ValueError, match="if it is pruned already, pass full="):
            against_full.verify(masked, labelled[0], progress=False)
        risk = against_full.verify(masked, labelled[0], progress=False, full=network())
        assert risk == pytest.approx(against_full.risk, abs=2 / 300 + 1e-3)
        other = network()
        other[3].weight.data[0, 0] += 1
        with pytest.raises(ValueError, match="for another network: the values of parameter"):
            against_full.verify(model, labelled[0], progress=False, full=other)

    @pytest.mark.parametrize("guarantee", ["monotone", "expectation"])
    def test_monotonised_risks(self, labelled, guarantee):
        settings = {"loss": "error", "alpha": 0.5, "looks": None, "guarantee": guarantee}
        if guarantee == "monotone":
            settings["delta"] = 0.1
        certificate = confprune.calibrate(network(), labelled, progress=False, **settings)
        model = deployed(certificate)
        risk = certificate.verify(model, labelled, progress=False, full=network())
        assert risk == pytest.approx(certificate.risk, abs=0.01)
        with pytest.raises(ValueError, match="a monotonised loss takes every level: pass full="):
            certificate.verify(model, labelled, progress=False)

    def test_other_networks_are_refused(self, labelled, against_labels):
        def refused(model: nn.Module, message: str, **more) -> None:
            with pytest.raises(ValueError, match=f"for another network: {message}"):
                against_labels.verify(model, labelled, progress=False, **more)

        level = against_labels.sparsity
        denser = confprune.prune_levels(network(), [level - 0.2]).prune(network(), 0)
        dense = compress(denser, kernel="sparse", min_sparsity=0)
        refused(dense, r"[\d,]+ of 1,312 weights are zero instead of [\d,]+")
        refused(deployed(against_labels).half(), "parameter '0.weight' has dtype float16")
        other = network(5)
        refused(
            compress(pruned(other), kernel="sparse"), r"parameter '3.weight' has shape \[5, 256\]"
        )
        refused(small(pruned(nn.Linear(256, 256))), "parameter '0.weight' is missing")
        refused(
            small(pruned(nn.ModuleList([nn.Linear(64, 64)]))), "parameter '3.weight' is missing"
        )
        changed = deployed(against_labels)
        changed[3].values[0] += 1
        refused(changed, "the values of parameter '3.weight' are others", full=network())

    def test_a_risk_that_does_not_reproduce_fails(self, labelled, against_labels):
        changed = deployed(against_labels)
        changed[3].values[:] = -changed[3].values
        with pytest.raises(VerificationError, match="states a risk"):
            against_labels.verify(changed, labelled, progress=False)

    def test_each_layer_counts_where_each_was_pruned_alone(self, labelled):
        certificate = confprune.calibrate(
            network(), labelled, loss="error", alpha=0.5, delta=0.1, scope="layer", progress=False
        )
        certificate.verify(deployed(certificate), labelled, progress=False)
        globally = confprune.prune_levels(network(), [certificate.sparsity]).prune(network(), 0)
        with pytest.raises(ValueError, match=r"weights of '(0|3).weight' are zero instead of"):
            certificate.verify(
                compress(globally, kernel="sparse", min_sparsity=0), labelled, progress=False
            )

    @pytest.mark.parametrize("way", [{"scope": "row"}, {"pattern": "N:4"}, {"pattern": "4x1"}])
    def test_rows_and_patterns_may_round_down(self, labelled, way):
        certificate = confprune.calibrate(
            network(),
            labelled,
            loss="error",
            alpha=0.5,
            delta=0.1,
            parameters=["3.weight"],
            progress=False,
            **way,
        )
        model = deployed(certificate)
        certificate.verify(model, labelled, progress=False)
        certificate.verify(model, labelled, progress=False, full=network())

    def test_the_text_of_a_certificate(self, against_full):
        assert confprune.Certificate.from_json(against_full.to_json()) == against_full
        with pytest.raises(ValueError, match="it is not JSON"):
            confprune.Certificate.from_json("{")


PROJECT = """
import torch
from torch import nn


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def data():
    torch.manual_seed(2)
    return torch.randn(300, 64)
"""


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path, monkeypatch):
        (tmp_path / "sparse_project.py").write_text(PROJECT)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "sparse_project", raising=False)

    def calibrate(self, alpha: str) -> int:
        command = (
            "calibrate --model sparse_project:model --data sparse_project:data --loss cosine "
            f"--alpha {alpha} --delta 0.1 --quiet --compress --out run"
        )
        return main(command.split())

    def test_calibrate_compresses(self):
        assert self.calibrate("0.2") == 0
        import sparse_project

        model = load_sparse("run/compressed.safetensors", sparse_project.model(), kernel="sparse")
        certificate = load_certificate("run/compressed.safetensors")
        assert certificate == confprune.Certificate.load("run/certificate.json")
        certificate.verify(
            model, sparse_project.data(), progress=False, full=sparse_project.model()
        )

    def test_little_to_compress_is_no_error(self):
        self.calibrate("0.02")
        import sparse_project

        assert not is_compressed(load_sparse("run/compressed.safetensors", sparse_project.model()))


class TestOnnx:
    def outputs(self, path, **inputs: Tensor) -> np.ndarray:
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]

    def names(self, path) -> tuple[list[str], list[str]]:
        graph = pytest.importorskip("onnx").load(os.fspath(path)).graph
        return (
            [entry.name for entry in graph.initializer if len(entry.dims) > 1],
            [entry.values.name for entry in graph.sparse_initializer],
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("compressed", [True, False])
    def test_pruned_weights_are_sparse_initialisers(self, tmp_path, compressed, dtype):
        pytest.importorskip("onnxruntime")
        model = pruned(network()).to(dtype)
        path, x = tmp_path / "model.onnx", torch.randn(2, 3, 8).to(dtype)
        export_onnx(small(model) if compressed else model, x, path)
        assert self.names(path) == ([], ["0.weight", "3.weight"])
        with torch.no_grad():
            expected = model(x).numpy()
        np.testing.assert_allclose(self.outputs(path, input=x), expected, rtol=1e-2, atol=1e-2)
        assert path.stat().st_size < 9000

    def test_weights_with_few_zeros_stay_dense(self, tmp_path):
        pytest.importorskip("onnxruntime")
        path = tmp_path / "model.onnx"
        export_onnx(pruned(network(), 0.6), (torch.randn(2, 3, 8),), path)
        assert self.names(path) == (["0.weight", "3.weight"], [])

    def test_dimensions_may_vary_and_inputs_have_names(self, tmp_path):
        pytest.importorskip("onnxruntime")

        class Sum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(64, 64)

            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return self.layer(a) + 2 * b

        model, path = pruned(Sum()), tmp_path / "model.onnx"
        batch = torch.export.Dim("batch")
        export_onnx(
            small(model),
            (torch.randn(3, 64),),
            path,
            kwargs={"b": torch.randn(3, 64)},
            dynamic_shapes={"a": {0: batch}, "b": {0: batch}},
        )
        a, b = torch.randn(2, 5, 64)
        with torch.no_grad():
            np.testing.assert_allclose(self.outputs(path, a=a, b=b), model(a, b), atol=1e-5)

    def test_what_onnxruntime_cannot_check_is_not_written(self, tmp_path, monkeypatch):
        runtime = pytest.importorskip("onnxruntime")
        path = tmp_path / "model.onnx"
        with pytest.raises(ValueError, match="no kernels for bfloat16"):
            export_onnx(network().bfloat16(), torch.randn(2, 3, 8).bfloat16(), path)

        class Wrong(runtime.InferenceSession):
            def run(self, *args):
                return [output + 1 for output in super().run(*args)]

        monkeypatch.setattr(runtime, "InferenceSession", Wrong)
        with pytest.raises(RuntimeError, match=r"outputs differ from torch's by 1\.00e"):
            export_onnx(network(), torch.randn(2, 3, 8), path)
        monkeypatch.setattr(runtime, "InferenceSession", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(RuntimeError, match="onnxruntime cannot run the network"):
            export_onnx(network(), torch.randn(2, 3, 8), path)
        assert os.listdir(tmp_path) == []

    def test_missing_packages_are_named(self, tmp_path, monkeypatch):
        real = builtins.__import__

        def without(name, *args, **kwargs):
            if name == "onnxruntime":
                raise ModuleNotFoundError("No module named 'onnxruntime'", name=name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match=r"needs onnx.*: pip install 'confprune\[onnx\]'"):
            export_onnx(network(), torch.randn(2, 3, 8), tmp_path / "model.onnx")


@pytest.mark.parametrize("save", [save_sparse, confprune.checkpoint.save])
class TestCertificatesOfOtherNetworks:
    """Neither file takes the promise of a network that it does not hold."""

    def test_what_is_no_certificate_is_refused(self, tmp_path, save):
        with pytest.raises(TypeError, match=r"got str: read a file with confprune.Certificate.loa"):
            save(nn.Linear(2, 2), tmp_path / "small.safetensors", "certificate.json")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda certified: nn.Linear(2, 2), r"parameter '0.weight' is missing"),
            (lambda certified: pruned(network(5)), r"parameter '3.weight' has shape \[5, 256\]"),
            (lambda certified: certified.prune(network()).half(), "'0.weight' has dtype float16"),
            (lambda certified: network(), "0 of 1,312 weights are zero"),
        ],
    )
    def test_another_network_is_refused(self, tmp_path, against_full, save, make, message):
        with pytest.raises(ValueError, match=f"is for another network: .*{message}"):
            save(make(against_full), tmp_path / "small.safetensors", against_full)
        assert os.listdir(tmp_path) == []

    def test_where_nothing_was_certified_the_network_is_whole(self, tmp_path, labelled, save):
        nothing = confprune.calibrate(
            network(),
            labelled[0],
            loss="cosine",
            alpha=1e-2,
            delta=0.1,
            progress=False,
            sparsities=[0.9, 0.95],
            looks=None,
        )
        assert not nothing.certified
        save(network(), tmp_path / "small.safetensors", nothing)
        with pytest.raises(ValueError, match="is for another network"):
            save(network(5), tmp_path / "small.safetensors", nothing)

    def test_a_certificate_of_bare_losses_fits_any_network(self, tmp_path, save):
        bare = confprune.calibrate_losses(np.zeros((99, 1)), [0.5], alpha=0.05, delta=0.1)
        save(network(), tmp_path / "small.safetensors", bare)
