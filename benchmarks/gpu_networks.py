"""Networks that are calibrated on a GPU, against the loop that masks and runs level by level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.comparisons import at_least, compare
from benchmarks.gpu_timing import wall_seconds
from benchmarks.networks import Residual
from benchmarks.records import Row
from confprune import PruneLevels, Reference, calibrate, calibrate_losses, prune_levels
from confprune.losses import resolve_loss

ALPHA, DELTA = 0.05, 0.1
TARGET = 10.0
_CLASSES, _SIDE = 10, 28
_WORDS, _TOKENS = 5000, 32


class Subject(NamedTuple):
    """A network, what makes it and its examples, and the batch of the loop."""

    name: str
    make: Callable[[int], tuple[nn.Module, Tensor]]
    loss: str
    share: float  # of the examples asked for
    batch: int


class Encoder(nn.Module):
    """The shape of MiniLM: six layers of 384, twelve heads, and the mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, 384)
        layer = nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        states: Tensor = self.layers(self.words(tokens))
        return states.mean(1)


def _images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth prototypes of classes under noise, and the classes."""
    fixed = torch.Generator("cuda").manual_seed(0)
    coarse = torch.randn(_CLASSES, 1, 7, 7, device="cuda", generator=fixed)
    prototypes = F.interpolate(coarse, size=_SIDE, mode="bilinear")
    generator = torch.Generator("cuda").manual_seed(seed)
    labels = torch.randint(0, _CLASSES, (n,), device="cuda", generator=generator)
    noise = torch.randn(n, 1, _SIDE, _SIDE, device="cuda", generator=generator)
    return prototypes[labels] + 1.5 * noise, labels


def _cnn(n: int) -> tuple[nn.Module, Tensor]:
    """A residual network of 32 to 128 channels, trained on the spot for a few seconds."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, _CLASSES)),
    ).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(300):
        x, labels = _images(256, seed=1 + step)
        penalty = sum(p.abs().sum() for p in model.parameters() if p.ndim > 1)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), labels) + 1e-4 * penalty).backward()
        optimizer.step()
    return model.eval().requires_grad_(False), _images(n, seed=0)[0]


def _encoder(n: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Encoder().cuda().eval().requires_grad_(False)
    return model, torch.randint(0, _WORDS, (n, _TOKENS), device="cuda")


SUBJECTS = (
    Subject("residual CNN", _cnn, "disagreement", 1.0, 2048),
    Subject("encoder like MiniLM", _encoder, "cosine", 0.2, 512),
)


def row(subject: Subject, examples: int, levels: int, rounds: int) -> Row:
    """A calibration against the full matrix of the loop, and against its levels up to the last."""
    n = max(200, round(examples * subject.share))
    model, data = subject.make(n)
    grid = [j / levels for j in range(levels)]
    prune = prune_levels(model, grid)
    found: list[Any] = []
    found_losses: dict[int, Tensor] = {}  # of the loop, by the number of its levels

    def calibrated() -> None:
        found.append(
            calibrate(
                *(model, data),
                loss=subject.loss,
                alpha=ALPHA,
                delta=DELTA,
                sparsities=grid,
                progress=False,
            )
        )

    def loop(last: int = levels) -> None:
        found_losses[last] = _loop(model, data, prune, subject, last)

    calibrated()
    certified = -1 if found[-1].level is None else int(found[-1].level)
    names = ("confprune", "all levels", "levels up to the certified one")
    works = (calibrated, loop, lambda: loop(min(levels, certified + 2)))
    times = wall_seconds(dict(zip(names, works, strict=True)), rounds=rounds)
    fixed = calibrate_losses(found_losses[levels], grid, ALPHA, DELTA).level
    fixed_level = -1 if fixed is None else int(fixed)
    looks = found[-1].looks
    return compare(
        f"calibration of a {subject.name}, n = {n}, K = {levels}",
        times[names[0]],
        "level by level in torch, full matrix",
        times[names[1]],
        target=at_least(TARGET),
        agrees=abs(certified - fixed_level) <= 1,
        level=certified,
        fixed_level=fixed_level,
        saved=None if looks is None else round(looks.saved, 5),
        ratio_to_certified=round(_median(times[names[2]]) / _median(times[names[0]]), 2),
        notes=list(found[-1].notes),
    )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@torch.no_grad()
def _loop(
    model: nn.Module, data: Tensor, prune: PruneLevels, subject: Subject, last: int
) -> Tensor:
    """The losses [n, last], each level's masked weights written into the model and run."""
    loss = resolve_loss(subject.loss)
    batches = data.split(subject.batch)
    parameters = dict(model.named_parameters())
    whole = {name: parameters[name].clone() for name in prune.levels}
    references = [Reference(model(batch)) for batch in batches]
    columns = []
    try:
        for j in range(last):
            for name, levels in prune.levels.items():
                torch.mul(whole[name], levels > j, out=parameters[name])
            parts = [loss(model(x), r) for x, r in zip(batches, references, strict=True)]
            columns.append(torch.cat(parts))
    finally:
        for name, weight in whole.items():
            parameters[name].copy_(weight)
    return torch.stack(columns, dim=1).float().cpu()
