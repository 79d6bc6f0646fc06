"""What competes with what: from the scores of all parameters to their prune levels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from confprune.criteria import Criterion, Scores
from confprune.distributed import ALONE, Ranks
from confprune.patterns import (
    Blocks,
    NOfM,
    Pattern,
    check_inputs,
    levels_of_blocks,
    levels_of_n_m,
    levels_of_rows,
)
from confprune.selection import assign, select

SCOPES = ("global", "layer", "row")


class Outcome(NamedTuple):
    """The levels of a grid, with the names and shapes of `confprune.PruneLevels`."""

    sparsities: tuple[float, ...]
    counts: Tensor
    thresholds: Tensor
    levels: dict[str, Tensor]


def check_scope(scope: str | None, criterion: Criterion, pattern: Pattern | None) -> str:
    """What competes with what, after checking that it goes with the criterion and the pattern."""
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"scope {scope!r} is unknown; choose from {list(SCOPES)}")
    if isinstance(pattern, NOfM):
        if scope not in (None, "row"):
            raise ValueError(
                f"pattern 'N:{pattern.m}' has every {pattern.m} inputs of an output compete alone: "
                f"leave scope={scope!r} out"
            )
        scope = "row"
    elif isinstance(pattern, Blocks):
        if scope == "row":
            raise ValueError("blocks and rows of weights compete as wholes: leave scope='row' out")
        scope = scope or "global"
    scope = scope or criterion.scope
    if criterion.spared(1) and (pattern is not None or scope == "row"):
        raise ValueError(
            f"criterion {str(criterion)!r} spares single weights of each layer, for the scopes "
            "'global' and 'layer' without a pattern"
        )
    return scope


def check_split(criterion: Criterion, scope: str, pattern: Pattern | None) -> None:
    """Refuse what cannot be pruned where each rank holds only a part of the weights."""
    if str(criterion) != "magnitude" or scope == "row" or pattern is not None:
        raise ValueError(
            "weights that are split over ranks compete one by one and by magnitude: leave pattern= "
            f"out, use scope 'global' or 'layer' (not {scope!r}) and criterion 'magnitude' (not "
            f"{str(criterion)!r}), or prune the whole model in one process"
        )


def compete(
    scores: Scores,
    grid: tuple[float, ...],
    scope: str,
    pattern: Pattern | None,
    inputs_first: Mapping[str, int],
    ranks: Ranks = ALONE,
) -> Outcome:
    """Let weights, blocks or rows compete, and say at which level each of them goes.

    Parameters
    ----------
    scores : Scores
    grid : tuple of K floats
    scope : str
        One that `check_scope` gave.
    pattern : Pattern or None
    inputs_first : mapping
        See `confprune.layout`.
    ranks : Ranks
        Who else holds parts of the parameters; for what `check_split` allows.

    Returns
    -------
    Outcome
        With a pattern its sparsities are those that can be reached.
    """
    if pattern is None and scope != "row":
        return _weights(scores, grid, scope, ranks)
    scores.check_weights()
    if isinstance(pattern, NOfM):
        check_inputs(scores.tensors, pattern, inputs_first)
        grid, levels = levels_of_n_m(scores, grid, pattern, inputs_first)
    elif isinstance(pattern, Blocks):
        by_layer = scope == "layer"
        grid, levels = levels_of_blocks(scores, grid, pattern, inputs_first, by_layer=by_layer)
    else:
        levels = levels_of_rows(scores, grid, inputs_first)
    none = torch.empty(len(grid), 0, dtype=torch.float64)
    return Outcome(grid, _counts(levels.values(), len(grid)), none, levels)


def _weights(scores: Scores, grid: tuple[float, ...], scope: str, ranks: Ranks) -> Outcome:
    """Single weights that compete in one layer, or in all."""
    levels: dict[str, Tensor] = {}
    counts = np.zeros(len(grid), dtype=np.int64)
    thresholds = []
    for group, sizes, key in _groups(scores, scope, ranks):
        _check_reachable(grid, scores.criterion, sizes)
        cuts = select(group, [round(s * sum(sizes)) for s in grid], key, ranks)
        levels.update(assign(group, cuts, ranks))
        counts += cuts.counts
        thresholds.append(cuts.thresholds)
    return Outcome(
        grid,
        torch.from_numpy(counts),
        thresholds[0] if scope == "global" else torch.stack(thresholds, dim=1),
        levels,
    )


def _groups(
    scores: Scores, scope: str, ranks: Ranks
) -> Iterator[tuple[Mapping[str, Tensor], list[int], torch.dtype | None]]:
    """The sets of scores that compete, with the sizes of their parameters, one set at a time."""
    own = [tensor.numel() for tensor in scores.tensors.values()]
    sizes = ranks.sum(np.array(own, dtype=np.int64)).tolist()
    if scope == "global":
        yield scores, sizes, scores.key
    else:
        for name, size in zip(scores, sizes, strict=True):
            yield {name: scores[name]}, [size], None


def reachable(
    grid: Sequence[float], criterion: Criterion, sizes: Sequence[int]
) -> tuple[float, ...]:
    """The sparsities that take none of the weights that a criterion spares.

    Examples
    --------
    >>> from confprune.competition import reachable
    >>> from confprune.criteria import resolve_criterion
    >>> reachable([0.2, 0.5, 0.9], resolve_criterion("magnitude(min_per_layer=10)"), [20, 80])
    (0.2, 0.5)
    """
    total = sum(sizes)
    spared = sum(criterion.spared(size) for size in sizes)
    return tuple(s for s in grid if not spared or round(s * total) <= total - spared)


def _check_reachable(grid: Sequence[float], criterion: Criterion, sizes: Sequence[int]) -> None:
    """Refuse sparsities that would take weights that the criterion spares."""
    total = sum(sizes)
    spared = sum(criterion.spared(size) for size in sizes)
    within = reachable(grid, criterion, sizes)
    beyond = [s for s in grid if s not in within]
    if beyond:
        most = math.floor(1e4 * (total - spared) / total) / 1e4
        raise ValueError(
            f"sparsity {beyond[0]:g} cannot be reached with criterion {str(criterion)!r}, which "
            f"spares {spared:,} of {total:,} weights; the largest possible sparsity is {most:g}"
        )


def _counts(levels: Iterable[Tensor], size: int) -> Tensor:
    """How many weights are pruned at each of so many levels, [K] int64."""
    counts = torch.zeros(size + 1, dtype=torch.int64)
    for tensor in levels:
        counts += torch.bincount(tensor.flatten(), minlength=size + 1).cpu()
    return counts.cumsum(0)[:-1]
