"""The networks under test: trained, with their questions and the ways to prune them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from benchmarks.paper.data import Source
from benchmarks.paper.networks import (
    LeNet300,
    SmallCNN,
    Trained,
    UNet,
    classification_loss,
    load_unet,
    segmentation_loss,
    train,
)
from benchmarks.paper.sizes import Part
from benchmarks.paper.tables import Question, Table, joined, make_table
from confprune import confident, input_norms, prune_levels
from confprune.levels import PruneLevels
from confprune.losses import BUILT_IN, Loss, Reference, dice
from confprune.parameters import prunable_parameters

SPARED = 50
"""Weights of each layer that the minimum threshold spares."""


def _accepted_masks(outputs: Tensor, reference: Reference) -> Tensor:
    """Whether the pixels that the network calls foreground are so with 0.9 on average."""
    shares = outputs.float().sigmoid().flatten(1)
    inside = (shares > 0.5).float()
    return ((shares * inside).sum(-1) >= 0.9 * inside.sum(-1).clamp(min=1)).float()


def _dice_to_full(outputs: Tensor, reference: Reference) -> Tensor:
    return dice(outputs, Reference(reference.outputs))


CLASSIFIER_QUESTIONS = (
    Question("labels", BUILT_IN["error"], False, 0.1, (0.05, 0.1, 0.15, 0.2)),
    Question("full network", BUILT_IN["disagreement"], False, 0.05, (0.02, 0.05, 0.1, 0.2)),
    Question("selective", BUILT_IN["disagreement"], True, 0.05, (0.02, 0.05, 0.1, 0.2)),
)
_AGAINST_FULL = Loss("dice to the full network", _dice_to_full, vmappable=True)
SEGMENTER_QUESTIONS = (
    Question("labels", BUILT_IN["dice"], False, 0.25, (0.15, 0.2, 0.25, 0.3)),
    Question("full network", _AGAINST_FULL, False, 0.1, (0.05, 0.1, 0.15, 0.2)),
    Question("selective", _AGAINST_FULL, True, 0.1, (0.05, 0.1, 0.15, 0.2)),
)


@dataclass(frozen=True)
class Task:
    """A network, its data, and the losses of its pool at every level.

    Attributes
    ----------
    name, group : str
        Of the network; what its groups are: classes or centres.
    source : Source
    model : Module
    questions : tuple of Question
    levels : dict from way of pruning to PruneLevels
    tables : dict from way of pruning to Table
    notes : list of str
        What was left out, and why.
    """

    name: str
    group: str
    source: Source
    model: nn.Module
    questions: tuple[Question, ...]
    levels: dict[str, PruneLevels]
    tables: dict[str, Table]
    notes: list[str]

    @property
    def table(self) -> Table:
        """The losses with plain magnitude."""
        return self.tables["magnitude"]

    @property
    def together(self) -> Table:
        """The losses with all ways of pruning, side by side."""
        return joined(list(self.tables.values()))

    @property
    def calibration(self) -> int:
        """Images that calibrate: half of the pool."""
        return len(self.source.pool) // 2

    def split(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A random order of the pool as calibration set and test set."""
        return index[: self.calibration], index[self.calibration :]


def classifier(name: str, source: Source, part: Part, seed: int, *, progress: bool = True) -> Task:
    """Train "LeNet-300-100" or "small CNN", and evaluate its pool."""
    height, width = source.training.inputs.shape[2:]
    kind = {"LeNet-300-100": LeNet300, "small CNN": SmallCNN}[name]
    trained = train(
        partial(kind, height, width),
        source.training.inputs,
        source.training.targets,
        classification_loss,
        # Of few images every one is seen more often.
        epochs=max(part.epochs, min(10 * part.epochs, 40_000 // len(source.training))),
        batch=64,
        rate=5e-3,
        seed=seed,
        title=name,
        progress=progress,
    )
    accept = confident(0.9, of="pruned")
    return _task(
        name, "class", source, trained, CLASSIFIER_QUESTIONS, accept, part.levels, progress
    )


def segmenter(
    source: Source, part: Part, seed: int, checkpoint: Path | None, *, progress: bool = True
) -> Task:
    """Train a U-Net, or take the user's own, and evaluate its pool."""
    if checkpoint is not None:
        trained = load_unet(checkpoint)
    else:
        trained = train(
            UNet,
            source.training.inputs,
            source.training.targets,
            segmentation_loss,
            epochs=part.epochs,
            batch=12,
            rate=1e-2,
            seed=seed,
            title="U-Net",
            progress=progress,
        )
    accept = Loss("sure of the foreground", _accepted_masks, True, vmappable=True)
    return _task(
        "U-Net", "centre", source, trained, SEGMENTER_QUESTIONS, accept, part.levels, progress
    )


def _task(
    name: str,
    group: str,
    source: Source,
    trained: Trained,
    questions: tuple[Question, ...],
    accept: Loss,
    grid: int,
    progress: bool,
) -> Task:
    model = trained.model
    levels, notes = ways(trained, source, grid, progress=progress)
    losses = list({question.loss.name: question.loss for question in questions}.values())
    total = levels["magnitude"].total
    tables = {
        way: make_table(model, source.pool, found, losses, accept, total, progress=progress)
        for way, found in levels.items()
    }
    return Task(name, group, source, model, questions, levels, tables, notes)


def ways(
    trained: Trained, source: Source, size: int, *, progress: bool = True
) -> tuple[dict[str, PruneLevels], list[str]]:
    """The prune levels of every way of pruning, and what had to be left out."""
    model = trained.model
    grid = np.linspace(0, 1, size, endpoint=False)
    weights = prunable_parameters(model)
    total = sum(weight.numel() for weight in weights.values())
    spared = sum(min(SPARED, weight.numel()) for weight in weights.values())
    # Wanda's norms come from images of their own: the pool stays untouched.
    norms = input_norms(model, source.scoring.inputs, progress=progress)
    fours = [name for name, weight in weights.items() if weight.shape[1] % 4 == 0]
    make: dict[str, Callable[[], PruneLevels]] = {
        "magnitude": partial(prune_levels, model, grid),
        "magnitude by layer": partial(prune_levels, model, grid, scope="layer"),
        f"magnitude, {SPARED} of each layer spared": partial(
            prune_levels,
            model,
            grid[np.round(grid * total) <= total - spared],
            criterion=f"magnitude(min_per_layer={SPARED})",
        ),
        "magnitude and uncertainty": partial(
            prune_levels,
            model,
            grid,
            criterion="magnitude_uncertainty",
            statistics={"deviation": trained.deviations or {}},
        ),
        "LAMP": partial(prune_levels, model, grid, criterion="lamp"),
        "Erdős–Rényi kernel": partial(prune_levels, model, grid, criterion="erdos_renyi_kernel"),
        "Wanda": partial(
            prune_levels, model, grid, criterion="wanda", statistics={"input_norm": norms}
        ),
        "random": partial(prune_levels, model, grid, criterion="random"),
        "N:4 inputs": partial(prune_levels, model, grid, pattern="N:4", parameters=fours),
        "4x4 blocks": partial(prune_levels, model, grid, pattern="4x4"),
        "whole outputs": partial(prune_levels, model, grid, pattern="rows"),
    }
    notes = []
    if trained.deviations is None:
        del make["magnitude and uncertainty"]
        notes.append("magnitude and uncertainty needs the training, which a checkpoint is past")
    left = [name for name in weights if name not in fours]
    if left:
        notes.append(f"N:4 leaves out {', '.join(left)}, whose inputs 4 does not divide")
    return {way: levels() for way, levels in make.items()}, notes
