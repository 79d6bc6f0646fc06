"""The grid forward on the networks people have: each held to the level-by-level reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from level_by_level import ANY, GRID, grid_losses, slow_losses
from torch import Tensor, nn

from confprune import prune_levels

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def check(
    model: nn.Module,
    batches: list[Any],
    *,
    parameters: Any = None,
    forward: Callable[..., Any] | None = None,
    fallback: str | None = None,
    scope: str = "global",
    grid: Sequence[float] = GRID,
) -> None:
    """Hold the grid's losses to those of the masked networks."""
    levels = prune_levels(model, grid, parameters=parameters, scope=scope)
    expected = slow_losses(model, batches, levels, forward)
    found = grid_losses(model, batches, levels, forward=forward, fallback=fallback)
    assert expected[:, -1].max() > 1e-3, "the network must depend on its weights"
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def images(n: int = 11, channels: int = 3, size: int = 12) -> list[Tensor]:
    return list(torch.randn(n, channels, size, size).split(8))


def vectors(n: int = 21, width: int = 10) -> list[Tensor]:
    return list(torch.randn(n, width).split(16))


def sequences(n: int = 9, length: int = 7, width: int = 16) -> list[Tensor]:
    return list(torch.randn(n, length, width).split(5))


class Residual(nn.Module):
    """A block of a residual network, with ReLU in place."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(channels, outputs, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.relu(self.norm1(self.first(x)))))
        y += self.shortcut(x)
        return self.relu(y)


def residual_network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        Residual(8, 12, 2),
        Residual(12, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model


def depthwise_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU6(inplace=True),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.Conv2d(16, 8, 1, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(6, 6, 3, 2, 1, output_padding=1, groups=2),
        nn.GroupNorm(2, 6),
        nn.Upsample(scale_factor=0.5),
        nn.ConvTranspose2d(6, 3, 2),
    )


def paddings(mode: str, padding: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode),
        nn.Tanh(),
        nn.Conv2d(4, 4, (3, 5), padding=padding, padding_mode=mode, dilation=(2, 1)),
    )


def pooling(*options: Any, **more: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.MaxPool2d(*options, **more), nn.Conv2d(5, 4, 1)
    )


VISION = {
    "pooling": lambda: pooling(2),
    "overlapping pooling": lambda: pooling(3, 2, 1),
    "uneven pooling": lambda: pooling((2, 3), stride=(3, 1), padding=(1, 0)),
    "pooling up to the border": lambda: pooling(2, ceil_mode=True),
    "dilated pooling": lambda: pooling(2, dilation=2),
    "wide pooling": lambda: pooling(5),
    "residual": residual_network,
    "depthwise": depthwise_network,
    "autoencoder": autoencoder,
    "padding same": lambda: paddings("zeros", "same"),
    "padding valid": lambda: paddings("zeros", "valid"),
    "padding circular": lambda: paddings("circular", "same"),
    "padding reflect": lambda: paddings("reflect", 1),
    "even kernel, same": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 4, padding="same"), nn.ReLU(), nn.Conv2d(4, 4, 2, padding="same")
    ),
    "instance norm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 3)
    ),
    "dropout": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout2d(), nn.Flatten(), nn.Dropout(), nn.Linear(400, 3)
    ),
}


@pytest.mark.parametrize("name", VISION)
def test_convolutional_networks(name):
    check(VISION[name](), images())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_multilayer_perceptrons_of_every_type(dtype, scope):
    model = nn.Sequential(
        nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 30, bias=False), nn.GELU(), nn.Linear(30, 4)
    )
    check(model.to(dtype), [x.to(dtype) for x in vectors()], scope=scope)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_convolutional_networks_of_other_types(dtype):
    check(residual_network().to(dtype), [x.to(dtype) for x in images()])


def test_networks_of_mixed_types():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Linear(10, 20).bfloat16()
            self.high = nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.high(self.low(x.bfloat16()).float())

    check(Mixed(), vectors())  # its first layer has the tolerance of its type


def test_autocast_is_kept_to():
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    model = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.Linear(200, 4))
    check(model, vectors(), forward=forward, fallback="autocast")


def test_examples_may_be_taken_one_by_one():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.head(self.conv(image).mean((1, 2))) for image in x])

    check(Single(), images(5))


def test_sound_and_volumes():
    sound = nn.Sequential(
        nn.Conv1d(2, 8, 5, 2), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3), nn.Conv1d(4, 2, 3)
    )
    check(sound, list(torch.randn(7, 2, 31).split(4)))
    volume = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.MaxPool3d(2), nn.Conv3d(4, 2, 2)
    )
    check(volume, list(torch.randn(5, 1, 6, 6, 6).split(3)))


def test_images_in_channels_last_layout():
    model = residual_network().to(memory_format=torch.channels_last)
    check(model, [x.to(memory_format=torch.channels_last) for x in images()])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_encoders(norm_first, batch_first):
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, activation="gelu", batch_first=batch_first, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    if batch_first:
        check(model, sequences())
    else:
        check(model, sequences(), forward=lambda m, x: m(x.transpose(0, 1)).transpose(0, 1))


class Padded(nn.Module):
    """A transformer that averages over what is not padding."""

    def __init__(self, *, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.encoder(x, src_key_padding_mask=padding)
        y = y.masked_fill(padding.unsqueeze(-1), 0).sum(1)
        return self.head(y / (~padding).sum(1, keepdim=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [False, True])
def test_transformer_encoders_with_padding(nested):
    lengths = torch.tensor([7, 3, 5, 1, 7, 2, 6, 4, 5])
    padding = torch.arange(7) >= lengths[:, None]
    batches = [{"x": x, "padding": p} for x, p in zip(sequences(), padding.split(5), strict=True)]
    check(Padded(nested=nested), batches, forward=lambda model, batch: model(**batch))


def test_transformers_with_a_decoder():
    model = nn.Transformer(16, 2, 1, 1, 24, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    check(
        model,
        sequences(),
        forward=lambda m, x: m(x, x.flip(1), tgt_mask=causal, tgt_is_causal=True),
    )


class Attention(nn.Module):
    """Multi-head attention as its options allow."""

    def __init__(self, *, returns_weights: bool = False, cross: bool = False, **options: Any):
        super().__init__()
        self.returns_weights = returns_weights
        self.cross = cross
        self.layer = nn.MultiheadAttention(16, 4, **options)
        if cross:
            self.keys = nn.Linear(16, options.get("kdim") or 16)
            self.values = nn.Linear(16, options.get("vdim") or 16)

    def forward(self, x: Tensor) -> Tensor:
        if not self.layer.batch_first:
            x = x.transpose(0, 1)
        keys, values = (self.keys(x), self.values(x)) if self.cross else (x, x)
        y, weights = self.layer(x, keys, values, need_weights=self.returns_weights)
        if not self.layer.batch_first:
            y = y.transpose(0, 1)
        return y if weights is None else torch.cat([y.flatten(1), weights.flatten(1)], dim=1)


ATTENTION = {
    "self": {"batch_first": True},
    "sequence first": {},
    "without bias": {"batch_first": True, "bias": False},
    "other widths": {"batch_first": True, "cross": True, "kdim": 12, "vdim": 20},
    "other widths, no bias": {"cross": True, "kdim": 12, "vdim": 20, "bias": False},
    "cross": {"batch_first": True, "cross": True},
    "learned key": {"batch_first": True, "add_bias_kv": True},
    "zero key": {"batch_first": True, "add_zero_attn": True},
    "weights": {"batch_first": True, "returns_weights": True},
    "weights, cross": {"cross": True, "returns_weights": True},
}


@pytest.mark.parametrize("projections", ["output", "all"])
@pytest.mark.parametrize("name", ATTENTION)
def test_multi_head_attention(name, projections):
    model = Attention(**ATTENTION[name])
    if name == "learned key":
        nn.init.normal_(model.layer.bias_k)
    everything = lambda name, parameter: parameter.ndim == 2  # noqa: E731
    check(model, sequences(), parameters=everything if projections == "all" else None)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_masks(kind, by_head):
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    forbidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    padding = torch.arange(7) >= torch.tensor([7, 3, 5, 6, 7])[:, None]

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        mask = forbidden.expand(len(x) * 4, 7, 7) if by_head else forbidden
        pad = padding[: len(x)]
        if kind == "float":
            mask, pad = (torch.zeros(m.shape).masked_fill(m, -9.0) for m in (mask, pad))
        y, _ = model(x, x, x, attn_mask=mask, key_padding_mask=pad, need_weights=False)
        return y

    check(layer, sequences(), forward=forward, parameters=["in_proj_weight", "out_proj.weight"])


class Heads(nn.Module):
    """Scaled dot-product attention called as language models do."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)
        self.keys = nn.Linear(16, 8 if "enable_gqa" in options else 16)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, 4)).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            heads(self.mix(x)), heads(self.keys(x)), heads(self.keys(x)), **self.options
        )
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": torch.ones(7, 7).tril().bool()},
        {"attn_mask": torch.randn(1, 4, 7, 7)},
        {"enable_gqa": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_scaled_dot_product_attention(options):
    check(Heads(**options), sequences())


def test_attention_masks_of_each_example_and_those_that_depend_on_the_weights():
    class Biased(Heads):
        def forward(self, x: Tensor) -> Tensor:
            mask = self.mix(x).mean(-1)[:, None, None, :]
            self.options = {"attn_mask": x.mean(-1)[:, None, :, None] + mask}
            first = super().forward(x)
            self.options = {"attn_mask": (x.mean(-1)[:, None, :, None] > 0).expand(-1, 4, 7, 7)}
            return first + super().forward(x).nan_to_num()

    check(Biased(), sequences())


def test_attention_without_a_head_dimension():
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.mix(x), x, x)

    check(Single(), sequences())


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.before = nn.Linear(16, 12)
        self.recurrent = layer(12, 10, batch_first=True, **options)
        width = options.get("proj_size") or 10
        self.after = nn.Linear(width * 2 if options.get("bidirectional") else width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.recurrent(self.before(x))[0][:, -1])


RECURRENT = [(nn.LSTM, {}), (nn.LSTM, {"proj_size": 5}), (nn.GRU, {}), (nn.RNN, {})]


@pytest.mark.parametrize(("layer", "options"), RECURRENT)
def test_recurrent_networks_whose_linear_layers_are_pruned(layer, options):
    check(Recurrent(layer, **options), sequences(), fallback=ANY)


@pytest.mark.parametrize(("layer", "options"), [*RECURRENT, (nn.LSTM, {"bidirectional": True})])
def test_recurrent_networks_whose_own_weights_are_pruned(layer, options):
    model = Recurrent(layer, **options)
    data = sequences()
    before = model(data[0])
    check(model, data, fallback=ANY, parameters=lambda name, parameter: parameter.ndim == 2)
    assert torch.equal(model(data[0]), before)


def test_recurrent_cells_in_a_loop():
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(16, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(len(x), 8)
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state)

    for parameters in (None, lambda name, parameter: parameter.ndim == 2):
        check(Cells(), sequences(), fallback=ANY, parameters=parameters)


class Language(nn.Module):
    """Input and output embeddings tied, positions added."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16, **options)
        self.positions = nn.Parameter(torch.randn(7, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens) + self.positions))


def tokens(n: int = 9, length: int = 7, vocabulary: int = 23) -> Tensor:
    return torch.randint(0, vocabulary, (n, length))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"max_norm": 100.0}])
def test_tied_embeddings(options):
    check(
        Language(**options),
        list(tokens().split(5)),
        fallback=ANY if "max_norm" in options else None,
    )


def test_bags_of_embeddings():
    model = nn.Sequential(nn.EmbeddingBag(23, 8, mode="mean"), nn.Linear(8, 3))
    check(model, list(tokens().split(5)), parameters=["0.weight", "1.weight"], fallback=ANY)


class Products(nn.Module):
    """A weight used in some other way than as a layer."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.randn(*shape) / 4)
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.product(x, self.weight))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transposed": lambda x, w: x @ w.t(),
    "property T": lambda x, w: x @ w.T,
    "matmul": torch.matmul,
    "mm": torch.mm,
    "first factor": lambda x, w: (w @ x.t()).t(),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "view": lambda x, w: F.linear(x, w.view(5, 20).reshape(10, 10)),
    "slice": lambda x, w: torch.cat([F.linear(x, w[:4]), F.linear(x, w[4:])], dim=-1),
    "chunk": lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(2)], dim=-1),
    "twice": lambda x, w: F.linear(F.linear(x, w).relu(), w),
    "transposed and not": lambda x, w: F.linear(x, w) + F.linear(x, w.t()),
    "scaled": lambda x, w: F.linear(x, w / w.norm()),
    "standardised": lambda x, w: F.linear(x, (w - w.mean(1, True)) / (w.std(1, keepdim=True) + 1)),
    "copied": lambda x, w: F.linear(x, w.clone().detach()),
    "addmm": lambda x, w: torch.addmm(torch.ones(10), x, w),
    "addmm, scaled": lambda x, w: torch.addmm(torch.ones(10), x, w, beta=0.5, alpha=2),
    "addmm, weight first": lambda x, w: torch.addmm(torch.ones(1), w, x.t()).t(),
    "baddbmm": lambda x, w: torch.baddbmm(torch.ones(1), x[None], w[None])[0],
    "keywords": lambda x, w: F.linear(input=x, weight=w, bias=None),
    "one vector": lambda x, w: torch.stack([F.linear(row, w) for row in x]),
    "as a bias": lambda x, w: F.linear(x, torch.eye(10), w[0]),
    "in a list": lambda x, w: x @ torch.cat([w[:5], w[5:]]) + torch.stack([w, w]).sum((0, 1)),
    "out of place": lambda x, w: x @ w.mul(2).add_(1),
    "shape and type": lambda x, w: x[:, : w.shape[0]].to(w.dtype) @ w.reshape(w.size(0), -1),
    "indexed": lambda x, w: x @ w[torch.arange(9, -1, -1)],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_weight_may_be_used_in_any_way(name):
    model = Products(PRODUCTS[name], 10, 10)
    check(model, vectors(), parameters=["weight", "head.weight"])


def test_biases_and_norms_can_be_pruned_too():
    model = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    nn.init.normal_(model[1].weight)
    check(model, vectors(), parameters=lambda name, parameter: True)
    norm = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3))
    nn.init.normal_(norm[1].weight)
    check(norm, images(), parameters=lambda name, parameter: True)


@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_without_fixed_statistics(affine):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, affine=affine, track_running_stats=False),
        nn.Conv2d(6, 2, 3),
    )
    check(model, images(16))


def test_parametrized_layers_beside_pruned_ones():
    class Sandwich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(10, 8)
            self.middle = nn.utils.parametrizations.weight_norm(nn.Bilinear(8, 8, 6))
            self.after = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x)
            return self.after(self.middle(y, y))

    check(Sandwich(), vectors())


def test_effective_weights_of_a_parametrization_may_be_pruned_through_their_sources():
    model = nn.Sequential(nn.Linear(10, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)))
    check(
        model,
        vectors(),
        parameters=["0.weight", "1.parametrizations.weight.original1"],
        grid=GRID[:5],
    )


def test_complex_steps_between_layers():
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(16, 16)
            self.after = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.before(x)
            y = y + torch.fft.fft2(y).real
            y = y.sort(dim=-1).values.cumsum(1)
            y = torch.where(y > 0, y, y.exp() - 1)
            return self.after(F.normalize(y, dim=-1)).softmax(-1).topk(2).values

    check(Fourier(), sequences())


def test_outputs_in_a_tuple_are_taken_out_by_forward():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return x, {"scores": self.layer(x)}

    check(Two(), vectors(), forward=lambda model, batch: model(batch)[1]["scores"])


class HuggingFace:
    """Tiny networks of every family, from configurations."""

    @staticmethod
    def build(family: str, attention: str) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
        transformers = pytest.importorskip("transformers")
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        small["attn_implementation"] = attention
        vocabulary = {"vocab_size": 23, "max_position_embeddings": 16}

        def text(n: int) -> dict[str, Tensor]:
            lengths = torch.randint(2, 8, (n, 1))
            return {
                "input_ids": tokens(n, 7, 23),
                "attention_mask": (torch.arange(7) < lengths).long(),
                "labels": torch.randint(0, 3, (n,)),
            }

        if family == "bert":
            config = transformers.BertConfig(
                **small, **vocabulary, intermediate_size=24, num_labels=3
            )
            return transformers.BertForSequenceClassification(config), text
        if family == "llama":
            config = transformers.LlamaConfig(
                **small, **vocabulary, intermediate_size=24, num_key_value_heads=1
            )
            return transformers.LlamaForCausalLM(config), text
        if family == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=23,
                n_positions=16,
                n_embd=16,
                n_layer=2,
                n_head=2,
                attn_implementation=attention,
            )
            return transformers.GPT2LMHeadModel(config), text
        config = transformers.ViTConfig(
            **small, intermediate_size=24, image_size=8, patch_size=4, num_labels=3
        )
        return transformers.ViTForImageClassification(config), lambda n: {
            "pixel_values": torch.randn(n, 3, 8, 8),
            "labels": torch.randint(0, 3, (n,)),
        }


FAMILIES = [*((family, "sdpa") for family in ("bert", "llama", "gpt2", "vit")), ("llama", "eager")]


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_hugging_face_networks(family, attention):
    model, batch = HuggingFace.build(family, attention)
    assert model.config._attn_implementation == attention
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    check(model, [batch(5), batch(3)])
