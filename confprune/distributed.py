"""What the processes of a group do together: sums, gathered keys, and failing.

`Ranks` is `torch.distributed` on NumPy arrays, the same code for one process and for many. Before
every collective the ranks tell one another whether they are well: where one has failed, none waits
for it, and all others raise its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Scalar = TypeVar("Scalar", bound=np.generic)
Result = TypeVar("Result")


class RankError(RuntimeError):
    """Another rank of the process group failed, or did not answer."""


class Ranks:
    """The processes of a group; of none, this process alone.

    Every method is collective: all ranks call it, in the same order, within `together`. Elsewhere
    a collective of torch's own comes after `meet`.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Gloo, NCCL, or whatever else torch has. Its timeout bounds every wait.

    Attributes
    ----------
    rank, size : int
        Of this process within the group, and how many there are.

    Raises
    ------
    ValueError
        If this process does not belong to the group, or has left all groups.
    TypeError
        If it is no process group.

    Examples
    --------
    >>> import numpy as np
    >>> from confprune.distributed import Ranks
    >>> with Ranks().together() as ranks:
    ...     ranks.size, ranks.sum(np.array([1, 2]))
    (1, array([1, 2]))
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = 0, 1
        if group is not None:
            _check_group(group)
            self.rank = dist.get_rank(group)
            if self.rank < 0:
                raise ValueError("this process is no member of group; call on its ranks only")
            self.size = dist.get_world_size(group)
            self._device = _device(group)

    @contextmanager
    def together(self) -> Iterator[Ranks]:
        """Within, no rank fails alone.

        Raises
        ------
        RankError
            On every rank that is well when another has failed, with the number of that rank and
            what it raised; also when one does not come within the timeout of the group.
        """
        try:
            yield self
        except RankError:
            raise
        except Exception as error:
            with suppress(RankError):  # what happened here says more
                self._tell(f"{type(error).__name__}: {error}")
            raise
        self._tell(None)

    def meet(self) -> None:
        """Raise RankError if another rank has failed; before every collective."""
        self._tell(None)

    def sum(self, array: np.ndarray[Any, np.dtype[Scalar]]) -> np.ndarray[Any, np.dtype[Scalar]]:
        """The sum over the ranks of arrays of one shape."""
        if self.size == 1:
            return array
        self.meet()
        total = self._tensor(array)
        self._call(lambda: dist.all_reduce(total, group=self._group))
        return total.cpu().numpy()

    def around(self, array: np.ndarray[Any, np.dtype[Scalar]]) -> list[np.ndarray[Any, Any]]:
        """The sums over the ranks before this one and over those after it."""
        if self.size == 1:
            return [np.zeros_like(array)] * 2
        every = np.stack(self._gather(array))
        return [every[: self.rank].sum(axis=0), every[self.rank + 1 :].sum(axis=0)]

    def concatenate(
        self, array: np.ndarray[Any, np.dtype[Scalar]]
    ) -> np.ndarray[Any, np.dtype[Scalar]]:
        """The one-dimensional arrays of all ranks, of any lengths, one after another."""
        if self.size == 1:
            return array
        lengths = np.concatenate(self._gather(np.array([len(array)])))
        padded = np.zeros(lengths.max(), dtype=array.dtype)
        padded[: len(array)] = array
        parts = zip(self._gather(padded), lengths, strict=True)
        return np.concatenate([part[:length] for part, length in parts])

    def objects(self, value: Any) -> list[Any]:
        """What each rank has; for small things that pickle."""
        if self.size == 1:
            return [value]
        self.meet()
        return self._exchange(value)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError, on all ranks, where one fact differs between two ranks.

        The keys say what the values are, for the message.
        """
        for rank, others in enumerate(self.objects(dict(facts))):
            for name, value in facts.items():
                if rank != self.rank and others.get(name) != value:
                    raise ValueError(
                        f"{name} must be the same on all ranks, but rank {self._global(rank)} has "
                        f"another than rank {self._global(self.rank)}"
                    )

    def _tell(self, reason: str | None) -> None:
        """Tell the others whether this rank has failed; raise RankError where another has."""
        if self.size == 1:
            return
        failed = self._tensor(np.array([reason is not None], dtype=np.int64))
        self._call(lambda: dist.all_reduce(failed, group=self._group))
        if not failed.item():
            return
        reasons = self._exchange(reason)
        if reason is None:
            first = next(rank for rank, text in enumerate(reasons) if text is not None)
            raise RankError(f"rank {self._global(first)} failed: {reasons[first]}")

    def _gather(self, array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        self.meet()
        own = self._tensor(array)
        every = [torch.empty_like(own) for _ in range(self.size)]
        self._call(lambda: dist.all_gather(every, own, group=self._group))
        return [tensor.cpu().numpy() for tensor in every]

    def _exchange(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(every, value, group=self._group))
        return every

    def _call(self, collective: Callable[[], Result]) -> Result:
        try:
            return collective()
        except RuntimeError as error:
            raise RankError(
                f"rank {self._global(self.rank)} lost the others: one has ended, or did not come "
                f"within the timeout of the process group ({str(error).strip().splitlines()[0]})"
            ) from error

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        """A copy, because collectives work in place."""
        return torch.tensor(array, device=self._device)

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)


ALONE = Ranks()


def _check_group(group: object) -> None:
    """Raise unless this is a process group, or what torch gives to a process outside of it."""
    if not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup, such as "
            f"torch.distributed.group.WORLD, got {group!r}"
        )
    if not dist.is_initialized():
        raise ValueError("group was given but there is none: call init_process_group() before")


def _device(group: ProcessGroup) -> torch.device:
    """Where the group's collectives want their tensors: on the CPU if they take them there."""
    kinds = [part.split(":")[0] for part in str(dist.get_backend_config(group)).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])
