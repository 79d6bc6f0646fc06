"""The scores of many parameters, made one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

from confprune.criteria.registry import Criterion
from confprune.selection import key_type

Statistics: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""What criteria need beside the weights: a tensor for each statistic and parameter."""

KEEP_BYTES = 256 << 20
"""Scores that are kept between passes; what is above is made again."""


class Scores(Mapping[str, Tensor]):
    """The scores of tensors by a criterion, made when they are read.

    Selection reads the scores a few times, one parameter after the other. They are kept as far as
    there is room, and made again otherwise, so that no second copy of a large model is needed. They
    are on the CPU, or on the CUDA device of the weight.

    Parameters
    ----------
    tensors : mapping from name to Tensor
        The weights, in the order in which ties are broken.
    criterion : Criterion
    statistics : mapping, optional
        What the criterion needs of each parameter.

    Attributes
    ----------
    tensors, criterion
        As given.

    Raises
    ------
    ValueError
        If a statistic that the criterion needs is missing or has a shape that does not fit; when
        read, if scores are NaN.

    Examples
    --------
    >>> from confprune.criteria import Scores, resolve_criterion
    >>> scores = Scores({"w": torch.tensor([1.0, -3.0])}, resolve_criterion("lamp"))
    >>> scores["w"]
    tensor([0.1000, 1.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        criterion: Criterion,
        statistics: Statistics | None = None,
    ) -> None:
        self.tensors = tensors
        self.criterion = criterion
        self._needed = {
            name: _needed(name, position, tensor, criterion, statistics or {})
            for position, (name, tensor) in enumerate(tensors.items())
        }
        self._kept: dict[str, Tensor] = {}
        self._room = KEEP_BYTES

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        weight = self.tensors[name]
        scores = self.criterion(weight, **self._needed[name])
        if scores is not weight:
            self._check(name, scores)
        scores = scores.to(weight.device if weight.is_cuda else "cpu")
        if scores is not weight and scores.nbytes <= self._room:
            self._room -= scores.nbytes
            self._kept[name] = scores
        return scores

    def _check(self, name: str, scores: Tensor) -> None:
        """Raise ValueError for scores of another shape, or that are NaN."""
        weight = self.tensors[name]
        if scores.shape != weight.shape:
            raise ValueError(
                f"criterion {str(self.criterion)!r} gives scores of shape {list(scores.shape)} "
                f"for parameter {name!r} of shape {list(weight.shape)}; they must be the same"
            )
        if weight.isnan().any():
            self._refuse_nan(name)
        if scores.isnan().any():
            raise ValueError(
                f"criterion {str(self.criterion)!r} gives NaN for parameter {name!r}: it does not "
                "take infinite weights or statistics; repair them, or leave the parameter out with "
                "parameters="
            )

    @property
    def key(self) -> torch.dtype:
        """The type whose bits order all scores: that of a score depends on its weight's alone."""
        smallest: dict[torch.dtype, str] = {}
        for name, tensor in self.tensors.items():
            other = smallest.setdefault(tensor.dtype, name)
            if tensor.numel() < self.tensors[other].numel():
                smallest[tensor.dtype] = name
        return key_type({name: self[name] for name in smallest.values()})

    def check_weights(self) -> None:
        """Raise ValueError for NaN weights, which only selection by histograms sees by itself."""
        for name, weight in self.tensors.items():
            if weight.isnan().any():
                self._refuse_nan(name)

    def _refuse_nan(self, name: str) -> NoReturn:
        raise ValueError(
            f"parameter {name!r} holds NaN, which has no magnitude; repair the weights, or "
            "leave the parameter out with parameters="
        )


def _needed(
    name: str, position: int, weight: Tensor, criterion: Criterion, statistics: Statistics
) -> dict[str, Tensor | int]:
    """What a criterion needs to score one parameter."""
    needed: dict[str, Tensor | int] = {}
    for need in criterion.needs:
        if need == "position":
            needed[need] = position
            continue
        if name not in statistics.get(need, {}):
            of = "" if need not in statistics else f" of parameter {name!r}"
            raise ValueError(
                f"criterion {criterion.name!r} needs the statistic {need!r}{of}: pass "
                f"statistics={{{need!r}: {{name: tensor}}}}{_SOURCES.get(need, '')}"
            )
        statistic = statistics[need][name]
        if not _broadcasts(statistic.shape, weight.shape):
            raise ValueError(
                f"statistic {need!r} of parameter {name!r} has shape {list(statistic.shape)}, "
                f"which does not fit {list(weight.shape)}"
            )
        needed[need] = statistic.to(weight.device)
    return needed


_SOURCES = {
    "input_norm": ", made by confprune.input_norms, or score_data= of confprune.calibrate",
    "deviation": ", made by confprune.criteria.WeightObserver",
}


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(shape, to) == to)
    except RuntimeError:
        return False
