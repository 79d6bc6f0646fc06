"""The networks of the experiments, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from confprune.criteria import WeightObserver

# Small weights are what magnitude pruning takes: a little L1 makes many of them.
L1_PENALTY = 2e-5


class LeNet300(nn.Sequential):
    """LeNet-300-100: two hidden layers."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(height * width, 300),
            nn.ReLU(),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )


class SmallCNN(nn.Sequential):
    """Two convolutions and two linear layers."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * (height // 4) * (width // 4), 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


class UNet(nn.Module):
    """A small U-Net: three scales down and up again, joined at each; one logit a pixel."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1 = _double(3, width)
        self.down2 = _double(width, 2 * width)
        self.down3 = _double(2 * width, 4 * width)
        self.bottom = _double(4 * width, 8 * width)
        self.up3 = _double(12 * width, 4 * width)
        self.up2 = _double(6 * width, 2 * width)
        self.up1 = _double(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the foreground: images [n, 3, h, w] to [n, 1, h, w]."""
        first = self.down1(images)
        second = self.down2(F.max_pool2d(first, 2))
        third = self.down3(F.max_pool2d(second, 2))
        x = self.bottom(F.max_pool2d(third, 2))
        for skip, up in ((third, self.up3), (second, self.up2), (first, self.up1)):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class Trained(NamedTuple):
    """A network, and how much its weights moved at the end; None where that is not known."""

    model: nn.Module
    deviations: dict[str, Tensor] | None


Objective = Callable[[Tensor, Tensor], Tensor]


def classification_loss(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels)


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross entropy and Dice loss together: the first is smooth, the second sees small objects."""
    shares, truth = logits.sigmoid().flatten(1), masks.flatten(1).float()
    overlap = (2 * (shares * truth).sum(1) + 1) / (shares.sum(1) + truth.sum(1) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks.float()) + (1 - overlap).mean()


def train(
    make: Callable[[], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    title: str,
    progress: bool = True,
) -> Trained:
    """Train a network with Adam; its weights are followed through the last quarter."""
    steps = -(-len(inputs) // batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
        weights = [p for p in model.parameters() if p.dim() > 1]
        observer = WeightObserver(model)
        for number in tqdm(range(epochs), f"training {title}", disable=not progress):
            for index in torch.randperm(len(inputs)).split(batch):
                loss = objective(model(inputs[index]), targets[index])
                loss = loss + L1_PENALTY * torch.stack([w.abs().sum() for w in weights]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if number >= epochs - max(1, epochs // 4):
                    observer.update()
    return Trained(model.eval(), observer.deviations())


def load_unet(path: Path) -> Trained:
    """The user's own U-Net from a state dict, in safetensors or by `torch.save`.

    Raises
    ------
    ValueError
        If the file cannot be read, or is of another architecture, naming the difference.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    state = _state_dict(path)
    head = state.get("head.weight")
    width = head.shape[1] if isinstance(head, Tensor) and head.ndim == 4 else 8
    model = UNet(width)
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in expected]
    wrong += [
        f"{name} has shape {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{path} is of another architecture than benchmarks.paper.networks.UNet: "
            f"{wrong[0]}{more}"
        )
    model.load_state_dict(state)
    return Trained(model.eval(), None)


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is corrupt or not a checkpoint: {error}") from error
    except Exception as error:  # what unpickling raises has no common type
        raise ValueError(f"{path} is not a state dict: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a state dict: names and tensors")
    return state
