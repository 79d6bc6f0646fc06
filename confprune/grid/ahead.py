"""Outputs that were made together with what follows their layer, until the model has got there.

The model calls those functions nevertheless, and is given the output when it has called the last.
Before, something stands for it that is of no other use: so it is noticed where a model, on this
batch, uses a tensor that was never made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from confprune.grid.fusion import ADDITIONS, Fusion, is_in_place
from confprune.grid.levels_at_once import stand_in, version


class ChangedError(RuntimeError):
    """The model did not call the functions that the fusions took for granted."""

    def __init__(self) -> None:
        super().__init__("the model's functions changed from one call to the next")


@dataclass(slots=True)
class _Output:
    """An output that is ahead of the model by some steps, one of which may add a residual.

    A linear layer takes it after that, if the fusion is chained.
    """

    output: Tensor
    fusion: Fusion
    residual: Tensor | None
    version: int  # of the residual that was added
    given: Tensor  # what the model has of it
    step: int = 0  # number of the next step

    def is_next(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether this call is the next step, or that of the linear layer after them."""
        first = bool(args) and args[0] is self.given
        if self.step == len(self.fusion.steps):
            return first and func is F.linear
        step = self.fusion.steps[self.step]
        if func is not step.function or is_in_place(func, kwargs) != step.in_place:
            return False
        if func not in ADDITIONS:
            return first and self.fusion.repeats(func, args, kwargs)
        if kwargs or len(args) != 2 or (step.in_place and not first):
            return False
        return self._is_residual(args[1]) if first else self._is_residual(args[0])

    def _is_residual(self, tensor: Tensor) -> bool:
        """Whether this is the residual that was added, and has not changed since."""
        same: bool = tensor is self.residual
        return same and version(tensor) == self.version


class Ahead:
    """The outputs that are ahead of the model, and what stood for some of them."""

    def __init__(self, level: Tensor) -> None:
        self._level = level
        self._outputs: dict[int, _Output] = {}
        self._used: dict[int, Tensor] = {}

    def give(self, y: Tensor, fusion: Fusion, residual: Tensor | None) -> Tensor:
        """What the model is given for `y`, which is already what the fusion makes of it."""
        if not fusion.steps and not fusion.chained:
            return y
        given = y if fusion.steps_to_output == 0 else self._stand_in(y)
        before = 0 if residual is None else version(residual)
        self._outputs[id(given)] = _Output(y, fusion, residual, before, given)
        return given

    def next(
        self, tensors: Sequence[Tensor], func: Any, args: Any, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """What the model is given for a call that an output is ahead of; None for another call.

        Raises
        ------
        ChangedError
            If one of the tensors stands for something else than the call takes it for.
        """
        found = None
        for tensor in tensors:
            if id(tensor) in self._used:
                raise ChangedError
            ahead = self._outputs.get(id(tensor))
            if ahead is None:
                continue
            if not ahead.is_next(func, args, kwargs):
                raise ChangedError
            if ahead.step < len(ahead.fusion.steps):
                found = ahead
        return None if found is None else self._after_step(found)

    def _after_step(self, ahead: _Output) -> Tensor:
        """What the model has of an output after the next step."""
        fusion, before = ahead.fusion, ahead.given
        ahead.step += 1
        if not fusion.steps[ahead.step - 1].in_place:
            self.use(before)
            final = ahead.step >= fusion.steps_to_output
            ahead.given = ahead.output if final else self._stand_in(before)
            self._outputs[id(ahead.given)] = ahead
        if ahead.step == len(fusion.steps) and not fusion.chained:
            del self._outputs[id(ahead.given)]
        return ahead.given

    def _stand_in(self, tensor: Tensor) -> Tensor:
        return stand_in(tensor.shape, tensor.dtype, self._level)

    def use(self, tensor: Tensor) -> None:
        """Note that a tensor stood for something that the model may not use any more."""
        self._outputs.pop(id(tensor), None)
        self._used[id(tensor)] = tensor  # kept, since another may not have its identity

    def take(self, x: Tensor) -> None:
        """Note that a layer takes an output that is complete."""
        self._outputs.pop(id(x), None)

    def finish(self, outputs: Tensor) -> None:
        """Raise ChangedError where an output was not used as the fusions took for granted."""
        if self._outputs or id(outputs) in self._used:
            raise ChangedError
