"""From a pruned network to one that stores its surviving weights only, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from confprune.copies import copied
from confprune.parameters import (
    DTYPES,
    MAKE_PARAMETER,
    check_module,
    compiled_part,
    computes_weight,
    is_linear,
)
from confprune.sparse.choice import measured_dense_from
from confprune.sparse.modules import (
    NEVER,
    SparseConv,
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseLayer,
    SparseLinear,
)
from confprune.warning import warn

KERNELS = ("auto", "sparse", "dense")
FEWEST_ROWS = 4
"""Outputs of a group that make it worth while to gather its inputs: more than depthwise."""
_CONVOLUTIONS: dict[type, type[SparseConv]] = {
    sparse.dense_type: sparse for sparse in (SparseConv1d, SparseConv2d, SparseConv3d)
}


def compress(model: nn.Module, *, kernel: str = "auto", min_sparsity: float = 0.5) -> nn.Module:
    """A copy of a pruned network that stores and computes with its surviving weights only.

    Linear layers and convolutions with enough zeros are replaced by `SparseLinear` and
    `SparseConv1d`, ``2d``, ``3d``. The copy is for inference: in evaluation mode, and its
    parameters ask for no gradients.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is. Its zeros count, however they came about; ``certificate.prune(model)`` makes
        such a network.
    kernel : {"auto", "sparse", "dense"}
        How sparse layers compute. "auto": as is fastest on this machine by a measurement of each
        kind of layer, which costs some milliseconds once a process; for large batches that may
        be the dense product, with the weight unpacked for the call, and where it always is, the
        layer stays dense. "sparse", "dense": always so. It is measured where the model is: move it
        to its device first. On CUDA linear layers alone have a sparse kernel; convolutions unpack
        their weight for every call, and stay dense with "auto".
    min_sparsity : float
        Layers with a smaller share of zeros stay dense.

    Returns
    -------
    torch.nn.Module
        Layers stay dense, too, if the sparse form is not the smaller one, if they are depthwise
        convolutions, if they compute their weight from other parameters (weight norm, say; with a
        warning where that has zeros enough), if the weight is tied to another kind of module (an
        embedding), if they have hooks, and within ``nn.MultiheadAttention``, which uses its weights
        without calling layers. The copy of a compiled model is not compiled.

    Raises
    ------
    ValueError
        For an unknown kernel, or if a layer is lazy.
    TypeError
        If `model` is not a module.

    Examples
    --------
    >>> import torch, confprune
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU())
    >>> pruned = confprune.prune_levels(model, [0.9]).prune(model, 0)
    >>> small = confprune.sparse.compress(pruned, kernel="sparse")
    >>> small
    Sequential(
      (0): SparseLinear(in_features=256, out_features=256, sparsity=0.900, bias=True)
      (1): ReLU()
    )
    >>> with torch.no_grad():
    ...     x = torch.randn(3, 256)
    ...     torch.allclose(small(x), pruned(x), atol=1e-5)
    True
    """
    check_module(model)
    check_kernel(kernel)
    if not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity must be in [0, 1], got {min_sparsity!r}")
    replaced: dict[int, nn.Module] = {}
    by_weight: dict[tuple[int, Any], SparseLayer] = {}
    for layer in _replaceable(model, min_sparsity):
        weight: Any = layer.weight
        tied = by_weight.get((id(weight), _kind(layer)))
        sparse = sparse_like(layer)
        if tied is None:
            sparse.store(weight)
        else:
            sparse.take(*tied.packed)
        if _bytes(sparse.packed) >= weight.numel() * weight.element_size():
            continue
        sparse.dense_from = dense_from_of(sparse, kernel)
        if kernel == "auto" and sparse.dense_from == 0:
            continue
        if layer.bias is not None:
            bias: Any = layer.bias
            sparse.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        by_weight[id(weight), _kind(layer)] = sparse
        replaced[id(layer)] = sparse
    return replaced_in(model, replaced)


def decompress(model: nn.Module) -> nn.Module:
    """The dense network that a compressed one stands for, its zeros where they were.

    Parameters
    ----------
    model : torch.nn.Module
        Made by `compress` or `load_sparse`; left as it is.

    Returns
    -------
    torch.nn.Module
        In evaluation mode; its parameters ask for no gradients until told so.

    Examples
    --------
    >>> import torch, confprune
    >>> dense = torch.nn.Linear(64, 64).requires_grad_(False)
    >>> _ = dense.weight.masked_fill_(dense.weight.abs() < 0.1, 0)
    >>> small = confprune.sparse.compress(dense, kernel="sparse")
    >>> torch.equal(confprune.sparse.decompress(small).weight, dense.weight)
    True
    """
    replaced: dict[int, nn.Module] = {}
    by_values: dict[int, Any] = {}
    for layer in model.modules():
        if isinstance(layer, SparseLayer):
            dense = dense_of(layer)
            tied = by_values.setdefault(id(layer.packed[0]), dense)
            dense.weight = tied.weight
            replaced[id(layer)] = dense
    return replaced_in(model, replaced)


def check_kernel(kernel: str) -> None:
    """Raise ValueError unless there is such a way to compute."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown; choose from {list(KERNELS)}")


def dense_from_of(layer: SparseLayer, kernel: str) -> int:
    """`SparseLayer.dense_from` for a way to compute."""
    if kernel == "auto":
        return measured_dense_from(layer)
    return 0 if kernel == "dense" else NEVER


def replaced_in(model: nn.Module, layers: dict[int, nn.Module]) -> nn.Module:
    """A copy of a model for inference, with other modules in the place of those with given ids.

    What is compiled of the model is not in the copy.
    """
    # A module found in the memo of the copy is not copied itself, nor is its weight.
    memo: dict[int, Any] = dict(layers)
    for module in reversed(list(model.modules())):  # inner ones first
        part = compiled_part(module)
        if part is not None:
            memo[id(module)] = copy.deepcopy(part, memo)
    replaced: nn.Module = copied(model, memo)
    _without_fast_paths(replaced)
    return replaced.requires_grad_(False).eval()


def sparse_like(layer: nn.Module) -> SparseLayer:
    """A sparse layer without survivors, shaped as a dense one.

    Raises
    ------
    TypeError
        If the module is no linear layer or convolution.
    """
    if _kind(layer) is None:
        raise TypeError(f"a {type(layer).__name__} has no sparse form")
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias = layer.bias is not None
    convolution = _CONVOLUTIONS.get(_kind(layer) or object)
    if convolution is None:
        transposed = not isinstance(layer, nn.Linear)
        outputs, inputs = weight.t().shape if transposed else weight.shape
        return SparseLinear(inputs, outputs, bias, dtype=weight.dtype, transposed=transposed)
    return convolution(**_settings(layer), bias=bias, dtype=weight.dtype)


def dense_of(layer: SparseLayer) -> nn.Module:
    """The dense layer with the weights of a sparse one."""
    weight = layer.weight
    about: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    dense: Any
    if isinstance(layer, SparseConv):
        dense = layer.dense_type(**_settings(layer), bias=layer.bias is not None, **about)
    elif isinstance(layer, SparseLinear) and layer.transposed:
        from transformers.pytorch_utils import Conv1D

        dense = Conv1D(layer.out_features, layer.in_features)
    else:
        outputs, inputs = weight.shape
        dense = nn.Linear(inputs, outputs, bias=layer.bias is not None, **about)
    dense.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    dense.bias = layer.bias
    return dense  # type: ignore[no-any-return]


def _settings(layer: nn.Module) -> dict[str, Any]:
    """What a convolution is made with, but for its weight."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(layer, name) for name in (*names, "groups", "padding_mode")}


def _replaceable(model: nn.Module, min_sparsity: float) -> Iterator[nn.Module]:
    """The layers whose weight is used by calling them alone, and is sparse enough."""
    by_attention = {
        id(module)
        for attention in model.modules()
        if isinstance(attention, nn.MultiheadAttention)
        for module in attention.modules()
    }
    layers, others = [], set()
    for name, module in model.named_modules():
        if _kind(module) is None or id(module) in by_attention or not _fits(name, module):
            others |= {id(parameter) for parameter in module._parameters.values()}
        else:
            layers.append(module)
        computed = _kind(module) is not None and computes_weight(module)
        if computed and _has_zeros(module, min_sparsity):
            warn(
                f"layer {name!r} stays dense, because it computes its weight from other "
                f"parameters. {MAKE_PARAMETER}"
            )
    for layer in layers:
        if id(layer.weight) not in others and _has_zeros(layer, min_sparsity):
            yield layer


def _has_zeros(layer: nn.Module, share: float) -> bool:
    """Whether at least this share of the weight is zero."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    zeros = weight.numel() - int(torch.count_nonzero(weight.detach()))
    return zeros >= max(1, share * weight.numel())


def _fits(name: str, layer: nn.Module) -> bool:
    """Whether the kernels can do, and do well, what a layer does."""
    if computes_weight(layer):
        return False
    weight: Any = layer.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"layer {name!r} is lazy: run the model once before compressing it")
    rows_of_group = weight.shape[0] // getattr(layer, "groups", 1)
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return weight.dtype in DTYPES and rows_of_group >= FEWEST_ROWS and not hooked


def _kind(module: nn.Module) -> type | None:
    """Whose forward a module has: that of a linear layer or a convolution; None for any other."""
    for kind in (nn.Linear, *_CONVOLUTIONS):
        if isinstance(module, kind):
            methods = ("forward", "_conv_forward")
            own, usual = (
                [getattr(c, name, None) for name in methods] for c in (type(module), kind)
            )
            return kind if own == usual else None
    return type(module) if is_linear(module) else None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _without_fast_paths(model: nn.Module) -> None:
    """Have transformer encoders call their layers; their fast path wants dense weights."""
    for module in model.modules():
        if not any(isinstance(part, SparseLayer) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
