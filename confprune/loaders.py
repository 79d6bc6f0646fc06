"""What loaders and subsets make of a dataset: which examples, how many, and in what order."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

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


def examples_of(data: Any) -> list[tuple[Any, NDArray[np.int64] | None]]:
    """The datasets behind loaders, subsets and concatenations, with the indices taken of each.

    None is all of them, as are indices that cannot be read: those of a sampler of the user's own.

    Examples
    --------
    >>> import torch
    >>> data = torch.zeros(7, 3)
    >>> [(_, taken)] = examples_of(DataLoader(Subset(data, range(2, 7)), sampler=[0, 4]))
    >>> taken
    array([2, 6])
    """
    if isinstance(data, DataLoader):
        return _chosen(data.dataset, _indices(_sampled(data)))
    return _chosen(data, None) if isinstance(data, Dataset) else []


def _chosen(
    data: Any, taken: NDArray[np.int64] | None
) -> list[tuple[Any, NDArray[np.int64] | None]]:
    """What is behind a dataset, of which these indices are taken."""
    if taken is not None and isinstance(data, Sized):
        taken = taken % max(1, len(data))  # negative ones count from the end
    if isinstance(data, Subset):
        inner = _indices(data.indices)
        return _chosen(data.dataset, inner if inner is None or taken is None else inner[taken])
    if not isinstance(data, ConcatDataset):
        return [(data, taken)]
    found, start = [], 0
    for part, stop in zip(data.datasets, data.cumulative_sizes, strict=True):
        here = None if taken is None else taken[(taken >= start) & (taken < stop)] - start
        found += _chosen(part, here)
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
    found = np.asarray(values)
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
    by_dataset: dict[int, list[NDArray[np.int64]]] = {}
    sources = examples_of(data)
    for dataset, taken in sources:
        if taken is None:
            taken = np.arange(len(dataset) if isinstance(dataset, Sized) and sources[1:] else 1)
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
