"""Prune a checkpoint without loading it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from confprune.checkpoint.certified import certified_tensors, tied_copies
from confprune.checkpoint.choice import choose, pruned_tensors
from confprune.checkpoint.cuts import Progress, find_cuts, reads
from confprune.checkpoint.layout import StoredTensor
from confprune.checkpoint.masking import Masks
from confprune.checkpoint.metadata import certified_record, plain_record
from confprune.checkpoint.output import Output, check_space, output_paths
from confprune.checkpoint.reading import BLOCK, Buffers, Bytes, ahead, file_blocks
from confprune.checkpoint.scores import scored_blocks
from confprune.checkpoint.source import Checkpoint, open_checkpoint
from confprune.criteria import Criterion, resolve_criterion
from confprune.levels import SCOPES, check_sparsities

if TYPE_CHECKING:
    from confprune.certificate import Certificate


@dataclass(frozen=True)
class Pruned:
    """What `prune` has written.

    Attributes
    ----------
    paths : tuple of pathlib.Path
        The file or folder of each sparsity.
    sparsities : tuple of float
        The sparsities.
    counts : tuple of int
        How many weights were pruned at each.
    total : int
        Number of prunable weights; tied ones count once.
    names : tuple of str
        The tensors that were pruned, in the order that breaks ties.
    """

    paths: tuple[Path, ...]
    sparsities: tuple[float, ...]
    counts: tuple[int, ...]
    total: int
    names: tuple[str, ...]


def prune(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sparsity: float | Sequence[float] | None = None,
    certificate: Certificate | None = None,
    scope: str = "global",
    criterion: str = "magnitude",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    progress: bool = True,
) -> Pruned:
    """Prune a checkpoint of any size, without loading it.

    At sparsity s exactly round(s · d) of the d prunable weights are set to zero, the smallest
    magnitudes first, ties broken by position: file by file in the order of their names, then in
    the order in which the tensors lie in the file. The weights are those that `prune_levels` would
    prune, to the last bit. Everything else stays as it is, to the last bit as well; the metadata of
    the files gain the sparsity.

    The source is read twice or three times in pieces (once to write; before that once for 16-bit
    weights, twice for float32, more often for float64). Nothing but pieces is in memory. The
    outputs appear when all of them are complete and on the disk; until then, nothing changes.

    Parameters
    ----------
    source : path
        A ``.safetensors`` file; the ``.safetensors.index.json`` of several; or a folder that holds
        either, as Hugging Face's ``save_pretrained`` writes it: the rest of its files is copied.
    out : path
        The file to write, which may be `source`; or, for several files, the folder, which must be
        new or empty. ``{sparsity}`` in it stands for the sparsity.
    sparsity : float or sequence of float, optional
        Share of the prunable weights to prune, in [0, 1), without a guarantee. Several, strictly
        increasing, give one output each, for one selection and one read of the source.
    certificate : Certificate, optional
        Prune what it was made for, to the sparsity that it certifies.
    scope, criterion : str
        As for `confprune.prune_levels`; with a certificate, its own. A criterion other than
        ``"magnitude"`` has each tensor whole in memory.
    include, exclude : sequence of str, optional
        Patterns of names; see `choose`, which tells what they lead to.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Pruned

    Raises
    ------
    ValueError
        If the source is not a whole checkpoint; if nothing in it is to be pruned; if a weight is
        NaN; if the certificate certifies nothing or was made for other weights (the difference is
        named); if `out` does not fit.
    OSError
        If a file is missing, cannot be read or written, or the disk is full.

    Examples
    --------
    >>> import tempfile, torch
    >>> from confprune import checkpoint
    >>> from safetensors.torch import load_file, save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": torch.arange(1.0, 9).view(2, 4)}, f"{folder}/model.safetensors")
    ...     pruned = checkpoint.prune(
    ...         f"{folder}/model.safetensors",
    ...         f"{folder}/pruned-{{sparsity}}.safetensors",
    ...         sparsity=[0.25, 0.5],
    ...     )
    ...     load_file(f"{folder}/pruned-0.5.safetensors")["fc.weight"]
    tensor([[0., 0., 0., 0.],
            [5., 6., 7., 8.]])
    >>> pruned.counts, pruned.total
    ((2, 4), 8)
    """
    if (sparsity is None) == (certificate is None):
        raise ValueError("give either sparsity or certificate")
    if certificate is not None and (include or exclude):
        raise ValueError("include and exclude go with sparsity: a certificate has its own")
    checkpoint = open_checkpoint(source)
    if certificate is not None:
        task = _certified_task(checkpoint, certificate)
    else:
        grid = check_sparsities(np.atleast_1d(np.asarray(sparsity, dtype=np.float64)))
        task = _Task(
            grid,
            [plain_record(value) for value in grid],
            pruned_tensors(choose(checkpoint, include=include, exclude=exclude)),
            scope,
            criterion,
        )
    if task.scope not in SCOPES:
        raise ValueError(f"scope {task.scope!r} is unknown; choose from {list(SCOPES)}")
    score = resolve_criterion(task.criterion)
    paths = output_paths(out, task.sparsities, checkpoint)
    check_space(checkpoint, paths)
    if checkpoint.unpruned_weights:
        warnings.warn(
            f"copied as they are, not pruned: {', '.join(checkpoint.unpruned_weights)}",
            stacklevel=2,
        )
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=_work(checkpoint, task, score),
                desc="pruning",
                unit="B",
                unit_scale=True,
                delay=1,
                disable=not progress,
            )
        )
        masks = _masks(task, score, bar.update)
        outputs = [
            Output(checkpoint, path, record, stack)
            for path, record in zip(paths, task.records, strict=True)
        ]
        _copy_kept(checkpoint, task, outputs, bar.update)
        _write_pruned(task, masks, score, outputs, bar.update)
        for output in outputs:
            output.flush()
        for output in outputs:
            output.place()
    return Pruned(
        paths=tuple(paths),
        sparsities=task.sparsities,
        counts=tuple(sum(column) for column in zip(*map(task.counts, task.groups), strict=True)),
        total=sum(tensor.size for tensor in task.tensors),
        names=tuple(tensor.name for tensor in task.tensors),
    )


@dataclass(frozen=True)
class _Task:
    """What is to be pruned, and how."""

    sparsities: tuple[float, ...]
    records: list[dict[str, str]]
    tensors: list[StoredTensor]
    scope: str
    criterion: str
    copies: dict[str, list[StoredTensor]] = field(default_factory=dict)

    @property
    def groups(self) -> list[list[StoredTensor]]:
        """The tensors that compete with one another."""
        return [self.tensors] if self.scope == "global" else [[t] for t in self.tensors]

    def counts(self, group: list[StoredTensor]) -> list[int]:
        """How many weights of a group are pruned at each level."""
        size = sum(tensor.size for tensor in group)
        return [round(sparsity * size) for sparsity in self.sparsities]

    def places(self, tensor: StoredTensor) -> list[StoredTensor]:
        """Where a pruned tensor is stored."""
        return [tensor, *self.copies.get(tensor.name, ())]


def _certified_task(checkpoint: Checkpoint, certificate: Certificate) -> _Task:
    tensors = certified_tensors(checkpoint, certificate)
    pruning = certificate.pruning
    assert pruning is not None
    return _Task(
        (certificate.sparsity,),
        [certified_record(certificate)],
        tensors,
        pruning.scope,
        pruning.criterion,
        tied_copies(checkpoint, tensors),
    )


def _work(checkpoint: Checkpoint, task: _Task, score: Criterion) -> int:
    """Bytes that are counted, and bytes that are written."""
    counted = sum(
        reads(group, task.counts(group), score) * sum(tensor.nbytes for tensor in group)
        for group in task.groups
    )
    return counted + len(task.sparsities) * checkpoint.nbytes


def _masks(task: _Task, score: Criterion, progress: Progress) -> list[Masks]:
    return [Masks(find_cuts(group, task.counts(group), score, progress)) for group in task.groups]


def _copy_kept(
    checkpoint: Checkpoint, task: _Task, outputs: Sequence[Output], progress: Progress
) -> None:
    """Write everything but the pruned tensors."""
    pruned = {(p.path, p.name) for tensor in task.tensors for p in task.places(tensor)}
    ranges = [(file, 0, file.stat().st_size) for file in checkpoint.rest]
    for layout in checkpoint.layouts:
        progress(len(outputs) * layout.data_start)
        ranges += [
            (layout.path, tensor.start, tensor.end)
            for tensor in layout.tensors
            if (layout.path, tensor.name) not in pruned
        ]
    for file, start, block in ahead(_blocks(ranges)):
        for output in outputs:
            output.write(file, start, block.data)
            progress(len(block))


def _blocks(ranges: Sequence[tuple[Path, int, int]]) -> Iterator[tuple[Path, int, Bytes]]:
    """The bytes of parts of files, and where they lie."""
    buffers = Buffers()
    for file, start, end in ranges:
        for block in file_blocks(file, start, end, BLOCK, buffers):
            yield file, start, block
            start += len(block)


def _write_pruned(
    task: _Task,
    masks: Sequence[Masks],
    score: Criterion,
    outputs: Sequence[Output],
    progress: Progress,
) -> None:
    """Write the pruned tensors, in the order of ties."""
    for output, place, start, data in ahead(_pruned_blocks(task, masks, score, outputs)):
        output.write(place.path, start, data)
        progress(data.nbytes)


def _pruned_blocks(
    task: _Task, masks: Sequence[Masks], score: Criterion, outputs: Sequence[Output]
) -> Iterator[tuple[Output, StoredTensor, int, memoryview]]:
    """What goes where in place of the pruned tensors."""
    read, pruned_buffers = Buffers(), Buffers()
    for group, mask in zip(task.groups, masks, strict=True):
        for tensor in group:
            offset = 0
            for block in scored_blocks(tensor, score, BLOCK, read):
                levels = mask.masked(block, pruned_buffers)
                for output, pruned in zip(outputs, levels, strict=True):
                    for place in task.places(tensor):
                        yield output, place, place.start + offset, pruned.data
                offset += block.weights.nbytes
