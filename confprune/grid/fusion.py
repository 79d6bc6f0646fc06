"""Steps that follow a layer and cost nothing when its product is written.

A product leaves its kernel once; on the way, a batch normalisation with fixed statistics, the
addition of a residual to a convolution, and a ReLU can be done, and idle dropout left out. Where a
model begins with linear layers, with no more than that between them, they are one product from the
model's input to the outputs of the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from confprune.grid.levels_at_once import depends_on_level, version

MOST_SHARED = 32767
"""Columns of a weight whose levels can share one input."""

CONVOLUTIONS: set[Any] = {torch.conv1d, torch.conv2d, torch.conv3d}
LAYER_CALLS: set[Any] = {F.linear, torch.addmm} | CONVOLUTIONS
ADDITIONS: set[Any] = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}
_DROPOUTS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
_RELUS: set[Any] = {F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_SAME = _DROPOUTS | {Tensor.add_, Tensor.__iadd__, torch.relu_, Tensor.relu_}


class Affine(NamedTuple):
    """y = scale · x + shift, by channel."""

    scale: Tensor
    shift: Tensor


def fixed_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Affine | None:
    """``F.batch_norm`` as scale and shift; None where it has no fixed statistics.

    Examples
    --------
    >>> import torch
    >>> from confprune.grid.fusion import fixed_batch_norm
    >>> ones = torch.ones(1)
    >>> scale, shift = fixed_batch_norm(ones[None], ones, 4 * ones, eps=0)
    >>> scale.item(), shift.item()
    (0.5, -0.5)
    """
    if training or running_mean is None or running_var is None:
        return None
    if input.dtype not in (torch.float32, torch.float64):
        return None
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    return Affine(scale, shift if bias is None else shift + bias)


class Residual(NamedTuple):
    """What is added to a layer's output: the input or the output of a call of a layer.

    Attributes
    ----------
    layer : int
        Number of the call.
    steps : int or None
        It is the output after so many steps; None for the input.
    """

    layer: int
    steps: int | None


class Step(NamedTuple):
    """One function that follows a layer.

    Attributes
    ----------
    function : torch function
    in_place : bool
        What it returns is the tensor it was given.
    """

    function: Any
    in_place: bool


class _Setting(NamedTuple):
    """An argument as it was, which may have been worked on in place since."""

    value: Any
    version: int
    copy: Any

    @classmethod
    def of(cls, value: Any) -> _Setting:
        if isinstance(value, Tensor):
            return cls(value, version(value), value.clone())
        return cls(value, 0, value)

    def is_still(self, other: Any) -> bool:
        """Whether `other` is as it was; copies of a network have copies of its statistics."""
        if not isinstance(self.value, Tensor) or not isinstance(other, Tensor):
            return bool(self.value == other)
        if depends_on_level(other):
            return False
        same = self.value is other and version(other) == self.version
        return same or torch.equal(self.copy, other)


@dataclass
class Fusion:
    """What one call of a layer does besides its product.

    Attributes
    ----------
    convolution : bool
        Only convolutions add residuals.
    steps : list of Step
        What is done with it, in order.
    affine : Affine or None
    norm : list
        The arguments of the batch normalisation that this is, less its input.
    residual : Residual or None
    chained : bool
        What comes of it goes into the next call, of a linear layer, and nowhere else; as what came
        of all calls before.
    """

    convolution: bool = False
    steps: list[Step] = field(default_factory=list)
    affine: Affine | None = None
    norm: list[_Setting] = field(default_factory=list)
    residual: Residual | None = None
    chained: bool = False

    @property
    def relu(self) -> bool:
        """Whether negative outputs become 0."""
        return any(step.function in _RELUS for step in self.steps)

    @cached_property
    def steps_to_output(self) -> int:
        """After how many steps the tensor is that after all of them; of a fusion that is found."""
        return max((i for i, step in enumerate(self.steps, 1) if not step.in_place), default=0)

    def extended(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Take one more function in, if it is of the kind that can be."""
        if _is_idle(func, args, kwargs) or (func in _RELUS and not self.relu):
            self.steps.append(Step(func, is_in_place(func, kwargs)))
            return True
        if func is F.batch_norm and not self.steps:
            self.affine = fixed_batch_norm(*args, **kwargs)
            if self.affine is not None:
                self.norm = [_Setting.of(value) for value in _settings(args, kwargs)]
                self.steps.append(Step(func, is_in_place(func, kwargs)))
                return True
        return False

    def repeats(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether one of the functions, called again, does what it did."""
        if func is F.batch_norm:
            settings = _settings(args, kwargs)
            return len(settings) == len(self.norm) and all(
                map(_Setting.is_still, self.norm, settings)
            )
        return func not in _DROPOUTS or _is_idle(func, args, kwargs)

    def added(self, func: Any, residual: Residual) -> bool:
        """Take an addition in, if it can be after the functions so far."""
        if self.relu or self.residual is not None or not self.convolution:
            return False
        self.steps.append(Step(func, is_in_place(func, {})))
        self.residual = residual
        return True

    def cut(self, length: int) -> None:
        """Keep the first steps only."""
        del self.steps[length:]
        functions = [step.function for step in self.steps]
        if F.batch_norm not in functions:
            self.affine = None
        if ADDITIONS.isdisjoint(functions):
            self.residual = None

    def without_residual(self) -> Fusion:
        """The steps before an addition, for where the residual is not at hand."""
        before = [step.function in ADDITIONS for step in self.steps].index(True)
        return replace(self, steps=self.steps[:before], residual=None)


def is_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a step returns the tensor it is given, as a dropout does that is off."""
    return func in _SAME or (func is F.relu and bool(kwargs.get("inplace")))


def _is_idle(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this is a dropout that is off."""
    return func in _DROPOUTS and not kwargs.get("training", args[2] if len(args) > 2 else True)


def _settings(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a function is given besides its input."""
    return *args[1:], *(value for _, value in sorted(kwargs.items()))
