"""How large the inputs of every layer are, in one pass over data: what "wanda" needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from confprune.batches import batch_length, check_data
from confprune.calling import Forward, call, check_forward
from confprune.copies import running_copy
from confprune.evaluation import moved_batches, progress_bar
from confprune.grid.attention import multi_head_attention
from confprune.grid.functions import each
from confprune.grid.network import eagerly
from confprune.ops import output_positions
from confprune.parameters import ParameterFilter, prunable_parameters


def input_norms(
    model: nn.Module,
    data: Any,
    *,
    parameters: ParameterFilter | None = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    order: Tensor | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The root mean square of what each weight is multiplied with, over examples and positions.

    Parameters
    ----------
    model : torch.nn.Module
        A copy with its parameters is run, in evaluation mode, where they are.
    data : Dataset, DataLoader, tuple of tensors, or iterable of batches
        Not the examples that calibrate: `confprune.calibrate` keeps them apart by itself.
    parameters : names, or predicate (name, parameter) -> bool, optional
        Default: the weights of linear layers and of convolutions of any dimension.
    forward : callable (model, batch) -> outputs, optional
    batch_size : int, optional
        For data that is not in batches yet; default 256.
    order : [m] int64, optional
        The examples to take, of data whose order can be chosen; default all.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict from name to Tensor
        Broadcastable to the parameter; float32, where the model is.

    Raises
    ------
    ValueError
        If a parameter is no weight of a linear layer or convolution, or the model never used it.
    TypeError
        If `data`, `forward` or a parameter is of no type that will do.

    Examples
    --------
    >>> import torch, confprune
    >>> model = torch.nn.Linear(2, 1)
    >>> data = torch.tensor([[3.0, 1.0], [4.0, -1.0], [0.0, 1.0]])
    >>> norms = confprune.input_norms(model, data, progress=False)
    >>> norms["weight"].square()
    tensor([[8.3333, 1.0000]])
    """
    weights = prunable_parameters(model, parameters)
    check_data(data, batch_size)
    check_forward(forward)
    network = running_copy(model)
    meter = _Meter({id(weight): name for name, weight in weights.items()})
    with (
        torch.no_grad(),
        eagerly(),
        progress_bar(data, order, progress, "input norms") as bar,
    ):
        for batch in moved_batches(model, data, batch_size, order):
            with meter:
                call(network, batch, forward)
            bar.update(batch_length(batch))
    for name in weights:
        if name not in meter.sums:
            raise ValueError(
                f"the inputs of parameter {name!r} were not met: the model did not use it in a "
                "linear layer or a convolution; leave it out with parameters="
            )
    return {
        name: (meter.sums[name] / meter.counts[name]).sqrt().float().to(weights[name].device)
        for name in weights
    }


class _Meter(TorchFunctionMode):
    """Adds up the squares of the inputs that weights receive, in float64.

    Attributes
    ----------
    sums : dict from name to Tensor
        Sums of squares, broadcastable to the weight.
    counts : dict from name to int
        How many inputs each sum is of.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, after a look at what it multiplies with a weight."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            outputs = multi_head_attention(self._linear, *args, **kwargs)
            if outputs is not NotImplemented:
                return outputs
        measure = _MEASURES.get(func)
        if measure is not None:
            measure(self, *args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _linear(self, x, weight)
        return F.linear(x, weight, bias)

    def meets(self, weight: Any) -> bool:
        """Whether this weight is followed."""
        return id(weight) in self._names

    def add(self, weight: Tensor, squares: Tensor, count: int) -> None:
        """Take in the sums of squares of so many inputs of a weight."""
        name = self._names[id(weight)]
        # A tied weight is met in several places.
        self.sums[name] = self.sums.get(name, 0) + squares
        self.counts[name] = self.counts.get(name, 0) + count


def _linear(meter: _Meter, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    if meter.meets(weight):
        rows = input.reshape(-1, input.shape[-1])
        meter.add(weight, rows.double().square().sum(0, keepdim=True), len(rows))


def _addmm(meter: _Meter, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> None:
    if meter.meets(mat2):
        meter.add(mat2, mat1.double().square().sum(0).unsqueeze(1), len(mat1))


def _conv(dimensions: int) -> Callable[..., None]:
    def conv(
        meter: _Meter,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        if not meter.meets(weight):
            return
        batch = input if input.ndim == dimensions + 2 else input.unsqueeze(0)
        steps, spread = each(stride, dimensions), each(dilation, dimensions)
        kernel = weight.shape[2:]
        squares = F.pad(batch.double().square().sum(0), _margins(padding, kernel, spread))
        none = [0] * dimensions  # the margins are there already
        positions = output_positions(squares.shape[1:], kernel, steps, none, spread)
        sums = []
        for place in product(*(range(k) for k in kernel)):
            # What this place of the kernel meets: every stride-th input, from its own offset.
            met = [
                slice(offset * d, offset * d + s * (p - 1) + 1, s)
                for offset, d, s, p in zip(place, spread, steps, positions, strict=True)
            ]
            sums.append(squares[(slice(None), *met)].flatten(1).sum(1))
        by_input = torch.stack(sums, dim=1).view(groups, -1, *kernel)
        if groups > 1:
            by_input = by_input.repeat_interleave(weight.shape[0] // groups, 0)
        meter.add(weight, by_input, len(batch) * torch.Size(positions).numel())

    return conv


def _conv_transpose(dimensions: int) -> Callable[..., None]:
    def conv_transpose(meter: _Meter, input: Tensor, weight: Tensor, *args: Any, **_: Any) -> None:
        if meter.meets(weight):
            batch = input if input.ndim == dimensions + 2 else input.unsqueeze(0)
            squares = batch.double().square().transpose(0, 1).flatten(1)
            sums = squares.sum(1).view(-1, *[1] * (dimensions + 1))
            meter.add(weight, sums, squares.shape[1])

    return conv_transpose


def _margins(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Padding as `F.pad` takes it: both sides of each dimension, the last dimension first."""
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        margins = [0] * len(kernel) if padding == "valid" else each(padding, len(kernel))
        sides = [(margin, margin) for margin in margins]
    return [margin for side in reversed(sides) for margin in side]


_MEASURES: dict[Any, Callable[..., None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.conv1d: _conv(1),
    torch.conv2d: _conv(2),
    torch.conv3d: _conv(3),
    torch.conv_transpose1d: _conv_transpose(1),
    torch.conv_transpose2d: _conv_transpose(2),
    torch.conv_transpose3d: _conv_transpose(3),
}
