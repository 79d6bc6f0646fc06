"""What a DataLoader makes of its dataset: which examples, how many, and in what order."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
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


def why_dependent(loader: DataLoader[Any]) -> str | None:
    """Say why the examples of a loader are no independent ones; None if nothing is known.

    Examples
    --------
    >>> import torch
    >>> data = torch.zeros(7, 3)
    >>> why_dependent(DataLoader(data, sampler=RandomSampler(data, replacement=True)))
    'RandomSampler(replacement=True) gives the same example several times'
    """
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
