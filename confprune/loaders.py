"""What loaders and subsets make of a dataset: which examples, how many, and in what order."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def loaded_count(loader: DataLoader[Any]) -> int | None:
    """The number of examples that a loader gives, where it is known without reading; else None.

    Examples
    --------
    >>> import torch
    >>> loaded_count(DataLoader(torch.zeros(7, 3), batch_size=2, drop_last=True))
    6
    """
    batches = _plain_batches(loader)
    if batches is None or not isinstance(loader.dataset, Sized):
        return None
    sampler = batches.sampler
    count = len(sampler) if isinstance(sampler, Sized) else len(loader.dataset)
    return count - count % batches.batch_size if batches.drop_last else count


def visits_each_once(loader: DataLoader[Any]) -> bool:
    """Whether a loader goes through its whole dataset once, in batches of a fixed size.

    Examples
    --------
    >>> import torch
    >>> visits_each_once(DataLoader(torch.zeros(7, 3), shuffle=True))
    True
    """
    batches = _plain_batches(loader)
    if batches is None:
        return False
    sampler = batches.sampler
    return isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )


class Source(NamedTuple):
    """A dataset behind loaders and subsets, and what they take of it.

    Attributes
    ----------
    dataset : Any
    taken : [m] int64, or None
        Indices; None for all.
    known : bool
        Whether all of these are taken, and not some: a sampler of the user's own may leave some
        out, and indices of unknown types cannot be read.
    """

    dataset: Any
    taken: NDArray[np.int64] | None
    known: bool


def sources_of(data: Any) -> list[Source]:
    """What loaders, subsets and concatenations take of the datasets behind them.

    Examples
    --------
    >>> import torch
    >>> data = torch.zeros(7, 3)
    >>> [source] = sources_of(DataLoader(Subset(data, range(2, 7)), sampler=[0, 4]))
    >>> source.taken
    array([2, 6])
    """
    if isinstance(data, DataLoader):
        sampled = _sampled(data)
        own = _indices(sampled)
        known = own is not None or isinstance(sampled, SequentialSampler | RandomSampler)
        return _chosen(Source(data.dataset, own, known))
    return _chosen(Source(data, None, True)) if isinstance(data, Dataset) else []


def _chosen(source: Source) -> list[Source]:
    """The same behind a subset or a concatenation."""
    data, taken, known = source
    if taken is not None and isinstance(data, Sized):
        taken = taken % max(1, len(data))  # negative ones count from the end
    if isinstance(data, Subset):
        inner = _indices(data.indices)
        if inner is None:
            return _chosen(Source(data.dataset, None, False))
        return _chosen(Source(data.dataset, inner if taken is None else inner[taken], known))
    if not isinstance(data, ConcatDataset):
        return [Source(data, taken, known)]
    found, start = [], 0
    for part, stop in zip(data.datasets, data.cumulative_sizes, strict=True):
        here = None if taken is None else taken[(taken >= start) & (taken < stop)] - start
        found += _chosen(Source(part, here, known))
        start = stop
    return found


def _sampled(loader: DataLoader[Any]) -> Any:
    """The indices that a loader takes of its dataset, where they lie open."""
    batches = loader.batch_sampler
    if isinstance(batches, list | tuple):
        return [index for batch in batches for index in batch]
    sampler = getattr(batches, "sampler", loader.sampler)
    return sampler.indices if isinstance(sampler, SubsetRandomSampler) else sampler


def _indices(values: Any) -> NDArray[np.int64] | None:
    """Integers that can be read, as an array; None for anything else."""
    if not isinstance(values, list | tuple | range | np.ndarray | Tensor):
        return None
    found = np.asarray(values, dtype=None if len(values) else np.int64)
    return found.astype(np.int64) if found.dtype.kind in "iu" and found.ndim == 1 else None


def why_dependent(data: Any) -> str | None:
    """Say why the examples of a loader or subset are no independent ones; None if they may be.

    Examples
    --------
    >>> import torch
    >>> data = torch.zeros(7, 3)
    >>> why_dependent(DataLoader(data, sampler=RandomSampler(data, replacement=True)))
    'RandomSampler(replacement=True) gives the same example several times'
    >>> why_dependent(Subset(data, [0, 1, 1, 1, 3, 3]))
    'its indices repeat examples: 3 different ones in 6'
    """
    if isinstance(data, DataLoader) and (why := _why_sampled(data)):
        return why
    sources = sources_of(data)
    several = len(sources) > 1
    by_dataset: dict[int, list[NDArray[np.int64]]] = {}
    for dataset, taken, known in sources:
        if several and not known:
            continue
        if several and taken is None:
            taken = np.arange(len(dataset))  # as concatenations do
        if taken is not None:
            by_dataset.setdefault(id(dataset), []).append(taken)
    for parts in by_dataset.values():
        every = np.concatenate(parts)
        if len(different := np.unique(every)) < len(every):
            return f"its indices repeat examples: {len(different)} different ones in {len(every)}"
    return None


def _why_sampled(loader: DataLoader[Any]) -> str | None:
    """Say why the sampler of a loader gives no independent examples."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, WeightedRandomSampler):
        return "WeightedRandomSampler prefers some examples to others, or repeats them"
    if isinstance(sampler, RandomSampler):
        most = len(sampler.data_source)
        if sampler.replacement:
            return "RandomSampler(replacement=True) gives the same example several times"
        if sampler.num_samples > most:
            return f"RandomSampler(num_samples={sampler.num_samples}) repeats {most} examples"
    return None


def reordered(loader: DataLoader[Any], order: Tensor) -> DataLoader[Any]:
    """A loader like one that visits each example once, which visits them in `order`."""
    batches = _plain_batches(loader)
    assert batches is not None
    return DataLoader(
        loader.dataset,
        batch_size=batches.batch_size,
        sampler=order.tolist(),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _plain_batches(loader: DataLoader[Any]) -> BatchSampler | None:
    """What makes the batches, of a fixed size from a sampler; None if made in another way.

    `loader.sampler` and `loader.batch_size` say nothing where a batch sampler was given.
    """
    batches = loader.batch_sampler
    return batches if type(batches) is BatchSampler else None
