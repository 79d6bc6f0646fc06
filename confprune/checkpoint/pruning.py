"""Prune a checkpoint without loading it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from confprune.checkpoint.choice import choose, pruned_tensors
from confprune.checkpoint.guessed import Correction, GuessedMasks
from confprune.checkpoint.layout import StoredTensor
from confprune.checkpoint.masking import Masks
from confprune.checkpoint.output import Output, check_space, output_paths
from confprune.checkpoint.reading import (
    BLOCK,
    Buffers,
    Bytes,
    ahead,
    file_blocks,
    tensor_blocks,
)
from confprune.checkpoint.source import Checkpoint, open_checkpoint
from confprune.checkpoint.task import Selected, Task, certified_task, plain_task
from confprune.criteria import CriterionLike, resolve_criterion
from confprune.levels import check_sparsities

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
        The sparsities: with a pattern, those that it can reach.
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
    scope: str | None = None,
    criterion: CriterionLike = "magnitude",
    pattern: str | None = None,
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

    The source is read in pieces, and nothing but pieces is in memory. For one sparsity of a large
    file a sample tells about where the weights are cut: it is read once, and a few of the weights
    that were written are put right. For several, or where the sample misleads, it is read once more
    to select 16-bit weights, twice more to select wider ones. The outputs appear when all of them
    are complete; until then, nothing changes. What takes the place of an old file is on the disk
    before.

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
    scope, criterion, pattern : optional
        As for `confprune.prune_levels`; with a certificate, its own. With a criterion other than
        ``"magnitude"``, a pattern, or the scope ``"row"``, the weights are mapped into memory, and
        a byte for each is in memory beside.
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
        NaN; if the certificate certifies nothing, was made for other weights (the difference is
        named), or by a criterion that needs more than the weights; if `out` does not fit.
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
        task = certified_task(checkpoint, certificate)
    else:
        grid = check_sparsities(np.atleast_1d(np.asarray(sparsity)))
        tensors = pruned_tensors(choose(checkpoint, include=include, exclude=exclude))
        task = plain_task(tensors, grid, scope, resolve_criterion(criterion), pattern)
    check_space(checkpoint, output_paths(out, task.sparsities, checkpoint))
    if checkpoint.unpruned_weights:
        warnings.warn(
            f"copied as they are, not pruned: {', '.join(checkpoint.unpruned_weights)}",
            stacklevel=2,
        )
    with ExitStack() as stack:
        bar = stack.enter_context(_bar(len(task.sparsities) * checkpoint.nbytes, progress))
        stack.enter_context(task.nan_named(bar))
        selected = task.select(bar)
        paths = output_paths(out, selected.sparsities, checkpoint)
        outputs = [
            Output(checkpoint, path, task.record(reached), stack)
            for path, reached in zip(paths, selected.sparsities, strict=True)
        ]
        _copy_kept(checkpoint, task, outputs, bar)
        _write_pruned(task, selected, outputs, bar)
        for output in outputs:
            output.place()
    return Pruned(
        paths=tuple(paths),
        sparsities=selected.sparsities,
        counts=selected.counts,
        total=task.total,
        names=tuple(tensor.name for tensor in task.tensors),
    )


def _bar(total: int, progress: bool) -> tqdm:
    """Of bytes written; those read to select are added when it is known how many."""
    return tqdm(
        total=total, desc="pruning", unit="B", unit_scale=True, delay=1, disable=not progress
    )


def _copy_kept(checkpoint: Checkpoint, task: Task, outputs: Sequence[Output], bar: tqdm) -> None:
    """Write everything but the pruned tensors."""
    pruned = {(p.path, p.name) for tensor in task.tensors for p in task.places(tensor)}
    ranges = [(file, 0, file.stat().st_size) for file in checkpoint.rest]
    for layout in checkpoint.layouts:
        bar.update(len(outputs) * layout.data_start)
        ranges += [
            (layout.path, tensor.start, tensor.end)
            for tensor in layout.tensors
            if (layout.path, tensor.name) not in pruned
        ]
    for file, start, block in ahead(_blocks(ranges)):
        for output in outputs:
            output.write(file, start, block.data)
            bar.update(len(block))


def _blocks(ranges: Sequence[tuple[Path, int, int]]) -> Iterator[tuple[Path, int, Bytes]]:
    """The bytes of parts of files, and where they lie."""
    buffers = Buffers()
    for file, start, end in ranges:
        for block in file_blocks(file, start, end, BLOCK, buffers):
            yield file, start, block
            start += len(block)


def _write_pruned(task: Task, selected: Selected, outputs: Sequence[Output], bar: tqdm) -> None:
    """Write the pruned tensors, in the order of ties."""
    for tensors, masks in selected.groups:
        _write_masked(task, tensors, masks, outputs, bar)
        if not isinstance(masks, GuessedMasks):
            continue
        corrections = masks.corrections()
        if corrections is None:
            places = [place for tensor in tensors for place in task.places(tensor)]
            bar.total += len(outputs) * sum(place.nbytes for place in places)
            _write_masked(task, tensors, masks.exact(), outputs, bar)
        else:
            _correct(task, corrections, *outputs)


def _write_masked(
    task: Task,
    tensors: Sequence[StoredTensor],
    masks: Masks,
    outputs: Sequence[Output],
    bar: tqdm,
) -> None:
    for output, place, start, data in ahead(_masked_blocks(task, tensors, masks, outputs)):
        output.write(place.path, place.start + start, data)
        bar.update(data.nbytes)


def _masked_blocks(
    task: Task, tensors: Sequence[StoredTensor], masks: Masks, outputs: Sequence[Output]
) -> Iterator[tuple[Output, StoredTensor, int, memoryview]]:
    """What goes where in place of the pruned tensors."""
    read, pruned_buffers = Buffers(), Buffers()
    for tensor in tensors:
        start = 0
        for block in tensor_blocks(tensor, 0, tensor.nbytes, BLOCK, read):
            levels = masks.masked(tensor, start, block, pruned_buffers)
            for output, pruned in zip(outputs, levels, strict=True):
                for place in task.places(tensor):
                    yield output, place, start, pruned.data
            start += len(block)


def _correct(task: Task, corrections: Sequence[Correction], output: Output) -> None:
    """Write the weights anew that were masked wrong."""
    for tensor, places, weights in corrections:
        for place in task.places(tensor):
            starts = place.start + weights.itemsize * places
            output.write_pieces(place.path, starts.tolist(), weights)
