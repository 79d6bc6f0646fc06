"""Whether two sets of data have examples in common, as far as can be told without reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from confprune.loaders import sources_of


def overlap(first: Any, second: Any) -> bool:
    """Whether two sets of data are known to share examples.

    They do if they are one object, or loaders, subsets and concatenations of one dataset without
    disjoint indices, or tensors with rows at the same place in memory. Copies cannot be told.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import Subset
    >>> from confprune.overlap import overlap
    >>> x = torch.zeros(10, 3)
    >>> overlap(x[:6], x[6:]), overlap(x[:6], x[5:])
    (False, True)
    >>> data = TensorDataset(x)
    >>> overlap(Subset(data, range(5)), Subset(data, range(5, 10))), overlap(data, DataLoader(data))
    (False, True)
    """
    if first is second:
        return True
    same = [
        (one.taken if one.known else None, other.taken if other.known else None)
        for one in sources_of(first)
        for other in sources_of(second)
        if one.dataset is other.dataset
    ]
    if same:
        return any(
            one is None or other is None or len(np.intersect1d(one, other)) > 0
            for one, other in same
        )
    rows = [_rows(tensor) for tensor in _tensors(second)]
    return any(
        len(np.intersect1d(_rows(tensor), other_rows)) > 0
        for tensor in _tensors(first)
        for other_rows in rows
    )


def _tensors(data: Any) -> Iterator[Tensor]:
    """The tensors that hold the examples, where they lie open."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, TensorDataset):
        yield from data.tensors
    elif isinstance(data, DataLoader):
        yield from _tensors(data.dataset)
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _tensors(value)
    elif isinstance(data, tuple | list):
        for value in data:
            yield from _tensors(value)


def _rows(tensor: Tensor) -> np.ndarray:
    """Where in memory each example begins."""
    if tensor.numel() == 0 or tensor.ndim == 0:
        return np.zeros(0, dtype=np.int64)
    step = tensor.stride(0) * tensor.element_size()
    return tensor.data_ptr() + step * np.arange(len(tensor), dtype=np.int64)
