"""What is to be pruned in a checkpoint, and the masks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from confprune.checkpoint.certified import certified_tensors, tied_copies
from confprune.checkpoint.guessed import guessed_masks
from confprune.checkpoint.layout import PRUNABLE_DTYPES, StoredTensor
from confprune.checkpoint.masking import Masks, MasksFromCuts, MasksFromLevels
from confprune.checkpoint.metadata import certified_record, plain_record
from confprune.checkpoint.source import Checkpoint
from confprune.checkpoint.weights import StoredWeights
from confprune.competition import check_scope
from confprune.criteria import Criterion, resolve_criterion
from confprune.levels import levels_of
from confprune.patterns import resolve_pattern
from confprune.selection import key_type, select

if TYPE_CHECKING:
    from confprune.certificate import Certificate


class Group(NamedTuple):
    """Tensors that are masked one after another, in the order that breaks ties."""

    tensors: list[StoredTensor]
    masks: Masks


class Selected(NamedTuple):
    """What a selection leads to.

    Attributes
    ----------
    sparsities : tuple of K floats
        Those that a pattern can reach, if there is one.
    counts : tuple of K ints
        How many weights are pruned.
    groups : list of Groups
    """

    sparsities: tuple[float, ...]
    counts: tuple[int, ...]
    groups: list[Group]


@dataclass(frozen=True)
class Task:
    """What is to be pruned, and how.

    Attributes
    ----------
    tensors : list of StoredTensor
        In the order that breaks ties.
    sparsities : tuple of float
    scope, criterion, pattern
        As for `confprune.prune_levels`.
    inputs_first : dict of str to int
        See `confprune.layout`.
    copies : dict from the name of a tensor to others that repeat it
    certificate : Certificate or None
        What asks for it.
    """

    tensors: list[StoredTensor]
    sparsities: tuple[float, ...]
    scope: str
    criterion: Criterion
    pattern: str | None
    inputs_first: dict[str, int] = field(default_factory=dict)
    copies: dict[str, list[StoredTensor]] = field(default_factory=dict)
    certificate: Certificate | None = None

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(tensor.size for tensor in self.tensors)

    def places(self, tensor: StoredTensor) -> list[StoredTensor]:
        """Where a pruned tensor is stored."""
        return [tensor, *self.copies.get(tensor.name, ())]

    def record(self, sparsity: float) -> dict[str, str]:
        """What the metadata of a pruned file say."""
        if self.certificate is not None:
            return certified_record(self.certificate)
        return plain_record(sparsity)

    def select(self, bar: tqdm) -> Selected:
        """Find the masks; nothing but blocks of the weights is in memory where that can be.

        Raises
        ------
        ValueError
            As `levels_of` does.
        """
        if str(self.criterion) == "magnitude" and self.pattern is None:
            if self.scope == "global":
                return self._compete([self.tensors], bar)
            if self.scope == "layer":
                return self._compete([[tensor] for tensor in self.tensors], bar)
        return self._in_memory(bar)

    def _compete(self, competing: list[list[StoredTensor]], bar: tqdm) -> Selected:
        """The weights of tensors that are listed together compete."""
        counts = [0] * len(self.sparsities)
        groups = []
        for tensors in competing:
            size = sum(tensor.size for tensor in tensors)
            cut = [round(sparsity * size) for sparsity in self.sparsities]
            weights, key = StoredWeights(tensors, bar), _key_type(tensors)
            # Of several levels the corrections would take as long as another read.
            guessed = guessed_masks(weights, cut[0], key) if len(cut) == 1 else None
            groups.append(Group(tensors, guessed or MasksFromCuts(select(weights, cut, key))))
            counts = [count + more for count, more in zip(counts, cut, strict=True)]
        return Selected(self.sparsities, tuple(counts), groups)

    def _in_memory(self, bar: tqdm) -> Selected:
        """As for a network: the weights mapped, and a byte for each."""
        nbytes = sum(tensor.nbytes for tensor in self.tensors)
        bar.total += nbytes
        with ExitStack() as stack:
            files = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in {tensor.path for tensor in self.tensors}
            }
            weights: dict[str, Tensor] = {
                tensor.name: files[tensor.path].get_tensor(tensor.name) for tensor in self.tensors
            }
            levels = levels_of(
                weights,
                self.sparsities,
                scope=self.scope,
                criterion=self.criterion,
                pattern=self.pattern,
                inputs_first=self.inputs_first,
            )
        bar.update(nbytes)
        group = Group(self.tensors, MasksFromLevels(levels))
        return Selected(levels.sparsities, tuple(levels.counts.tolist()), [group])

    @contextmanager
    def nan_named(self, bar: tqdm) -> Iterator[None]:
        """Name tensor and file where work on the weights meets NaN."""
        try:
            yield
        except ValueError as error:
            tensor = StoredWeights(self.tensors, bar).find_nan()
            if tensor is None:
                raise
            raise ValueError(
                f"tensor {tensor.name!r} in {tensor.path} holds NaN, which has no magnitude; "
                "repair the weights, or leave the tensor out with exclude"
            ) from error


def plain_task(
    tensors: list[StoredTensor],
    sparsities: Sequence[float],
    scope: str | None,
    criterion: Criterion,
    pattern: str | None,
) -> Task:
    """Of a pruning to sparsities that were asked for."""
    scope = check_scope(scope, criterion, resolve_pattern(pattern))
    return Task(tensors, tuple(sparsities), scope, criterion, pattern)


def certified_task(checkpoint: Checkpoint, certificate: Certificate) -> Task:
    """Of a pruning by a certificate."""
    tensors = certified_tensors(checkpoint, certificate)
    pruning = certificate.pruning
    assert pruning is not None
    stored = dict(zip(pruning.parameters, tensors, strict=True))
    return Task(
        tensors,
        (certificate.sparsity,),
        pruning.scope,
        resolve_criterion(pruning.criterion),
        pruning.pattern,
        {stored[name].name: groups for name, groups in pruning.inputs_first.items()},
        tied_copies(checkpoint, tensors),
        certificate,
    )


def _key_type(tensors: Sequence[StoredTensor]) -> torch.dtype:
    dtypes = {PRUNABLE_DTYPES[tensor.dtype] for tensor in tensors}
    return key_type({str(dtype): torch.empty(0, dtype=dtype) for dtype in dtypes})
