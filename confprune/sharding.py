"""Weights of which each rank holds a part: DTensors (FSDP2, tensor parallel) and plain shards.

Selection wants each tensor split along its position order: rank r holds what stands before rank
r + 1. A DTensor split by rows is such a tensor already; any other is redistributed, by torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from confprune.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Sharding:
    """How the weights of a model lie on a mesh of ranks.

    Attributes
    ----------
    mesh : DeviceMesh
    dimension : int
        The mesh dimension over which weights are split; along others, ranks hold the same.
    """

    mesh: DeviceMesh
    dimension: int

    @property
    def group(self) -> ProcessGroup:
        """The ranks that hold the parts."""
        return self.mesh.get_group(self.dimension)

    def shards(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of each tensor that this rank holds; of a plain one, those that it takes."""
        rows = self._placements(split=True)
        return {
            name: self._distributed(tensor).redistribute(placements=rows).to_local()
            for name, tensor in tensors.items()
        }

    def restored(
        self, shards: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """`shards`, rows of the shapes of `tensors`, laid out as these are."""
        from torch.distributed.tensor import DTensor

        restored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            like = self._distributed(tensor)
            rows = DTensor.from_local(
                shards[name],
                self.mesh,
                self._placements(split=True),
                run_check=False,
                shape=like.shape,
                stride=torch.empty(like.shape, device="meta").stride(),
            )
            whole = rows.redistribute(placements=like.placements)
            restored[name] = whole if is_sharded(tensor) else whole.to_local()
        return restored

    def _distributed(self, tensor: Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        if is_sharded(tensor):
            return tensor
        return DTensor.from_local(tensor, self.mesh, self._placements(split=False), run_check=False)

    def _placements(self, *, split: bool) -> list[Any]:
        from torch.distributed.tensor import Replicate, Shard

        every: list[Any] = [Replicate()] * self.mesh.ndim
        if split:
            every[self.dimension] = Shard(0)
        return every


def sharding_of(tensors: Iterable[Tensor]) -> Sharding | None:
    """The sharding of the DTensors among some tensors; None where there are none.

    Raises
    ------
    ValueError
        If they lie on different meshes, or on one whose ranks are not in increasing order.
    """
    sharded: list[Any] = [tensor for tensor in tensors if is_sharded(tensor)]
    if not sharded:
        return None
    mesh = sharded[0].device_mesh
    if any(tensor.device_mesh != mesh for tensor in sharded):
        raise ValueError("the parameters lie on several device meshes; put all on one")
    split = [d for d in range(mesh.ndim) if any(t.placements[d].is_shard() for t in sharded)]
    sharding = Sharding(mesh, split[0] if split else 0)
    if Ranks(sharding.group).rank != mesh.get_local_rank(sharding.dimension):
        raise ValueError(f"the ranks of {mesh} must be in increasing order")
    return sharding


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; without importing, which takes long, what makes them."""
    made = sys.modules.get("torch.distributed.tensor")
    return made is not None and isinstance(tensor, made.DTensor)


def aligned(shards: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The shards of all ranks' tensors, in one order on all: empty where this rank has none.

    The order is that of rank 0, followed by what rank 1 has besides, and so on.

    Raises
    ------
    ValueError
        If a tensor is of one type on one rank and of another on another.

    Examples
    --------
    >>> import torch
    >>> from confprune.distributed import Ranks
    >>> from confprune.sharding import aligned
    >>> aligned({"w": torch.ones(2)}, Ranks())
    {'w': tensor([1., 1.])}
    """
    types: dict[str, torch.dtype] = {}
    for held in ranks.objects({name: shard.dtype for name, shard in shards.items()}):
        for name, dtype in held.items():
            if types.setdefault(name, dtype) != dtype:
                raise ValueError(
                    f"tensor {name!r} is {types[name]} on one rank and {dtype} on another"
                )
    return {name: shards.get(name, torch.empty(0, dtype=dtype)) for name, dtype in types.items()}


def layer_counts(levels: Tensor, bins: int) -> Tensor:
    """How many of some prune levels are 0, 1, ..., [bins] int64 on the CPU, over all ranks.

    Examples
    --------
    >>> import torch
    >>> from confprune.sharding import layer_counts
    >>> layer_counts(torch.tensor([2, 0, 2], dtype=torch.uint8), 3).tolist()
    [1, 0, 2]
    """
    if not is_sharded(levels):
        return torch.bincount(levels.flatten(), minlength=bins).cpu()
    from torch.distributed.tensor import DTensor, Partial

    sharded: Any = levels
    counts = torch.bincount(sharded.to_local().flatten(), minlength=bins)
    kinds = [Partial() if place.is_shard() else place for place in sharded.placements]
    whole: Tensor = DTensor.from_local(
        counts, sharded.device_mesh, kinds, run_check=False
    ).full_tensor()
    return whole.cpu()
