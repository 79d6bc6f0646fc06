"""The demonstration: handwritten digits, from training to a certified sparse network."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import confprune
from confprune import checkpoint
from confprune.certificate import Certificate
from confprune.certificate.promise import sparsity_text
from confprune.certificate.report import WIDTH

TRAINING, CALIBRATION = 600, 700  # of 1797 images; the others are the test set
EPOCHS = 40
BATCH = 60
# Small weights are what magnitude pruning takes: the L1 penalty makes many of them.
L1_PENALTY = 4e-4


class Examples(NamedTuple):
    """Images [n, 1, 8, 8] with values in [0, 1], and their digits [n]."""

    images: Tensor
    digits: Tensor


class DigitNet(nn.Module):
    """A convolutional network with batch normalisation and a residual block."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.residual = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.widen = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Score the ten digits: images [n, 1, 8, 8] to [n, 10]."""
        features = self.stem(images)
        features = self.widen(F.relu(features + self.residual(features)))
        scores: Tensor = self.head(features.mean((2, 3)))
        return scores


def run(
    out: str | os.PathLike[str] = "demo",
    *,
    seed: int = 0,
    alpha: float = 0.05,
    delta: float = 0.1,
    epochs: int = EPOCHS,
    progress: bool = True,
) -> Certificate:
    """Train, calibrate, prune, check on held-out images; print a report, write the results.

    Parameters
    ----------
    out : path
        Folder to write ``certificate.json``, ``risk.png`` and ``pruned.safetensors`` to.
    seed : int
        What splits the images, starts the network and orders its batches.
    alpha, delta : float
        The promise, as for `confprune.calibrate`; the loss is disagreement.
    epochs : int
        Length of the training.
    progress : bool
        Whether to show progress bars.

    Returns
    -------
    Certificate

    Raises
    ------
    ImportError
        If scikit-learn, whose digits are used, or matplotlib is missing.
    """
    start = time.perf_counter()
    _require_matplotlib()
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, not a folder")
    training, calibration, test = _digits(seed)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = _trained(DigitNet(), training, epochs, progress)

    def calibrated(looks: str | None) -> Certificate:
        # No labels go in: disagreement compares the pruned network with the full one.
        return confprune.calibrate(
            model,
            (calibration.images,),
            loss="disagreement",
            alpha=alpha,
            delta=delta,
            looks=looks,
            seed=seed,
            progress=progress,
        )

    # One test on all images, so that the picture shows the whole curve; then once more with early
    # looks, to say what they save.
    certificate, early = calibrated(looks=None), calibrated(looks="auto")
    sparse = certificate.prune(model)
    levels = confprune.prune_levels(model, certificate.sparsities)
    losses = confprune.loss_matrix(model, (test.images,), levels, "disagreement", progress=progress)

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(sparse, folder / "pruned.safetensors", certificate)
    certificate.plot(folder / "risk.png", test_risks=losses.mean(0).tolist())
    certificate.save(folder / "certificate.json")
    print(certificate)
    print(f"\n{_held_out(model, sparse, test, certificate)}")
    print(f"\n{_saved(early)}")
    print(f"\nWritten to {folder}: certificate.json, risk.png, pruned.safetensors")
    print(f"({time.perf_counter() - start:.0f} s)")
    return certificate


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the demo draws with matplotlib: pip install matplotlib") from error


def _digits(seed: int) -> tuple[Examples, Examples, Examples]:
    """Scikit-learn's digits in three parts: training, calibration and test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the demo takes its digits from scikit-learn: pip install scikit-learn"
        ) from error
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)[order]
    labels = torch.from_numpy(digits.target)[order]
    first, second = TRAINING, TRAINING + CALIBRATION
    return (
        Examples(images[:first], labels[:first]),
        Examples(images[first:second], labels[first:second]),
        Examples(images[second:], labels[second:]),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the batches are too small for more, which on a busy machine only wait.

    The trained network then does not depend on the number of cores either.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trained(model: nn.Module, examples: Examples, epochs: int, progress: bool) -> nn.Module:
    """Train with Adam on images shifted by up to one pixel; evaluation mode afterwards."""
    optimizer = torch.optim.Adam(model.parameters())
    batches = -(-len(examples.digits) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=epochs * batches
    )
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=not progress):
        for batch in torch.randperm(len(examples.digits)).split(BATCH):
            scores = model(_shifted(examples.images[batch]))
            loss = F.cross_entropy(scores, examples.digits[batch])
            loss = loss + L1_PENALTY * torch.stack([w.abs().sum() for w in weights]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _shifted(images: Tensor) -> Tensor:
    down, right = torch.randint(0, 3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]


def _saved(early: Certificate) -> str:
    """What the same calibration takes with early looks."""
    assert early.looks is not None
    found = sparsity_text(early, early.sparsity) if early.certified else "no"
    return textwrap.fill(
        f"This was one test on all {early.n} calibration images, to show the whole curve. Early "
        f"looks, the default of calibrate, take {100 * (1 - early.looks.saved):.0f} % of these "
        f"evaluations; they certify {found} sparsity. Either promise holds if it is chosen before "
        "the results are seen.",
        WIDTH,
    )


@torch.no_grad()
def _held_out(full: nn.Module, sparse: nn.Module, test: Examples, certificate: Certificate) -> str:
    """What the promise is worth on images that neither training nor calibration saw."""
    full_answers, sparse_answers = full(test.images).argmax(1), sparse(test.images).argmax(1)
    disagreement = (full_answers != sparse_answers).double().mean().item()
    full_accuracy = (full_answers == test.digits).double().mean().item()
    sparse_accuracy = (sparse_answers == test.digits).double().mean().item()
    verdict = "kept" if disagreement <= certificate.alpha else "not kept on these images"
    return (
        f"On {len(test.digits)} held-out images\n"
        f"  disagreement  {disagreement:.4f}, promised at most {certificate.alpha:g}: {verdict}\n"
        f"  accuracy      {full_accuracy:.4f} full, {sparse_accuracy:.4f} pruned"
    )
