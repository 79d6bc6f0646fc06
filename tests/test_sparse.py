"""Compressed networks compute what the masked ones do, and are modules like others."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import confprune
from confprune.sparse import (
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
    choice,
    compress,
    decompress,
    modules,
)
from confprune.sparse.modules import NEVER, SparseConv3d, SparseLayer

TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def pruned(model: nn.Module, sparsity: float = 0.9, scope: str = "layer") -> nn.Module:
    return confprune.prune_levels(model, [sparsity], scope=scope).prune(model, 0).eval()


def small(model: nn.Module, **settings) -> nn.Module:
    return compress(model, **{"kernel": "sparse"} | settings)


def sparse_layers(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, SparseLayer)]


@torch.no_grad()
def check_same(model: nn.Module, x: Tensor, *others: Tensor, **settings) -> nn.Module:
    """Compress a pruned network, compare outputs and weights, give it back."""
    result = small(model, **settings)
    expected = model(x, *others)
    dtype = expected.dtype
    limit = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(result(x, *others), expected, rtol=0, atol=limit)
    again = decompress(result).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert list(again) == list(model.state_dict())
    return result


class TestNetworks:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_perceptron(self, dtype):
        model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 50, bias=False))
        model = pruned(model.to(dtype))
        for batch in (1, 3, 40):
            result = check_same(model, torch.randn(batch, 100).to(dtype))
        assert sparse_layers(result) == ["0", "2"]
        assert next(result.buffers()).dtype == dtype

    def test_convolutional_network(self):
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1, groups=32),
            nn.Conv2d(32, 64, 1, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
        result = check_same(pruned(model), torch.randn(3, 3, 20, 18))
        # Not the depthwise one.
        assert sparse_layers(result) == ["0", "3", "6", "9"]
        check_same(pruned(model), torch.randn(2, 3, 20, 18).to(memory_format=torch.channels_last))

    @pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
    @pytest.mark.parametrize("padding", [1, (2, 0), "same", "valid"])
    def test_padding(self, padding, padding_mode):
        layer = nn.Conv2d(8, 16, (3, 4), padding=padding, padding_mode=padding_mode)
        result = check_same(pruned(layer), torch.randn(2, 8, 9, 10))
        assert isinstance(result, SparseConv2d)

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_convolutions_of_any_dimension(self, dims):
        dense, sparse = [
            (nn.Conv1d, SparseConv1d),
            (nn.Conv2d, SparseConv2d),
            (nn.Conv3d, SparseConv3d),
        ][dims - 1]
        layer = dense(8, 12, 3, stride=2, padding=1, dilation=2)
        for shape in ((2, 8), (8,)):
            result = check_same(pruned(layer), torch.randn(*shape, *[9] * dims))
        assert type(result) is sparse
        text = f"8, 12, kernel_size={(3,) * dims}, stride={(2,) * dims}, padding={(1,) * dims}"
        assert text in repr(result)

    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("padding_mask", [False, True])
    def test_transformer_encoder_runs_its_sparse_layers(self, padding_mask, gradients):
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        model = pruned(nn.TransformerEncoder(layer, 2))
        x, mask = torch.randn(2, 5, 32), torch.arange(5) >= torch.tensor([5, 3])[:, None]
        result = small(model)
        # Attention uses its projections without calling them.
        names = [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        assert sparse_layers(result) == names
        called = []
        for name in names:
            layer = result.get_submodule(name)
            layer.register_forward_hook(lambda module, args, y, name=name: called.append(name))
        with torch.set_grad_enabled(gradients):
            key = {"src_key_padding_mask": mask} if padding_mask else {}
            y, expected = result(x, **key), model(x, **key)
        kept = ~mask if padding_mask else torch.ones(2, 5, dtype=torch.bool)
        torch.testing.assert_close(y[kept], expected[kept], rtol=1e-4, atol=1e-5)
        assert called == names

    @pytest.mark.parametrize("family", ["bert", "gpt2"])
    def test_hugging_face(self, family):
        transformers = pytest.importorskip("transformers")
        if family == "bert":
            config = transformers.BertConfig(
                vocab_size=50,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
            )
            model = transformers.BertModel(config)
        else:
            config = transformers.GPT2Config(
                vocab_size=50, n_positions=16, n_embd=64, n_layer=2, n_head=2
            )
            model = transformers.GPT2LMHeadModel(config)
        model = pruned(model.eval())
        ids = torch.randint(0, 50, (2, 7))
        result = small(model)
        with torch.no_grad():
            torch.testing.assert_close(result(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-4)
        weights = decompress(result).state_dict()
        assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
        # GPT-2 ties its last layer to the embedding.
        assert "lm_head" not in sparse_layers(result)
        assert len(sparse_layers(result)) == (13 if family == "bert" else 8)

    def test_layers_of_zeros_and_without_zeros(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        model[0].weight.data.zero_()
        model[1].weight.data.fill_(1)
        assert sparse_layers(check_same(model, torch.randn(4, 64))) == ["0"]
        every = check_same(model, torch.randn(4, 64), min_sparsity=0)
        assert sparse_layers(every) == ["0"]  # the dense form is the smaller one

    def test_a_compressed_network_can_be_compressed_again(self):
        model = pruned(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
        again = small(small(model))
        assert torch.equal(again[1].weight, model[1].weight)

    def test_outputs_of_masked_and_compressed_networks_certify_alike(self):
        model, data = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), (300, 64)
        certificate = confprune.calibrate(
            model, torch.randn(data), loss="disagreement", alpha=0.2, delta=0.1, progress=False
        )
        masked, x = certificate.prune(model), torch.randn(data)
        with torch.no_grad():
            same = small(masked, min_sparsity=0)(x).argmax(-1) == masked(x).argmax(-1)
        assert same.float().mean() > 0.99


class TestWhatStaysDense:
    def test_weights_tied_to_an_embedding(self):
        class Language(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(64, 64)
                self.middle = nn.Linear(64, 64)
                self.head = nn.Linear(64, 64, bias=False)
                self.head.weight = self.embedding.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.middle(self.embedding(x)))

        result = check_same(pruned(Language()), torch.randint(0, 64, (2, 5)))
        assert sparse_layers(result) == ["middle"]
        assert result.head.weight is result.embedding.weight

    def test_tied_layers_share_their_survivors(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        model = pruned(model)
        assert model[1].weight is model[0].weight
        result = check_same(model, torch.randn(4, 64))
        assert result[0].values is result[1].values
        assert result[0].values is not result[2].values
        whole = decompress(copy.deepcopy(result))
        assert whole[0].weight is whole[1].weight

    def test_one_layer_in_two_places_stays_one(self):
        layer = nn.Linear(64, 64)
        result = check_same(pruned(nn.Sequential(layer, nn.ReLU(), layer)), torch.randn(4, 64))
        assert result[0] is result[2]

    def test_layers_with_hooks(self):
        model = pruned(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
        model[0].register_forward_hook(lambda module, args, y: y + 1)
        assert sparse_layers(check_same(model, torch.randn(4, 64))) == ["1"]

    def test_layers_with_a_forward_of_their_own(self):
        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, 2 * self.weight, self.bias)

        class Inherited(nn.Linear):
            pass

        model = pruned(nn.Sequential(Doubled(64, 64), Inherited(64, 64)))
        assert sparse_layers(check_same(model, torch.randn(4, 64))) == ["1"]

    def test_layers_of_other_types(self):
        model = nn.Sequential(nn.Bilinear(8, 8, 64), nn.ConvTranspose1d(64, 64, 3), nn.Linear(3, 3))
        for parameter in model.parameters():
            parameter.data.zero_()
        assert sparse_layers(small(model)) == []
        assert sparse_layers(small(nn.Linear(64, 64, dtype=torch.complex64))) == []

    def test_lazy_layers_are_refused(self):
        with pytest.raises(ValueError, match="layer '0' is lazy: run the model once"):
            compress(nn.Sequential(nn.LazyLinear(3)))

    def test_computed_weights_stay_dense(self, recwarn):
        model = pruned(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
        nn.utils.parametrizations.weight_norm(model[0])
        with torch.no_grad():
            model[0].parametrizations.weight.original1.normal_()
        assert sparse_layers(check_same(model, torch.randn(4, 64))) == ["1"]
        assert not recwarn

    def test_computed_weights_with_zeros_are_warned_of_with_the_way_out(self):
        model = nn.Sequential(nn.Linear(64, 64))
        nn.utils.prune.l1_unstructured(model[0], "weight", 0.9)
        with pytest.warns(UserWarning, match=r"layer '0' stays dense, .*remove\(layer") as caught:
            assert sparse_layers(compress(model)) == []
        assert caught[0].filename == __file__
        nn.utils.prune.remove(model[0], "weight")
        assert sparse_layers(small(model)) == ["0"]


class TestModules:
    @pytest.fixture
    def layer(self) -> SparseLayer:
        return small(pruned(nn.Linear(64, 96)))

    def test_the_given_network_is_left_as_it_was(self):
        model = pruned(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))).train()
        before = copy.deepcopy(model.state_dict())
        result = compress(model, kernel="sparse")
        assert model.training
        assert type(model[0]) is nn.Linear
        assert model[0].weight.requires_grad
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert not any(module.training for module in result.modules())
        assert not any(parameter.requires_grad for parameter in result.parameters())
        result[1].weight.data.fill_(9)
        result[0].bias.data.fill_(9)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())

    def test_memory_and_state_hold_survivors_only(self, layer):
        bytes_ = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
        assert bytes_ < 0.25 * 64 * 96 * 4
        assert list(layer.state_dict()) == ["bias", "values", "columns", "slices", "cells"]
        assert layer.sparsity == pytest.approx(0.9, abs=1e-3)

    def test_training_is_refused(self, layer):
        model = nn.Sequential(layer)
        for refused in (lambda: layer.train(), lambda: model.train(), lambda: layer.train(True)):
            with pytest.raises(RuntimeError, match=r"for inference: train the dense network"):
                refused()
        assert model.eval() is model
        with pytest.raises(RuntimeError, match="requires a gradient"):
            layer(torch.randn(2, 64, requires_grad=True))
        assert not layer(torch.randn(2, 64)).requires_grad

    def test_copies_and_pickles(self, layer):
        x = torch.randn(3, 64)
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        for again in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(stream, weights_only=False),
        ):
            assert torch.equal(again(x), layer(x))
            assert again.dense_from == layer.dense_from

    def test_state_goes_to_layers_with_other_survivors(self, layer):
        x = torch.randn(3, 64)
        for other in (small(pruned(nn.Linear(64, 96), 0.6)), SparseLinear(64, 96)):
            assert not torch.equal(other(x), layer(x))
            other.load_state_dict(layer.state_dict())
            assert torch.equal(other(x), layer(x))
        for name in ("values", "slices"):
            state = layer.state_dict()
            del state[name]
            with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
                SparseLinear(64, 96).load_state_dict(state)

    def test_damaged_state_is_refused(self, layer):
        state = layer.state_dict()
        state["columns"] = state["columns"] + 100
        fresh = SparseLinear(64, 96)
        with pytest.raises(RuntimeError, match=r"the layer: not a sparse matrix of shape"):
            fresh.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"0: values, columns, slices and cells are not"):
            nn.Sequential(SparseLinear(640, 96)).load_state_dict(
                {f"0.{name}": tensor for name, tensor in layer.state_dict().items()}
            )
        assert torch.equal(fresh(torch.randn(3, 64)), torch.zeros(3, 96))

    def test_types_are_converted(self, layer):
        x = torch.randn(5, 64)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            other = copy.deepcopy(layer).to(dtype)
            assert other.values.dtype == other.bias.dtype == other(x.to(dtype)).dtype == dtype
            assert torch.equal(other.weight, layer.weight.to(dtype))
            assert other.columns.dtype == torch.uint8
        assert layer.half().float().values.dtype == torch.float32

    def test_autocast(self, layer):
        model = nn.Sequential(nn.Linear(64, 64), layer)
        x = torch.randn(5, 64)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        with torch.no_grad():
            torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)

    def test_to_meta_and_empty(self, layer):
        meta = copy.deepcopy(layer).to("meta")
        assert meta(torch.empty(5, 64, device="meta")).shape == (5, 96)
        assert SparseLinear(64, 96, device="meta").values.is_meta

    def test_other_devices_run_dense_with_a_warning(self, monkeypatch):
        # There is no such device here: the layers are told that one is.
        for model in (nn.Linear(64, 96), nn.Conv1d(64, 96, 3), nn.Conv2d(64, 96, 1)):
            model = pruned(model)
            monkeypatch.setattr(modules, "_WITH_KERNELS", ())
            with pytest.warns(UserWarning, match="this build has no sparse kernels for cpu"):
                result = small(model)
            x = torch.randn(2, 64, *[5] * (model.weight.ndim - 2))
            assert torch.equal(result(x), model(x))
            assert torch.equal(result.weight, model.weight)
            assert choice.measured_dense_from(result) == NEVER
            monkeypatch.undo()
            assert result.to("cpu")._dense is None

    @pytest.mark.cuda
    def test_a_gpu_holds_the_survivors_alone(self, layer, recwarn):
        x = torch.randn(5, 64)
        other = copy.deepcopy(layer).to("cuda")
        assert other._dense is None
        torch.testing.assert_close(other(x.cuda()).cpu(), layer(x))
        assert torch.equal(other.weight.cpu(), layer.weight)
        assert torch.equal(other.cpu()(x), layer(x))
        assert not recwarn.list

    @pytest.mark.cuda
    def test_networks_are_compressed_on_a_gpu(self):
        model = pruned(nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 512)))
        x = torch.randn(3, 8, 6, 6)
        for kernel in ("auto", "sparse", "dense"):
            result = compress(copy.deepcopy(model).cuda(), kernel=kernel)
            assert result[2].weight.is_cuda
            torch.testing.assert_close(result(x.cuda()).cpu(), model(x), rtol=1e-3, atol=1e-4)

    def test_numbers_of_threads_and_examples(self, layer):
        x = torch.randn(70, 64)
        expected = F.linear(x, layer.weight, layer.bias)
        for batch in (0, 1, 2, 7, 70):
            torch.testing.assert_close(layer(x[:batch]), expected[:batch], rtol=1e-4, atol=1e-5)

    def test_repr(self, layer):
        assert repr(layer) == (
            "SparseLinear(in_features=64, out_features=96, sparsity=0.900, bias=True)"
        )
        assert "groups=2, padding_mode=circular" in repr(
            SparseConv2d(4, 4, 3, groups=2, padding_mode="circular")
        )

    def test_arguments_are_refused(self):
        with pytest.raises(TypeError, match=r"model must be a .*Module, got list"):
            compress([])
        with pytest.raises(ValueError, match="kernel 'fast' is unknown"):
            compress(nn.Linear(3, 3), kernel="fast")
        with pytest.raises(ValueError, match=r"min_sparsity must be in \[0, 1\], got 2"):
            compress(nn.Linear(3, 3), min_sparsity=2)
        with pytest.raises(ValueError, match="padding_mode"):
            SparseConv2d(3, 3, 3, padding_mode="blue")


class TestCompilers:
    @pytest.fixture
    def model(self) -> nn.Module:
        layers = nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32)
        return small(pruned(nn.Sequential(*layers)))

    def test_compile(self, model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for batch in (2, 3):
            x = torch.randn(batch, 8, 6, 6)
            torch.testing.assert_close(compiled(x), model(x))

    def test_export(self, model, tmp_path):
        x = torch.randn(2, 8, 6, 6)
        shapes = ({0: torch.export.Dim("batch", min=2)},)
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "model.pt2")
        again = torch.export.load(tmp_path / "model.pt2").module()
        x = torch.randn(5, 8, 6, 6)
        assert torch.equal(again(x), model(x))
        operators = {str(node.target) for node in program.graph.nodes}
        assert {"confprune.sparse_conv.default", "confprune.sparse_linear.default"} <= operators


class TestChoice:
    @pytest.fixture(autouse=True)
    def _forget(self, monkeypatch):
        monkeypatch.setattr(choice, "_measured", {})

    def clock(self, monkeypatch, dense_wins_from: int) -> list[tuple[int, int]]:
        """Times as if the dense kernel won from so many products on; gives what was asked."""
        asked = []

        def seconds(layer: SparseLayer, x: Tensor) -> float:
            products = layer(x).numel() // layer.weight_shape[0]
            asked.append((products, layer.dense_from))
            wins = products >= dense_wins_from
            return 1.0 if (layer.dense_from == 0) == wins else 2.0

        monkeypatch.setattr(choice, "_seconds", seconds)
        return asked

    @pytest.mark.parametrize(("wins_from", "chosen"), [(10**9, NEVER), (64, 64), (65, 256)])
    def test_the_dense_kernel_is_used_from_where_it_wins(self, monkeypatch, wins_from, chosen):
        self.clock(monkeypatch, wins_from)
        model = pruned(nn.Linear(64, 64))
        result = compress(model)
        assert result.dense_from == chosen
        x = torch.randn(300, 64)
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)

    def test_where_the_dense_kernel_always_wins_layers_stay_dense(self, monkeypatch):
        self.clock(monkeypatch, 1)
        model = pruned(nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 16, 3)))
        assert sparse_layers(compress(model)) == []
        assert sparse_layers(compress(model, kernel="sparse")) == ["0", "1"]
        dense = compress(model[0], kernel="dense")
        assert dense.dense_from == 0
        x = torch.randn(5, 64)
        assert torch.equal(dense(x), model[0](x))

    def test_each_kind_is_measured_once(self, monkeypatch):
        asked = self.clock(monkeypatch, 10**9)
        model = pruned(nn.Sequential(nn.Linear(64, 64), nn.Linear(60, 70), nn.Linear(64, 200)))
        compress(model)
        compress(model)
        assert len(asked) == 2 * 2  # two kinds, each with both kernels for the largest batch

    def test_a_convolution_counts_positions(self, monkeypatch):
        self.clock(monkeypatch, 27 * 27 + 1)
        result = compress(pruned(nn.Conv2d(8, 16, 2)))
        assert result.dense_from == 8 * 27 * 27

    def test_a_real_measurement(self):
        for model in (nn.Linear(64, 64), nn.Conv1d(8, 16, 3), nn.Conv3d(4, 16, 2)):
            layer = small(pruned(model))
            before = layer.dense_from
            assert choice.measured_dense_from(layer) >= 0
            assert layer.dense_from == before
        assert choice.measured_dense_from(layer.to("meta")) == NEVER

    @pytest.mark.cuda
    def test_a_measurement_on_a_gpu(self):
        layer = small(pruned(nn.Linear(64, 64)).cuda())
        assert choice.measured_dense_from(layer) in (0, *choice.ROWS, NEVER)

    @pytest.mark.parametrize(("kernels", "chosen"), [(("cuda",), 0), ((), NEVER)])
    def test_convolutions_are_unpacked_on_cuda(self, monkeypatch, kernels, chosen):
        layer = small(pruned(nn.Conv2d(8, 16, 3)))
        with FakeTensorMode():
            layer._buffers["values"] = torch.empty(100, device="cuda")
        monkeypatch.setattr(modules, "_WITH_KERNELS", kernels)
        assert choice.measured_dense_from(layer) == chosen
