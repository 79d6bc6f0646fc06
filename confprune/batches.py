"""Calibration data as a stream of batches, and what can be done with a batch of any structure.

Data is a ``Dataset``, a ``DataLoader``, tensors (one, a tuple or a mapping of them: all examples at
once), or an iterable of batches. A batch is ``(inputs, targets)``, inputs alone, or a mapping whose
labels stand under "labels" or "label", as Hugging Face has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.data import DataLoader, Dataset

from confprune.loaders import loaded_count, reordered, visits_each_once, why_dependent
from confprune.warning import warn

DEFAULT_BATCH_SIZE = 256
_IN_MEMORY_EXAMPLES = 16384
_IN_MEMORY_BYTES = 64 << 20


@dataclass(frozen=True)
class Reordered:
    """A batch of the examples of `data` at `order` [m], which are gathered as it is sliced."""

    data: Any
    order: Tensor


def batches(
    data: Any,
    batch_size: int | None = None,
    order: Tensor | None = None,
    gather: Callable[[Any, Tensor], Any] | None = None,
) -> Iterator[Any]:
    """The batches of `data`, each as the data has it.

    Parameters
    ----------
    data : Dataset, DataLoader, tensors, or iterable of batches
    batch_size : int, optional
        For data that is not yet in batches; default 256.
    order : [n] int64, optional
        The order of the examples, for data whose order can be chosen; see `permutable`.
    gather : callable, optional
        What makes a batch of tensors and the places of its examples: `take`, the default, or
        `Reordered`, for who slices batches only.

    Raises
    ------
    TypeError
        If `data` is none of these.
    ValueError
        If `data` is empty, its tensors differ in length, or `batch_size` is not positive or is
        given for data that comes in batches.

    Examples
    --------
    >>> import torch
    >>> from confprune.batches import batches
    >>> [len(x) for x, y in batches((torch.zeros(5, 2), torch.zeros(5)), batch_size=2)]
    [2, 2, 1]
    """
    check_data(data, batch_size)
    found = False
    for batch in _stream(data, int(batch_size or DEFAULT_BATCH_SIZE), order, gather or take):
        size = batch_length(batch)
        if size:
            found = True
            yield batch
    if not found:
        raise ValueError("data is empty: it gave no examples")


def generous_batch_size(data: Any) -> int | None:
    """A batch size for who takes batches apart again: large for tensors, None for other data.

    Examples
    --------
    >>> import torch
    >>> from confprune.batches import generous_batch_size
    >>> generous_batch_size(torch.zeros(10, 3)), generous_batch_size([torch.zeros(10, 3)])
    (16384, None)
    """
    if not _is_whole(data):
        return None
    size = sum(leaf.nbytes for leaf in tree_iter(data) if isinstance(leaf, Tensor))
    fit = _IN_MEMORY_BYTES * batch_length(data) // max(1, size)
    return max(1, min(_IN_MEMORY_EXAMPLES, fit))


def check_data(data: Any, batch_size: int | None) -> None:
    """Raise unless `data` can be streamed with this `batch_size`; reads nothing."""
    whole_number = isinstance(batch_size, int | np.integer) and not isinstance(batch_size, bool)
    if batch_size is not None and not (whole_number and batch_size > 0):
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    whole = _is_whole(data)
    if whole:
        batch_length(data)
    elif isinstance(data, str | bytes) or not isinstance(data, Dataset | Iterable):
        raise TypeError(
            "data must be a Dataset, a DataLoader, a tuple of tensors or an iterable of batches, "
            f"got {type(data).__name__}"
        )
    if batch_size is not None and is_batched(data):
        raise ValueError(
            f"batch_size={batch_size} was given, but data comes in batches already; leave it out"
        )
    if example_count(data) == 0:
        raise ValueError("data is empty: it has no examples")
    if _may_have_targets(data):
        warn(
            "data is a list of two tensors of the same length, and read as two batches of inputs: "
            "inputs and targets are a tuple, (inputs, targets)"
        )


def _may_have_targets(data: Any) -> bool:
    """Whether two tensors in a list look like inputs and targets rather than two batches."""
    if not isinstance(data, list) or len(data) != 2:
        return False
    first, second = data
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    tokens = not first.is_floating_point()
    differ = first.dtype != second.dtype or first.ndim != second.ndim
    return first.shape[:1] == second.shape[:1] and (tokens or differ)


def check_independent(data: Any) -> None:
    """Raise ValueError for data that is known not to be independent examples.

    Examples
    --------
    >>> import torch
    >>> from confprune.batches import check_independent
    >>> check_independent(torch.zeros(7, 3))
    """
    why = why_dependent(data)
    if why is not None:
        raise ValueError(
            f"data must be independent examples, each counted once, but {why}: a certificate would "
            "not hold. Give the Dataset itself, or a DataLoader or Subset that takes each example "
            "once"
        )


def is_batched(data: Any) -> bool:
    """Whether `data` comes in batches already, so that their size is not ours to choose.

    Examples
    --------
    >>> import torch
    >>> from confprune.batches import is_batched
    >>> is_batched(torch.zeros(7, 3)), is_batched([torch.zeros(7, 3)])
    (False, True)
    """
    return not _is_whole(data) and not isinstance(data, Dataset)


def example_count(data: Any) -> int | None:
    """The number of examples, where it is known without reading them; else None.

    Examples
    --------
    >>> import torch
    >>> from confprune.batches import example_count
    >>> example_count(torch.zeros(7, 3)), example_count(iter([]))
    (7, None)
    """
    if _is_whole(data):
        return batch_length(data)
    if isinstance(data, DataLoader):
        return loaded_count(data)
    if isinstance(data, Dataset) and isinstance(data, Sized):
        return len(data)
    if isinstance(data, Sequence):
        return sum(batch_length(batch) for batch in data)
    return None


def permutable(data: Any) -> bool:
    """Whether the examples can be had in any order: tensors, and map-style datasets.

    A `DataLoader` counts where it goes through such a dataset once, in batches of a fixed size.

    Examples
    --------
    >>> import torch
    >>> from confprune.batches import permutable
    >>> permutable(torch.zeros(7, 3)), permutable([torch.zeros(7, 3)])
    (True, False)
    """
    if isinstance(data, DataLoader):
        return visits_each_once(data) and permutable(data.dataset)
    if _is_whole(data):
        return True
    return isinstance(data, Dataset) and isinstance(data, Sized) and hasattr(data, "__getitem__")


def order_length(data: Any) -> int:
    """The number of examples of permutable data: an order is a permutation of so many."""
    return order_length(data.dataset) if isinstance(data, DataLoader) else example_count(data) or 0


def random_order(data: Any, seed: int) -> Tensor:
    """The order in which a calibration with this seed goes through permutable data, [n] int64.

    Examples
    --------
    >>> import torch
    >>> from confprune.batches import random_order
    >>> sorted(random_order(torch.zeros(4, 2), seed=0).tolist())
    [0, 1, 2, 3]
    """
    if not isinstance(seed, int | np.integer) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an integer of at most 64 bits, got {seed!r}")
    return torch.randperm(order_length(data), generator=torch.Generator().manual_seed(int(seed)))


def ordering_size(n: int) -> int:
    """How many of `n` examples are set aside to order the candidates, where there are several.

    Examples
    --------
    >>> from confprune.batches import ordering_size
    >>> ordering_size(1000)
    200
    """
    return n // 5


def batch_length(batch: Any) -> int:
    """The number of examples in a batch: the common first size of its tensors."""
    if isinstance(batch, Reordered):
        return len(batch.order)
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in tensors_of(batch)}
    if len(sizes) != 1 or None in sizes:
        way_out = ""
        if any(isinstance(leaf, np.ndarray) for leaf in tree_iter(batch)):
            way_out = ": make it tensors with torch.from_numpy"
        elif None in sizes:
            way_out = ": single examples become batches in a DataLoader(data, batch_size=256)"
        raise ValueError(
            "a batch must hold tensors with one row per example, all with as many rows; got "
            f"{describe(batch)}{way_out}"
        )
    return sizes.pop()  # type: ignore[return-value]


def slice_batch(batch: Any, begin: int, end: int) -> Any:
    """Examples [begin, end) of a batch, in its own structure."""
    if isinstance(batch, Tensor):
        return batch[begin:end]
    if isinstance(batch, Reordered):
        return take(batch.data, batch.order[begin:end])
    if isinstance(batch, Mapping):
        return {key: slice_batch(value, begin, end) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        if batch and not any(isinstance(v, Tensor | Mapping | tuple | list) for v in batch):
            return batch[begin:end]  # a plain column, such as a list of file names
        return _like(batch, [slice_batch(value, begin, end) for value in batch])
    return batch


def take(batch: Any, index: Tensor) -> Any:
    """The examples of a batch at `index` [m], in that order, in the batch's structure."""
    return _mapped(batch, lambda tensor: tensor.index_select(0, index.to(tensor.device)))


def move_batch(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    if isinstance(batch, Reordered):
        if all(tensor.device == device for tensor in tensors_of(batch.data)):
            # The order once, so that no chunk of the batch waits for its part.
            return Reordered(batch.data, batch.order.to(device, non_blocking=True))
        batch = take(batch.data, batch.order)
    return _mapped(batch, lambda tensor: tensor.to(device))


def copy_batch(batch: Any) -> Any:
    """The batch with copies of its tensors."""
    return _mapped(batch, Tensor.clone)


def describe(batch: Any) -> str:
    """The structure of a batch in words, for messages."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(describe(value) for value in batch) + ")"
    return f"a {type(batch).__name__}"


def _stream(
    data: Any, batch_size: int, order: Tensor | None, gather: Callable[[Any, Tensor], Any]
) -> Iterable[Any]:
    if _is_whole(data):
        starts = range(0, batch_length(data), batch_size)
        if order is None:
            return (slice_batch(data, begin, begin + batch_size) for begin in starts)
        return (gather(data, order[begin : begin + batch_size]) for begin in starts)
    if isinstance(data, DataLoader) and order is not None:
        return reordered(data, order)
    if isinstance(data, Dataset):
        sampler = None if order is None else order.tolist()
        return DataLoader(data, batch_size=batch_size, sampler=sampler)
    return data  # type: ignore[no-any-return]


def _is_whole(data: Any) -> bool:
    """Whether `data` is tensors that hold all examples at once."""
    if isinstance(data, Tensor):
        return True
    if isinstance(data, Mapping):
        return bool(data) and all(isinstance(value, Tensor) for value in data.values())
    return isinstance(data, tuple) and bool(data) and all(isinstance(v, Tensor) for v in data)


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor replaced, in its own structure."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return _like(batch, [_mapped(value, function) for value in batch])
    return batch


def _like(batch: Any, values: list[Any]) -> Any:
    """A tuple, named or not, or a list, as `batch` is."""
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in its order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors_of(value)
