"""Chunks of examples on several threads at once, each with a network of its own.

Between the products of a small network lies as much Python and as many small operations as one
thread can do: so chunks of examples go through the network side by side, each on its share of
torch's threads. The networks have their parameters in common and nothing else, since a module may
keep what it likes on its way.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads, as many as torch has and at most `most`, that run copies of a network.

    Parameters
    ----------
    network : torch.nn.Module
    copy : callable () -> torch.nn.Module
        Gives another, that has parameters in common with it and nothing else.
    most : int

    Attributes
    ----------
    alone : bool
        Set to have one thread run the network from now on.
    """

    def __init__(self, network: nn.Module, copy: Callable[[], nn.Module], most: int) -> None:
        self.alone = most == 1
        self._network = network
        self._copy = copy
        self._most = most
        self._free: SimpleQueue[nn.Module] = SimpleQueue()  # copies that no thread runs
        self._copies = 0

    def side_by_side(self, items: int) -> int:
        """How many of so many items are under way at once.

        1 where there are few, or where networks side by side might meet.
        """
        size = min(torch.get_num_threads(), self._most)
        alone = self.alone or size < 2 or items < 2 * size
        return 1 if alone or not _is_plain(self._network) else size

    def map(
        self, function: Callable[[Any, Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """``function(network, item)`` of each item, in order, without gradients."""
        items, threads = list(items), torch.get_num_threads()
        size = self.side_by_side(len(items))
        if size == 1:
            for item in items:
                yield function(self._network, item)
            return
        for _ in range(self._copies, size):
            self._free.put(self._copy())
        self._copies = max(self._copies, size)
        pool = _pool(size, threads // size)
        coming: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(coming) > size:  # results in waiting take memory
                    yield coming.popleft().result()
                coming.append(pool.submit(self._run, function, item))
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
            for future in coming:
                if not future.cancelled():
                    future.exception()
            torch.set_num_threads(threads)  # for threads to come, after those of the pool

    def _run(self, function: Callable[[Any, Item], Result], item: Item) -> Result:
        network = self._free.get()
        try:
            with torch.no_grad():
                return function(network, item)
        finally:
            self._free.put(network)


@functools.cache
def _pool(size: int, share: int) -> ThreadPoolExecutor:
    """Threads that stay, with the memory they work in; each has `share` of torch's threads."""
    return ThreadPoolExecutor(size, "confprune", torch.set_num_threads, (share,))


# A child process has none of the threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _is_plain(network: nn.Module) -> bool:
    """Whether calls see nothing but the network: no hooks, and no modes of this thread alone."""
    modules = nn.modules.module
    hooks = [modules._global_forward_hooks, modules._global_forward_pre_hooks]
    for module in network.modules():
        hooks += [module._forward_hooks, module._forward_pre_hooks]
    return (
        not any(hooks)
        and torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.is_autocast_enabled("cpu")
    )
