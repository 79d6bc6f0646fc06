"""The model's own code, run with every prunable weight replaced by its masked self.

A `TorchFunctionMode` sees each torch function the model calls. Where one receives a prunable
weight it is given the masked weight of the level instead: ``F.linear``, ``addmm`` and the
convolutions through the grid operators, ``F.embedding`` by masking the rows it takes, anything else
with the masked weight written out. Under ``torch.vmap`` over the level this evaluates all levels at
once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from confprune import ops  # noqa: F401  (registers torch.ops.confprune)
from confprune.grid import on_cuda  # noqa: F401  (registers the grid operators for CUDA)
from confprune.grid.attention import attention, multi_head_attention
from confprune.grid.fusion import (
    ADDITIONS,
    LAYER_CALLS,
    MOST_SHARED,
    Fusion,
    Residual,
    fixed_batch_norm,
)
from confprune.grid.levels_at_once import depends_on_level, levels_at_once

_BLOCK = 64  # columns whose inputs stay in the first-level cache
_TAPS_BLOCK = 96  # the same where neighbouring columns of a convolution share inputs
_MAX_POOL = 3  # side of the largest window that is pooled view by view


class Layer:
    """A prunable weight, its prune levels, and what the grid operators need of them."""

    def __init__(self, name: str, weight: Tensor, levels: Tensor, num_levels: int) -> None:
        self.name = name
        self.weight = weight.detach()
        self.levels = levels.to(weight.device)
        self.num_levels = num_levels
        self._rows: dict[Any, tuple[list[Tensor], int, int]] = {}
        self._making = Lock()

    def masked(self, level: Tensor | int) -> Tensor:
        """The weight at one level."""
        return torch.where(self.levels > level, self.weight, 0)

    def rows(self, *, shared: bool, transposed: bool = False) -> tuple[list[Tensor], int, int]:
        """Prefix rows, the number of rows, and their block; made when first asked for.

        Levels that share one input walk each row once, so that their rows need no blocks. On CUDA
        the grid operators take the weight and its prune levels instead.
        """
        if self.weight.is_cuda:
            shared = False  # all the same there
        with self._making:
            if (shared, transposed) not in self._rows:
                self._rows[shared, transposed] = self._made(shared, transposed)
            return self._rows[shared, transposed]

    def _made(self, shared: bool, transposed: bool) -> tuple[list[Tensor], int, int]:
        weight, levels = self.weight, self.levels
        if transposed:
            weight, levels = weight.t(), levels.t()
        if weight.is_cuda:
            return [weight.contiguous(), levels.contiguous()], weight.shape[0], 0
        block = _TAPS_BLOCK if weight[0, 0].numel() > 1 else _BLOCK
        weight, levels = weight.flatten(1), levels.flatten(1)
        if shared:
            block = min(weight.shape[1], MOST_SHARED)
        rows = torch.ops.confprune.prefix_rows(weight, levels, self.num_levels, block)
        return list(rows), weight.shape[0], block

    def takes(self, x: Any) -> bool:
        """Whether the grid operators can multiply `x` with this weight."""
        return (
            isinstance(x, Tensor)
            and x.device == self.weight.device
            and x.device.type in ("cpu", "cuda")
            and x.dtype == self.weight.dtype
            and self.weight.numel() > 0
            and x.numel() > 0
        )


class GridMode(TorchFunctionMode):
    """Replaces prunable weights by their masked selves at `level`, a scalar that vmap may batch.

    Parameters
    ----------
    layers : dict from id to Layer
        The prunable weights, by their identity.
    level : scalar tensor
    batch_minor : bool
        Whether activations are kept with the batch last in memory.
    fusions : sequence of Fusion
        What each call of a layer does besides, in the order of the calls; may be empty.

    Attributes
    ----------
    met : set of str
        Names of the weights that a function has received.
    written : int
        Bytes of the largest masked weight that was written out.
    """

    def __init__(
        self,
        layers: dict[int, Layer],
        level: Tensor,
        *,
        batch_minor: bool,
        fusions: Sequence[Fusion] = (),
    ) -> None:
        super().__init__()
        self.layers = layers
        self.level = level
        self.batch_minor = batch_minor
        self.met: set[str] = set()
        self.written = 0
        self.residual: Tensor | None = None  # that the call under way adds
        self._fusions = enumerate(fusions)
        self._fusion = Fusion()  # of the call under way
        self._layer = -1  # its number
        self._wanted = {fusion.residual for fusion in fusions}
        self._residuals: dict[Residual, Tensor] = {}
        self._done: dict[int, _Done] = {}  # outputs ahead of the model
        self._chain: list[_Linear] = []  # that wait for the last of them
        self._head = level  # the input of the first

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, with masked weights where it was given prunable ones."""
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        ahead = self._ahead(func, args, kwargs)
        if ahead is not None:
            return ahead
        prunable = [tensor for tensor in _tensors(args, kwargs) if id(tensor) in self.layers]
        self.met.update(self.layers[id(weight)].name for weight in prunable)
        if prunable and torch.is_autocast_enabled(self.level.device.type):
            raise NotImplementedError("torch.autocast chooses other types under vmap than without")
        if prunable and func in LAYER_CALLS:
            self._begin(args)
        replacement = _FUSED.get(func) if prunable else _UNDER_VMAP.get(func)
        if replacement is not None:
            result = replacement(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if not prunable:
            return func(*args, **kwargs)
        args, kwargs = tree_map(self._masked, (args, kwargs))
        return func(*args, **kwargs)

    def _begin(self, args: Any) -> None:
        """Find the fusion of a call of a layer, and the residual that it adds."""
        self._layer, self._fusion = next(self._fusions, (-1, Fusion()))
        if args:
            self._keep(Residual(self._layer, None), args[0])
        self.residual = None
        if self._fusion.residual is not None:
            self.residual = self._residuals.pop(self._fusion.residual, None)
            if self.residual is None:
                self._fusion = self._fusion.without_residual()

    def _keep(self, residual: Residual, tensor: Tensor) -> None:
        if residual in self._wanted:
            self._residuals[residual] = tensor

    def fused(self, y: Tensor) -> Tensor:
        """Note that `y` is already what the functions of the call's fusion make of it."""
        functions, chained = self._fusion.functions, self._fusion.chained
        self._keep(Residual(self._layer, len(functions)), y)
        if functions or chained:
            self._done[id(y)] = _Done(y, functions, self.residual, chained)
        self._layer, self._fusion, self.residual = -1, Fusion(), None
        return y

    def follow(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, bool]:
        """The shift, the scale and whether there is a ReLU, for the call under way."""
        affine = self._fusion.affine
        if affine is None:
            return bias, None, self._fusion.relu
        shift = affine.shift if bias is None else affine.shift + affine.scale * bias
        return shift, affine.scale, self._fusion.relu

    def linear(self, x: Tensor, layer: Layer, bias: Tensor | None, *, transposed: bool) -> Tensor:
        """The output of a linear layer, the call under way.

        Of a chain of layers only the last gives outputs; what stands for those before has their
        shape and nothing else.
        """
        first = not self._chain
        if not first:
            self.finish()  # unless `x` stands for the outputs of the last of them
        shared = first and not depends_on_level(x)
        step = _Linear(*layer.rows(shared=shared, transposed=transposed), *self.follow(bias))
        if self._fusion.chained and (shared or not first):
            self._head = x if first else self._head
            self._chain.append(step)
            return levels_at_once(step.stand_in, self.level, x)
        # Sequences go on to normalisations over their features, which want these to be contiguous.
        batch_minor = self.batch_minor and x.ndim == 2
        if first:
            multiply = functools.partial(step.multiply, batch_minor)
            return levels_at_once(multiply, self.level, x)
        chain, self._chain = [*self._chain, step], []
        multiply = functools.partial(_multiply_chain, chain, batch_minor)
        return levels_at_once(multiply, self.level, self._head)

    def finish(self) -> None:
        """Raise RuntimeError where an output was not used as the fusions took for granted."""
        if self._done:
            raise RuntimeError("the model's functions changed from one call to the next")

    def _ahead(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """The output that this call is about, if it has been made together with its layer."""
        if not self._done:
            return None
        for tensor in _tensors(args, kwargs):
            done = self._done.get(id(tensor))
            if done is not None:
                if not done.is_next(func, args):
                    self.finish()
                del self._done[id(tensor)]
                if not done.functions:
                    return None
                if len(done.functions) > 1 or done.chained:
                    self._done[id(tensor)] = done._replace(functions=done.functions[1:])
                return tensor
        return None

    def _is_prunable(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self.layers

    def _masked(self, value: Any) -> Any:
        if not self._is_prunable(value):
            return value
        self.written = max(self.written, value.nbytes)
        return self.layers[id(value)].masked(self.level)

    def layer(self, weight: Any, x: Any) -> Layer | None:
        """The layer of a prunable weight that the grid operators can multiply with `x`."""
        layer = self.layers.get(id(weight))
        return layer if layer is not None and layer.takes(x) else None


class _Done(NamedTuple):
    """An output that is ahead of the model by some functions, one of which may add a residual.

    A linear layer takes it after that, if it is `chained`.
    """

    output: Tensor
    functions: Sequence[Any]
    residual: Tensor | None
    chained: bool

    def is_next(self, func: Any, args: Any) -> bool:
        """Whether this call is the first of the functions, or that of the linear layer."""
        if func is not (self.functions[0] if self.functions else F.linear):
            return False
        if func in ADDITIONS:
            return any(a is self.output and b is self.residual for a, b in (args, args[::-1]))
        return args[0] is self.output


class _Linear(NamedTuple):
    """A linear layer and what follows it, as the grid operators take them."""

    rows: list[Tensor]
    outputs: int
    block: int
    shift: Tensor | None
    scale: Tensor | None
    relu: bool

    def multiply(self, batch_minor: bool, level: Tensor, x: Tensor) -> Tensor:
        """Outputs [K, ..., outputs] of inputs [1 or K, ..., in]."""
        y = torch.ops.confprune.grid_linear(
            x.reshape(len(x), -1, x.shape[-1]),
            self.shift,
            level,
            self.rows,
            self.outputs,
            self.block,
            batch_minor,
            self.scale,
            self.relu,
        )
        return y.reshape(len(level), *x.shape[1:-1], self.outputs)  # type: ignore[no-any-return]

    def stand_in(self, level: Tensor, x: Tensor) -> Tensor:
        """Something of the shape of the outputs."""
        return x.new_empty(()).expand(len(level), x.shape[1], self.outputs)


def _multiply_chain(
    layers: Sequence[_Linear], batch_minor: bool, level: Tensor, x: Tensor
) -> Tensor:
    """Outputs [K, N, outputs] of linear layers that follow each other, from x [1, N, in]."""
    rows, outputs, blocks, shifts, scales, relus = zip(*layers, strict=True)
    y = torch.ops.confprune.grid_mlp(
        x, level, list(itertools.chain(*rows)), outputs, blocks, shifts, scales, relus
    )
    return y if batch_minor else y.contiguous()  # type: ignore[no-any-return]


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a torch function, in lists and tuples too."""
    found: list[Tensor] = []
    for value in itertools.chain(args, kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value, {})
    return found


def _linear(mode: GridMode, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _matrix_product(mode, input, weight, bias, transposed=False)


def _addmm(
    mode: GridMode, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    if beta != 1 or alpha != 1 or input.ndim != 1 or mode.layer(mat1, mat2) is not None:
        return NotImplemented
    return _matrix_product(mode, mat1, mat2, input, transposed=True)


def _matrix_product(
    mode: GridMode, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool
) -> Any:
    layer = mode.layer(weight, x)
    if layer is None or weight.ndim != 2 or (bias is not None and id(bias) in mode.layers):
        return NotImplemented
    return mode.fused(mode.linear(x, layer, bias, transposed=transposed))


def _conv(dimensions: int) -> Callable[..., Any]:
    def conv(
        mode: GridMode,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        layer = mode.layer(weight, input)
        if layer is None or (bias is not None and id(bias) in mode.layers):
            return NotImplemented
        margin = _padding(padding, weight, dilation)
        if margin is None or input.ndim not in (dimensions + 1, dimensions + 2):
            return NotImplemented
        rows, outputs, block = layer.rows(shared=not depends_on_level(input))
        batched = input.ndim == dimensions + 2
        shift, scale, relu = mode.follow(bias)

        def convolve(level: Tensor, *inputs: Tensor) -> Tensor:
            x, *residual = inputs if batched else (tensor.unsqueeze(1) for tensor in inputs)
            y = torch.ops.confprune.grid_conv(
                x,
                shift,
                level,
                rows,
                outputs,
                block,
                list(weight.shape[2:]),
                each(stride, dimensions),
                margin,
                each(dilation, dimensions),
                groups,
                scale,
                relu,
                *residual,
            )
            y = y if mode.batch_minor else y.contiguous()
            return y if batched else y.squeeze(1)  # type: ignore[no-any-return]

        inputs = [input] if mode.residual is None else [input, mode.residual]
        return mode.fused(levels_at_once(convolve, mode.level, *inputs))

    return conv


def _padding(padding: Any, weight: Tensor, dilation: Any) -> list[int] | None:
    """Padding of each dimension in numbers; None where the two sides differ."""
    dimensions = weight.ndim - 2
    if padding == "valid":
        return [0] * dimensions
    if padding == "same":
        reach = [
            d * (k - 1) for d, k in zip(each(dilation, dimensions), weight.shape[2:], strict=True)
        ]
        return [r // 2 for r in reach] if all(r % 2 == 0 for r in reach) else None
    return each(padding, dimensions)


def each(value: Any, dimensions: int) -> list[int]:
    """A setting of a convolution for each of its dimensions, given for all or one by one."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values


def _multi_head(mode: GridMode, *args: Any, **kwargs: Any) -> Any:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _linear(mode, x, weight, bias)
        if y is not NotImplemented:
            return y  # type: ignore[no-any-return]
        return F.linear(*tree_map(mode._masked, (x, weight, bias)))

    return multi_head_attention(linear, *args, **kwargs)


def _embedding(
    mode: GridMode,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    layer = mode.layers.get(id(weight))
    if layer is None or max_norm is not None:
        return NotImplemented
    rows, levels = F.embedding(input, layer.weight), F.embedding(input, layer.levels)
    return torch.where(levels > mode.level, rows, 0)


def _attention(mode: GridMode, *args: Any, **kwargs: Any) -> Any:
    return attention(*args, **kwargs)


def _batch_norm(mode: GridMode, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Batch norm with fixed statistics as one scale and shift: torch's own copies under vmap."""
    affine = fixed_batch_norm(input, *args, **kwargs)
    if affine is None:
        return NotImplemented
    shape = (1, -1, *[1] * (input.ndim - 2))
    return input * affine.scale.reshape(shape) + affine.shift.reshape(shape)


def _max_pool2d(
    mode: GridMode,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling as the maximum of shifted views: torch's own copies activations batch-minor."""
    kernel, step = each(kernel_size, 2), each(stride or kernel_size, 2)
    rare = ceil_mode or return_indices or each(dilation, 2) != [1, 1] or input.ndim != 4
    if rare or not mode.batch_minor or not depends_on_level(input) or max(kernel) > _MAX_POOL:
        return NotImplemented
    margin = each(padding, 2)
    if any(margin):
        input = F.pad(input, (margin[1], margin[1], margin[0], margin[0]), value=-torch.inf)
    ends = [size - k + 1 for size, k in zip(input.shape[2:], kernel, strict=True)]
    result: Tensor | None = None
    for row, column in itertools.product(range(kernel[0]), range(kernel[1])):
        view = input[:, :, row : row + ends[0] : step[0], column : column + ends[1] : step[1]]
        result = view if result is None else torch.maximum(result, view)
    return result


_FUSED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.conv1d: _conv(1),
    torch.conv2d: _conv(2),
    torch.conv3d: _conv(3),
    F.embedding: _embedding,
    F.multi_head_attention_forward: _multi_head,
}

# Functions that torch runs slowly under vmap, also where no prunable weight is involved.
_UNDER_VMAP: dict[Any, Callable[..., Any]] = {
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.scaled_dot_product_attention: _attention,
    F.batch_norm: _batch_norm,
    F.multi_head_attention_forward: _multi_head,
}

# What a weight is asked about itself, and masking does not change.
METADATA: set[Any] = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf"),
            *("is_sparse", "is_quantized", "is_meta", "is_nested", "is_mkldnn", "grad_fn"),
            *("itemsize", "nbytes"),
        )
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.stride,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.is_contiguous,
    Tensor.__len__,
    Tensor.__hash__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
