"""Patterns of zeros: N of every M inputs, blocks, and whole rows.

=========== ========================================================= =======================
pattern     what is pruned together                                   reachable sparsities
=========== ========================================================= =======================
``"N:M"``   the N least of every M consecutive inputs of an output,   0, 1/M, ..., (M - 1)/M
            M a number: ``"N:4"``; convolutions: of M channels
            at one place of the kernel
``"RxC"``   blocks of R outputs by C inputs, such as ``"4x4"``;       as many as there are
            convolutions: at one place of the kernel                  blocks
``"rows"``  all weights of an output, that is a neuron or a channel   as many as there are
                                                                      outputs
=========== ========================================================= =======================

Blocks and rows compete by the root mean square of their scores, so that large and small ones are
judged alike. Pruned structures are zeros: the network keeps its shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from confprune.layout import as_before, outputs_first

_CHUNK = 1 << 22  # scores that are sorted at a time


@dataclass(frozen=True)
class NOfM:
    """N zeros in every M consecutive inputs, one N a level."""

    m: int


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` outputs by `columns` inputs; None: all inputs of an output."""

    rows: int
    columns: int | None


Pattern = NOfM | Blocks


def resolve_pattern(pattern: str | None) -> Pattern | None:
    """The pattern that a text names; None for single weights.

    Raises
    ------
    ValueError
        If it names none, saying how they are written.
    TypeError
        If it is no text.

    Examples
    --------
    >>> from confprune.patterns import resolve_pattern
    >>> resolve_pattern("N:4"), resolve_pattern("8x1"), resolve_pattern("rows")
    (NOfM(m=4), Blocks(rows=8, columns=1), Blocks(rows=1, columns=None))
    """
    if pattern is None:
        return None
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a text, such as 'N:4' or '4x4', got {pattern!r}")
    if pattern == "rows":
        return Blocks(1, None)
    if group := re.fullmatch(r"N:([1-9]\d*)", pattern):
        if int(group[1]) > 1:
            return NOfM(int(group[1]))
    elif block := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", pattern):
        return Blocks(int(block[1]), int(block[2]))
    fixed = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
    hint = ""
    if fixed and int(fixed[1]) < int(fixed[2]):
        share = f"{fixed[1]}/{fixed[2]}"
        hint = f"; for {pattern} alone, 'N:{fixed[2]}' with sparsities=[{share}] of zeros"
    raise ValueError(
        f"pattern {pattern!r} is unknown; write 'N:4' for N zeros in every 4 inputs, '4x4' for "
        f"blocks of 4 outputs by 4 inputs, or 'rows'{hint}"
    )


def levels_in_rows(matrix: Tensor, counts: np.ndarray) -> Tensor:
    """Prune levels where every row competes alone: counts[j] of its scores go at level j.

    Parameters
    ----------
    matrix : Tensor [R, n]
        Scores; absolute values count, equal ones go by position.
    counts : [K] int
        Non-decreasing, each at most n.

    Returns
    -------
    Tensor [R, n], uint8 up to 255 levels, int16 above

    Examples
    --------
    >>> import numpy as np
    >>> from confprune.patterns import levels_in_rows
    >>> levels_in_rows(torch.tensor([[3.0, -1.0], [2.0, 2.0]]), np.array([0, 1]))
    tensor([[2, 1],
            [1, 2]], dtype=torch.uint8)
    """
    size = matrix.shape[1]
    of_rank = np.searchsorted(counts, np.arange(size), side="right")
    by_rank = torch.from_numpy(of_rank).to(matrix.device, _level_type(len(counts)))
    levels = torch.empty(matrix.shape, dtype=by_rank.dtype, device=matrix.device)
    step = max(1, _CHUNK // max(1, size))
    for begin in range(0, len(matrix), step):
        rows = matrix[begin : begin + step].abs()
        order = torch.argsort(rows, dim=1, stable=True)
        levels[begin : begin + step].scatter_(1, order, by_rank.expand(rows.shape))
    return levels


def levels_of_rows(
    scores: Mapping[str, Tensor], grid: tuple[float, ...], inputs_first: Mapping[str, int]
) -> dict[str, Tensor]:
    """Prune levels where each output of each parameter competes alone.

    At sparsity s exactly round(s * n) of the n weights of every output are pruned.
    """
    levels = {}
    for name, tensor in scores.items():
        groups = inputs_first.get(name, 0)
        by_output = outputs_first(tensor, groups)
        matrix = by_output.flatten(1)
        counts = np.array([round(s * matrix.shape[1]) for s in grid])
        found = levels_in_rows(matrix, counts).view(by_output.shape)
        levels[name] = as_before(found, tensor.shape, groups)
    return levels


def check_inputs(
    tensors: Mapping[str, Tensor], pattern: NOfM, inputs_first: Mapping[str, int]
) -> None:
    """Raise ValueError for parameters whose inputs M does not divide, naming them."""
    odd = []
    for name, tensor in tensors.items():
        inputs = outputs_first(tensor, inputs_first.get(name, 0)).shape[1]
        if inputs % pattern.m:
            odd.append(f"{name!r} ({inputs})")
    if odd:
        raise ValueError(
            f"pattern 'N:{pattern.m}' needs a multiple of {pattern.m} inputs, unlike those of "
            f"{', '.join(odd)}; leave these out with parameters="
        )


def levels_of_n_m(
    scores: Mapping[str, Tensor],
    grid: tuple[float, ...],
    pattern: NOfM,
    inputs_first: Mapping[str, int],
) -> tuple[tuple[float, ...], dict[str, Tensor]]:
    """The sparsities nearest to a grid that N:M reaches, and the prune levels there."""
    m = pattern.m
    counts = np.unique([min(m - 1, round(s * m)) for s in grid])
    levels = {}
    for name, tensor in scores.items():
        groups = inputs_first.get(name, 0)
        channels_last = outputs_first(tensor, groups).movedim(1, -1)
        found = levels_in_rows(channels_last.reshape(-1, m), counts)
        levels[name] = as_before(
            found.view(channels_last.shape).movedim(-1, 1), tensor.shape, groups
        )
    return tuple(float(count / m) for count in counts), levels


def levels_of_blocks(
    scores: Mapping[str, Tensor],
    grid: tuple[float, ...],
    pattern: Blocks,
    inputs_first: Mapping[str, int],
    *,
    by_layer: bool,
) -> tuple[tuple[float, ...], dict[str, Tensor]]:
    """The sparsities nearest to a grid that whole blocks reach, and the prune levels there.

    Blocks at the edge of a weight may be smaller. At least one block survives. The scores of blocks
    are summed on the CPU, whatever device holds the weights: other orders of addition would order
    blocks otherwise.

    Parameters
    ----------
    by_layer : bool
        Whether blocks compete by their place in the order of their own layer, so that all layers
        are pruned alike, rather than by their scores.
    """
    shapes: dict[str, torch.Size] = {}
    units: dict[str, _Units] = {}
    for name, tensor in scores.items():
        shapes[name] = tensor.shape
        units[name] = _units(outputs_first(tensor.cpu(), inputs_first.get(name, 0)), pattern)
    importance = [unit.shares() if by_layer else unit.scores.flatten() for unit in units.values()]
    sizes = torch.cat([unit.sizes.flatten() for unit in units.values()])
    order = torch.argsort(torch.cat(importance), stable=True)
    reached = np.concatenate([[0], sizes[order].cumsum(0).numpy()])
    cuts = np.unique([_nearest(reached[:-1], s * reached[-1]) for s in grid])
    of_rank = np.searchsorted(cuts, np.arange(len(order)), side="right")
    by_unit = torch.empty(len(order), dtype=_level_type(len(cuts)))
    by_unit[order] = torch.from_numpy(of_rank).to(by_unit.dtype)

    levels = {}
    parts = by_unit.split([unit.sizes.numel() for unit in units.values()])
    for (name, unit), part in zip(units.items(), parts, strict=True):
        levels[name] = as_before(unit.spread(part), shapes[name], inputs_first.get(name, 0))
    return tuple(float(share) for share in reached[cuts] / reached[-1]), levels


@dataclass(frozen=True)
class _Units:
    """The blocks of one parameter, in a grid [rows of blocks, places of the kernel, columns].

    Attributes
    ----------
    scores, sizes : Tensor
        Root mean square of the weights' scores, and number of weights.
    block : (int, int)
        Outputs and inputs of a whole one.
    shape : torch.Size
        Of the weight, outputs first.
    """

    scores: Tensor
    sizes: Tensor
    block: tuple[int, int]
    shape: torch.Size

    def shares(self) -> Tensor:
        """The middle of the stretch that each block takes in the order of its layer, in [0, 1]."""
        order = torch.argsort(self.scores.flatten(), stable=True)
        sizes = self.sizes.flatten()[order].double()
        shares = torch.empty_like(sizes)
        shares[order] = (sizes.cumsum(0) - sizes / 2) / sizes.sum()
        return shares

    def spread(self, values: Tensor) -> Tensor:
        """Values of the blocks as values of their weights, outputs first."""
        outputs, inputs = self.block
        rows = values.view(self.sizes.shape).repeat_interleave(outputs, 0)[: self.shape[0]]
        width = self.shape[1:].numel() // max(1, self.sizes.shape[1])
        whole = rows.repeat_interleave(inputs, 2)[:, :, :width]
        return whole.movedim(2, 1).reshape(self.shape)


def _units(tensor: Tensor, pattern: Blocks) -> _Units:
    """The blocks of scores [outputs, inputs, kernel...]."""
    by_place = tensor.unsqueeze(-1).flatten(2).movedim(2, 1)  # [outputs, places, inputs]
    if pattern.columns is None:
        by_place = tensor.flatten(1).unsqueeze(1)
    outputs, places, inputs = by_place.shape
    r = min(pattern.rows, max(1, outputs))
    c = min(pattern.columns or inputs, inputs) or 1
    padding = (0, -inputs % c, 0, 0, 0, -outputs % r)
    squares = F.pad(by_place.double().square(), padding)
    down, across = squares.shape[0] // r, squares.shape[2] // c
    sums = squares.view(down, r, places, across, c).sum((1, 4))
    sizes = _edges(outputs, r).view(-1, 1, 1) * _edges(inputs, c).expand(places, -1)
    return _Units((sums / sizes).sqrt(), sizes, (r, c), tensor.shape)


def _edges(length: int, block: int) -> Tensor:
    """The lengths of the blocks that cover `length`; only the last may be shorter."""
    begins = range(0, length, block)
    return torch.tensor([min(block, length - begin) for begin in begins], dtype=torch.int64)


def _level_type(levels: int) -> torch.dtype:
    return torch.uint8 if levels <= 255 else torch.int16


def _nearest(values: np.ndarray, target: float) -> int:
    """The index of the increasing value that is nearest to the target; the lower of two."""
    above = min(int(np.searchsorted(values, target)), len(values) - 1)
    below = max(0, above - 1)
    return below if target - values[below] <= values[above] - target else above
