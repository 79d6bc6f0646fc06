"""Losses of all candidates under test, example by example.

A candidate is a level of some grid; there is one grid for each way of pruning. What the tests need
of an example are its losses at the candidates, its group, and where its prediction is accepted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from confprune.batches import (
    Reordered,
    batch_length,
    batches,
    check_data,
    example_count,
    generous_batch_size,
    move_batch,
    slice_batch,
)
from confprune.distributed import ALONE, Ranks
from confprune.grid import GridForward
from confprune.grid.network import eagerly
from confprune.losses import Loss
from confprune.risk.inputs import IntArray
from confprune.risks import Groups, Target, group_labels

_ROUNDING = 1e-5  # a loss may leave [0, 1] by this much in float arithmetic


@dataclass(frozen=True)
class Evidence:
    """What some examples say of A candidates.

    Attributes
    ----------
    losses : [L, B, A] float32
    accepted : [B, A] bool, or None where every prediction counts
    labels : group of each example, or None
    """

    losses: NDArray[np.float32]
    accepted: NDArray[np.bool_] | None
    labels: NDArray[np.str_] | None

    def at(self, columns: IntArray) -> Evidence:
        """What the examples say of the candidates of some columns."""
        accepted = None if self.accepted is None else self.accepted[:, columns]
        return Evidence(self.losses[:, :, columns], accepted, self.labels)

    def of(self, target: Target, losses: Sequence[Loss]) -> tuple[NDArray[np.float32], Any]:
        """The losses [B, A] that a target is about, and which of them count (None: all)."""
        matrix = self.losses[[loss.name for loss in losses].index(target.risk.loss.name)]
        counted = self.accepted
        if target.group is not None and self.labels is not None:
            member = self.labels == target.group
            counted = member if counted is None else counted & member[:, None]
        return matrix, counted


@dataclass(frozen=True)
class Measured:
    """Losses where they were computed, until a test asks for them: a device need not be waited for.

    Attributes
    ----------
    values : Tensor [L or L + 1, B, A]
        The losses, and what `accept` gave.
    active : [A] int
        Their candidates.
    first : int
        Place of the first example in the order of evaluation.
    labels : group of each example, or None
    """

    values: Tensor
    active: IntArray
    first: int
    labels: NDArray[np.str_] | None


class Evaluation:
    """The losses of candidates on batches of data.

    Parameters
    ----------
    model : torch.nn.Module
    grids : sequence of GridForward
        One for each way of pruning, all with the same measures: the losses, then `accept` if given.
    candidates : sequence of (grid, level)
        C pairs, in the order of testing.
    losses : sequence of Loss
    accept : Loss, optional
    groups : key or callable, optional
    ranks : Ranks
        Who else evaluates: all go through the same data, and each chunk of examples is for one.
        The chunks are those of a single process, because a network's outputs on an example may
        depend in the last bits on how many others are with it.

    Attributes
    ----------
    waits : bool
        Whether `completed` waits for a device, and is best called once a look.
    """

    def __init__(
        self,
        model: nn.Module,
        grids: Sequence[GridForward],
        candidates: Sequence[tuple[int, int]],
        losses: Sequence[Loss],
        accept: Loss | None = None,
        groups: Groups | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.losses = tuple(losses)
        self._model = model
        self._grids = tuple(grids)
        self._candidates = np.array(candidates, dtype=np.int64).reshape(-1, 2)
        self._accept = accept
        self._groups = groups
        self.ranks = ranks
        self._share = itertools.cycle([rank == ranks.rank for rank in range(ranks.size)])
        self._seen = 0
        self.waits = next(model.parameters()).device.type != "cpu"
        self._order: Tensor | None = None
        self._bar = tqdm(disable=True)
        self.selective = accept is not None

    def __len__(self) -> int:
        return len(self._candidates)

    @contextmanager
    def stream(
        self, data: Any, batch_size: int | None, order: Tensor | None, progress: bool
    ) -> Iterator[Iterator[Any]]:
        """The batches of `data` on the model's device; within, nothing is compiled."""
        self._order = order
        check_data(data, batch_size)
        if batch_size is None:
            batch_size = generous_batch_size(data)  # the grids take batches apart
        # No generator may hold the mode: an exception would leave it to the garbage collector.
        with (
            eagerly(),
            progress_bar(data, order, progress, "calibrate") as self._bar,
            closing(moved_batches(self._model, data, batch_size, order, Reordered)) as stream,
        ):
            yield stream

    def __call__(self, batch: Any, active: IntArray) -> Measured:
        """Evaluate the candidates at `active` [A] on the next examples.

        What other ranks evaluate is 0 in it, until `completed`.

        Raises
        ------
        ValueError
            If a loss is NaN or outside [0, 1]; from a device other than the CPU `completed` says
            so.
        """
        size = batch_length(batch)
        parts = []
        grid_of, level_of = self._candidates[active].T
        order = np.lexsort((level_of, grid_of))  # a grid takes increasing levels
        stops = np.bincount(grid_of, minlength=len(self._grids)).cumsum().tolist()
        start = 0
        for grid, stop in zip(self._grids, stops, strict=True):
            if start < stop:
                levels = level_of[order[start:stop]].tolist()
                done = self._bar.update if stop == len(order) else None
                parts.append(grid.evaluate(batch, levels, done=done, share=self._share))
            start = stop
        labels = None
        if self._groups is not None:
            whole = slice_batch(batch, 0, size)
            labels = np.array(group_labels(whole, self._groups), dtype=np.str_)
        values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if (order[1:] < order[:-1]).any():
            index = torch.from_numpy(np.argsort(order))
            values = values[..., index.to(values.device, non_blocking=True)]
        measured = Measured(values, active, self._seen, labels)
        if values.device.type == "cpu":
            self._check_values(measured)
        self._seen += size
        return measured

    def capacity(self, batch: Any, active: IntArray) -> int:
        """The most examples that cost little more than one at the candidates at `active` [A]."""
        levels = np.bincount(self._candidates[active, 0], minlength=len(self._grids)).tolist()
        pairs = zip(self._grids, levels, strict=True)
        return min(grid.capacity(batch, count) for grid, count in pairs if count)

    def completed(self, measured: Measured) -> Evidence:
        """The evidence on the host, with what every rank has evaluated of it.

        Raises
        ------
        ValueError
            If a loss is NaN or outside [0, 1].
        """
        if measured.values.device.type != "cpu":
            measured = replace(measured, values=measured.values.cpu())
            self._check_values(measured)
        values = measured.values.clamp_(0, 1).numpy()
        accepted = None if self._accept is None else values[-1] > 0.5
        evidence = Evidence(values[: len(self.losses)], accepted, measured.labels)
        if self.ranks.size == 1:
            return evidence
        accepted = evidence.accepted
        if accepted is not None:
            accepted = self.ranks.sum(accepted.astype(np.uint8)).astype(bool)
        # One number and zeros: their sum is exact in any order.
        return replace(evidence, losses=self.ranks.sum(evidence.losses), accepted=accepted)

    def _check_values(self, measured: Measured) -> None:
        """Raise ValueError for the first loss, or acceptance, that is NaN or outside [0, 1]."""
        measures = self.losses if self._accept is None else (*self.losses, self._accept)
        for loss, values in zip(measures, measured.values, strict=True):
            least, most = map(float, values.aminmax())  # lets NaN through
            inside = least >= -_ROUNDING and most <= 1 + _ROUNDING
            if inside and not (loss.binary and not torch.equal(values, values.round())):
                continue
            wrong = ~((values >= -_ROUNDING) & (values <= 1 + _ROUNDING))
            if loss.binary:
                wrong |= (values != 0) & (values != 1)
            row, column = (int(index) for index in wrong.nonzero()[0])
            value = float(values[row, column])
            grid, level = self._candidates[measured.active[column]].tolist()
            position = measured.first + row
            example = position if self._order is None else int(self._order[position])
            way = self._grids[grid].levels
            empty = [name for name, s in way.sparsity_by_layer(level).items() if s == 1]
            what, every = ("accept", "it") if loss is self._accept else ("loss", "losses")
            raise ValueError(
                f"{what} {loss.name!r} is {value:g} for example {example} at level {level} "
                f"(sparsity {way.sparsities[level]:g}); {every} must be "
                + ("0 or 1" if loss.binary and value == value else "in [0, 1]")
                + (
                    ""
                    if value == value
                    else ": the network's outputs are NaN there, or the loss is"
                    + (", or the label is no class" if loss.needs_targets else "")
                    + (
                        f". All weights of {empty[0]!r} are pruned at that sparsity: a grid that "
                        "ends before, sparsities=[...], may help"
                        if empty
                        else ""
                    )
                )
            )


def evaluate_all(
    evaluation: Evaluation,
    data: Any,
    *,
    batch_size: int | None,
    order: Tensor | None,
    progress: bool,
) -> Evidence:
    """The evidence of all examples on all candidates."""
    active = np.arange(len(evaluation))
    with evaluation.stream(data, batch_size, order, progress) as stream:
        own = [evaluation(batch, active) for batch in stream]
    parts = [evaluation.completed(part) for part in own]
    accepted = [part.accepted for part in parts if part.accepted is not None]
    labels = [part.labels for part in parts if part.labels is not None]
    return Evidence(
        np.concatenate([part.losses for part in parts], axis=1),
        np.concatenate(accepted) if accepted else None,
        np.concatenate(labels) if labels else None,
    )


def progress_bar(data: Any, order: Tensor | None, progress: bool, title: str) -> tqdm[Any]:
    """A bar that counts examples; silent without `progress`."""
    total = example_count(data) if order is None else len(order)
    return tqdm(total=total, desc=title, unit="example", disable=not progress)


def moved_batches(
    model: nn.Module,
    data: Any,
    batch_size: int | None,
    order: Tensor | None = None,
    gather: Callable[[Any, Tensor], Any] | None = None,
) -> Generator[Any, None, None]:
    """Batches on the model's device."""
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    for batch in batches(data, batch_size, order, gather):
        yield move_batch(batch, device)
