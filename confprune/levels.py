"""Prune levels: one small integer a weight that holds the masks of a whole grid of sparsities."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from confprune.competition import check_scope, check_split, compete
from confprune.copies import copied
from confprune.criteria import CriterionLike, Scores, Statistics, resolve_criterion
from confprune.distributed import ALONE, Ranks
from confprune.layout import inputs_first as find_inputs_first
from confprune.ops import check_kernels
from confprune.parameters import (
    ParameterFilter,
    detached,
    named_parameters,
    prunable_parameters,
)
from confprune.patterns import resolve_pattern
from confprune.risk.inputs import check_grid
from confprune.sharding import aligned, layer_counts, sharding_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False, repr=False)
class PruneLevels:
    """The nested masks of K sparsities, as the level at which each weight is pruned first.

    The weight survives level j iff its prune level is greater than j. Made by `prune_levels`.

    Attributes
    ----------
    sparsities : tuple of K floats
    counts : [K] int64 tensor
        Number of weights pruned at each level.
    thresholds : [K] float64 tensor, or [K, P] for scope "layer" and P parameters
        The largest pruned score; -inf where none is pruned. [K, 0] where less than a layer
        competes, and each row or block has a threshold of its own.
    levels : dict from name to tensor
        The prune levels, in the shape of the parameter: uint8 for K <= 255, else int16.
    scope, criterion : str
    pattern : str or None
    statistics : mapping
        What the criterion needed beside the weights.
    inputs_first : mapping
        The parameters whose inputs come first, with their groups; see `confprune.layout`.
    """

    sparsities: tuple[float, ...]
    counts: Tensor
    thresholds: Tensor
    levels: dict[str, Tensor]
    scope: str
    criterion: str
    pattern: str | None = None
    statistics: Statistics = field(default_factory=dict)
    inputs_first: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sparsities)

    def __repr__(self) -> str:
        low, high = self.sparsities[0], self.sparsities[-1]
        one = len(self) == 1
        grid = f"sparsity {low:g}" if one else f"{len(self)} sparsities from {low:g} to {high:g}"
        parameters = f"{len(self.levels)} parameter" + ("" if len(self.levels) == 1 else "s")
        return (
            f"PruneLevels({grid}, {self.total:,} weights in {parameters}, scope={self.scope!r}, "
            f"criterion={self.criterion!r}"
            + ("" if self.pattern is None else f", pattern={self.pattern!r}")
            + ")"
        )

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(levels.numel() for levels in self.levels.values())

    @cached_property
    def pruned_by_layer(self) -> dict[str, Tensor]:
        """For each parameter the number of its weights pruned at each level, [K] int64."""
        return {
            name: layer_counts(levels, len(self) + 1).cumsum(0)[:-1]
            for name, levels in self.levels.items()
        }

    def mask(self, name: str, j: int) -> Tensor:
        """The mask of one parameter at level `j`: bool, True where the weight survives."""
        if name not in self.levels:
            raise ValueError(f"no prune levels for {name!r}; there are {list(self.levels)}")
        return self.levels[name] > self._index(j)

    def sparsity_by_layer(self, j: int) -> dict[str, float]:
        """The fraction of each parameter's weights that is pruned at level `j`."""
        j = self._index(j)
        return {
            name: int(pruned[j]) / max(1, self.levels[name].numel())
            for name, pruned in self.pruned_by_layer.items()
        }

    def prune(self, model: nn.Module, j: int) -> nn.Module:
        """A copy of the model with the weights of level `j` set to zero; `model` is untouched.

        Raises
        ------
        ValueError
            If `j` is not a level, or the model lacks a parameter or has it in another shape.
        TypeError
            If the model cannot be copied.
        """
        j = self._index(j)
        self.check_model(model)
        pruned = copied(model)
        with torch.no_grad():
            for name, parameter in named_parameters(pruned).items():
                if name in self.levels:
                    levels = self.levels[name].to(parameter.device)
                    parameter.masked_fill_(levels <= j, 0)
        return pruned

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless `model` has the levelled parameters, in their shapes."""
        present = named_parameters(model)
        for name, levels in self.levels.items():
            if name not in present:
                raise ValueError(f"the model has no parameter {name!r}, which these levels prune")
            if present[name].shape != levels.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {list(present[name].shape)} in the model but "
                    f"{list(levels.shape)} in these levels"
                )

    def _index(self, j: int) -> int:
        j = operator.index(j)
        if not 0 <= j < len(self):
            raise ValueError(f"level {j} is not on the grid: levels go from 0 to {len(self) - 1}")
        return j


def prune_levels(
    model: nn.Module,
    sparsities: Sequence[float] | np.ndarray | Tensor,
    *,
    scope: str | None = None,
    criterion: CriterionLike = "magnitude",
    pattern: str | None = None,
    parameters: ParameterFilter | None = None,
    statistics: Statistics | None = None,
    group: ProcessGroup | None = None,
) -> PruneLevels:
    """The prune level of every weight for a grid of sparsities.

    At sparsity s exactly round(s · d) of the d competing weights are pruned, the smallest scores
    first, ties broken by position (parameter order, then flat index).

    Parameters
    ----------
    model : torch.nn.Module
    sparsities : [K]
        Strictly increasing, in [0, 1). With a pattern the nearest ones that it can reach are taken,
        each once.
    scope : {"global", "layer", "row"}, optional
        Whether all parameters compete, each alone, or the weights of each output alone. Default:
        the criterion's own, "global" but for "wanda", whose is "row".
    criterion : str, or function of `confprune.criteria`
        How weights are scored, with its settings; see `confprune.criteria`.
    pattern : str, optional
        What is pruned together: "N:4", "4x4", "rows"; see `confprune.patterns`. Default: single
        weights.
    parameters : names, or predicate (name, parameter) -> bool, optional
        Default: the weights of linear layers and of convolutions of any dimension.
    statistics : mapping, optional
        What the criterion needs beside the weights: ``{"input_norm": {name: tensor}}``.
    group : torch.distributed.ProcessGroup, optional
        The ranks over which the weights are split; see `levels_of`. A model with DTensors
        (``fully_shard``, tensor parallel) needs none: its mesh says it.

    Returns
    -------
    PruneLevels
        Of a model with DTensors, `levels` are DTensors laid out as the parameters.

    Raises
    ------
    ValueError, TypeError
        For a bad grid, unknown names, nothing to prune, NaN weights, or missing statistics; for
        sparsities that would take weights that the criterion spares.
    RankError
        If another rank failed, with its reason.

    Notes
    -----
    However the weights are split over ranks, the prune levels are those of the whole model in one
    process, to the last bit. Between ranks pass histograms, few keys and counts of equals; weights
    only where DTensors are split otherwise than by rows.

    Examples
    --------
    >>> import torch, confprune
    >>> model = torch.nn.Linear(4, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
    >>> levels = confprune.prune_levels(model, [0.0, 0.25, 0.5])
    >>> levels.levels["weight"].tolist()
    [[3, 1, 2, 3]]
    >>> levels.prune(model, 2).weight.tolist()
    [[3.0, 0.0, 0.0, -4.0]]
    """
    sharding = sharding_of(model.parameters()) if isinstance(model, nn.Module) else None
    if sharding is not None and group is not None:
        raise ValueError("group= was given, but the model's DTensors have one: leave it out")
    with Ranks(group if sharding is None else sharding.group).together() as ranks:
        prunable = detached(prunable_parameters(model, parameters))
        ranks.meet()  # torch may move weights
        levels = levels_of(
            prunable if sharding is None else sharding.shards(prunable),
            sparsities,
            scope=scope,
            criterion=criterion,
            pattern=pattern,
            statistics=statistics,
            inputs_first=find_inputs_first(model, prunable),
            ranks=ranks,
        )
        if sharding is None:
            return levels
        return replace(levels, levels=sharding.restored(levels.levels, prunable))


def levels_of(
    tensors: Mapping[str, Tensor],
    sparsities: Sequence[float] | np.ndarray | Tensor,
    *,
    scope: str | None = None,
    criterion: CriterionLike = "magnitude",
    pattern: str | None = None,
    statistics: Statistics | None = None,
    inputs_first: Mapping[str, int] | None = None,
    ranks: Ranks = ALONE,
) -> PruneLevels:
    """The prune levels of bare tensors, as `prune_levels` has them for a model's parameters.

    With `ranks`, as of ``with Ranks(group).together() as ranks:`` (`confprune.distributed`), each
    gives what it holds of the tensors: some of them, or of each a part that comes, flattened,
    before the part of the next rank. It gets the prune levels of these, the same as if one process
    held all; `counts` and `thresholds` are those of all ranks, what follows from `levels` is of
    this one. The tensors' order is that of rank 0, followed by what rank 1 has besides, and so on;
    to state another, rank 0 gives empty tensors for what it does not hold.

    Examples
    --------
    >>> import torch
    >>> from confprune.levels import levels_of
    >>> levels_of({"w": torch.tensor([0.1, -0.2])}, [0.5]).mask("w", 0).tolist()
    [False, True]
    """
    grid = check_sparsities(sparsities)
    check_kernels(tensor.device for tensor in tensors.values())
    chosen, structure = resolve_criterion(criterion), resolve_pattern(pattern)
    scope = check_scope(scope, chosen, structure)
    layout = dict(inputs_first or {})
    given = statistics or {}
    if ranks.size > 1:
        check_split(chosen, scope, structure)
    scores = Scores(aligned(tensors, ranks), chosen, given)
    outcome = compete(scores, grid, scope, structure, layout, ranks)
    return PruneLevels(
        sparsities=outcome.sparsities,
        counts=outcome.counts,
        thresholds=outcome.thresholds,
        levels={name: outcome.levels[name].to(tensor.device) for name, tensor in tensors.items()},
        scope=scope,
        criterion=str(chosen),
        pattern=pattern,
        statistics={need: given[need] for need in chosen.needs if need in given},
        inputs_first=layout,
    )


def check_sparsities(sparsities: Sequence[float] | np.ndarray | Tensor) -> tuple[float, ...]:
    """The grid as floats, after checking that it is one; see `confprune.risk.inputs.check_grid`."""
    if isinstance(sparsities, Tensor):
        sparsities = sparsities.detach().cpu().numpy()
    return check_grid(sparsities)
