"""The pseudo bootstrap: how much each weight still moves in the last steps of the training."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from confprune.parameters import ParameterFilter, prunable_parameters


class WeightObserver:
    """Follows weights while they are trained: a running mean and variance of each.

    As a context it looks at the weights after every step of the optimizer; `update` does it by
    hand. Two numbers a weight are kept (Welford's method), where the weight is.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer, optional
        Needed as a context.
    parameters : names, or predicate (name, parameter) -> bool, optional
        Default: the weights of linear layers and of convolutions of any dimension.

    Raises
    ------
    ValueError
        If the optimizer trains none of these parameters.

    References
    ----------
    Ko, Oehmcke and Gieseke, "Magnitude and uncertainty pruning criterion for neural networks",
    arXiv 1912.04845, the "pseudo bootstrap". B. P. Welford, "Note on a method for calculating
    corrected sums of squares and products", Technometrics 4 (1962).

    Examples
    --------
    >>> import torch, confprune
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with confprune.criteria.WeightObserver(model, optimizer) as observer:
    ...     for _ in range(10):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(8, 2)).square().mean().backward()
    ...         optimizer.step()
    >>> levels = confprune.prune_levels(
    ...     model,
    ...     [0.5],
    ...     criterion="magnitude_uncertainty",
    ...     statistics={"deviation": observer.deviations()},
    ... )
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        parameters: ParameterFilter | None = None,
    ) -> None:
        self._weights = prunable_parameters(model, parameters)
        self._optimizer = optimizer
        self._hook: Any = None
        self._steps = 0
        self._mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}  # sums of squared distances from the mean
        if optimizer is not None:
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not any(id(weight) in trained for weight in self._weights.values()):
                raise ValueError("the optimizer trains none of the observed parameters")

    def __enter__(self) -> WeightObserver:
        if self._optimizer is None:
            raise ValueError("an observer without an optimizer is not told of steps: call update()")
        self._hook = self._optimizer.register_step_post_hook(lambda *_: self.update())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hook.remove()

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the mean and variance."""
        self._steps += 1
        for name, weight in self._weights.items():
            value = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if name not in self._mean:
                self._mean[name] = torch.zeros_like(value)
                self._squares[name] = torch.zeros_like(value)
            mean = self._mean[name]
            before = value - mean
            mean.add_(before, alpha=1 / self._steps)
            self._squares[name].addcmul_(before, value - mean)

    def deviations(self) -> dict[str, Tensor]:
        """The standard deviation of each weight over the steps seen, in its parameter's shape.

        Raises
        ------
        ValueError
            If fewer than two steps were seen.
        """
        if self._steps < 2:
            raise ValueError(
                f"the observer has seen {self._steps} steps, and a deviation takes at least 2: "
                "train within its context, or call update()"
            )
        return {name: (s / (self._steps - 1)).sqrt() for name, s in self._squares.items()}
