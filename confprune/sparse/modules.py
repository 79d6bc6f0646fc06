"""Linear and convolution layers that hold their surviving weights only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from confprune.ops import build_info
from confprune.sparse import operators
from confprune.sparse.operators import Packed

NEVER = 2**62
"""A `dense_from` that no batch reaches."""

PACKED = ("values", "columns", "slices", "cells")

_WITH_KERNELS = ("cpu", "meta", *(["cuda"] if build_info()["cuda"] else []))


class SparseLayer(nn.Module):
    """What sparse layers have in common: the packed weight, and no training.

    Attributes
    ----------
    values, columns, slices, cells : Tensor
        The surviving weights, as ``csrc/kernels/sparse_matrix.h`` describes them.
    bias : Parameter [outputs] or None
    dense_from : int
        From so many products with the weight (rows of the input; of a convolution, examples times
        positions) the weight is unpacked for the call and the dense kernel used: 0 is always,
        `NEVER` never. On CUDA convolutions always do so.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        groups: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.weight_shape = weight_shape
        self.groups = groups
        self.dense_from = NEVER
        self.training = False
        self._dense: Tensor | None = None  # the weight, where there are no sparse kernels
        empty = torch.zeros(1, 1, dtype=dtype).expand(weight_shape[0], math.prod(weight_shape[1:]))
        for name, tensor in zip(PACKED, operators.pack(empty, groups), strict=True):
            self.register_buffer(name, tensor.to(device))
        zeros = torch.zeros(weight_shape[0], dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros, False))

    @property
    def packed(self) -> Packed:
        """The four tensors of the weight."""
        own: Any = self._buffers  # attributes of a module are slow, and this is asked for a call
        return own["values"], own["columns"], own["slices"], own["cells"]

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Rows of the packed matrix, weights of a row, and groups."""
        return self.weight_shape[0], math.prod(self.weight_shape[1:]), self.groups

    @property
    def weight(self) -> Tensor:
        """The dense weight with its zeros, unpacked at every access."""
        if self._dense is not None:
            return self._dense
        matrix: Tensor = operators.unpack(*self.packed, *self.matrix_shape)
        return matrix.view(self.weight_shape)

    @property
    def sparsity(self) -> float:
        """The share of the weights that is zero."""
        return 1 - self.packed[0].numel() / math.prod(self.weight_shape)

    def store(self, weight: Tensor) -> None:
        """Take the survivors of a dense weight of this layer's shape."""
        packed = operators.pack(weight.detach().cpu().flatten(1), self.groups)
        self.take(*(tensor.to(weight.device) for tensor in packed))

    def take(self, values: Tensor, columns: Tensor, slices: Tensor, cells: Tensor) -> None:
        """Hold these packed tensors, which another layer may hold as well."""
        for name, tensor in zip(PACKED, (values, columns, slices, cells), strict=True):
            setattr(self, name, tensor)
        self._settle()

    def train(self, mode: bool = True) -> SparseLayer:
        """Refuse training: pruned weights are not there to be trained."""
        if mode:
            raise RuntimeError(
                "sparse layers are for inference: train the dense network "
                "(confprune.sparse.decompress gives it back) and compress it again"
            )
        return super().train(False)

    def extra_repr(self) -> str:
        """What `repr` shows of the weight."""
        return f"sparsity={self.sparsity:.3f}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._settle()
        return self

    @property
    def has_kernels(self) -> bool:
        """Whether there are sparse kernels where the layer is; else it holds a dense weight too."""
        return self.packed[0].device.type in _WITH_KERNELS

    def _settle(self) -> None:
        """Hold the dense weight on a device without sparse kernels, and only there."""
        self._dense = None
        if self.has_kernels:
            return
        device = self.packed[0].device
        warnings.warn(
            f"this build has no sparse kernels for {device.type}: sparse layers run dense there",
            stacklevel=2,
        )
        packed = [tensor.cpu() for tensor in self.packed]
        matrix: Tensor = operators.unpack(*packed, *self.matrix_shape)
        self._dense = matrix.view(self.weight_shape).to(device)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load survivors in any number, after a check that the kernels can read them."""
        packed = [state_dict.get(prefix + name) for name in PACKED]
        if all(isinstance(tensor, Tensor) for tensor in packed):
            try:
                operators.check(*(tensor.cpu() for tensor in packed), *self.matrix_shape)  # type: ignore[union-attr]
            except (ValueError, TypeError) as error:
                error_msgs.append(f"{prefix.rstrip('.') or 'the layer'}: {error}")
                return
            for name, own, tensor in zip(PACKED, self.packed, packed, strict=True):
                self._buffers[name] = own.new_empty(tensor.shape)  # type: ignore[union-attr]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._settle()


def is_compressed(model: nn.Module) -> bool:
    """Whether some layer of a network holds its surviving weights only."""
    return any(isinstance(module, SparseLayer) for module in model.modules())


class SparseLinear(SparseLayer):
    """``nn.Linear`` whose weight is sparse; for inference.

    Made by `confprune.sparse.compress`; made by hand, it is empty until `load_state_dict`.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    device, dtype : optional
        As for ``nn.Linear``.
    transposed : bool
        Whether `weight` is [in_features, out_features], as in the Conv1D of GPT-2.

    Notes
    -----
    Weights that are not stored take no part: where an input is infinite or NaN, a masked dense
    network gives NaN in all outputs, for 0 · inf is NaN, and this layer in those that the input
    reaches. Inputs of 16 bits are summed in float32. An input's type need not be the weight's, the
    output has the input's; only float64 keeps to itself.

    Examples
    --------
    >>> import torch, confprune
    >>> dense = torch.nn.Linear(64, 64).requires_grad_(False)
    >>> _ = dense.weight.copy_(torch.eye(64))
    >>> layer = confprune.sparse.compress(dense, kernel="sparse")
    >>> layer
    SparseLinear(in_features=64, out_features=64, sparsity=0.984, bias=True)
    >>> x = torch.randn(5, 64)
    >>> torch.allclose(layer(x), dense(x))
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__((out_features, in_features), 1, bias, device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed

    @property
    def weight(self) -> Tensor:
        """The dense weight with its zeros, unpacked at every access."""
        return super().weight.t() if self.transposed else super().weight

    def store(self, weight: Tensor) -> None:
        """Take the survivors of a dense weight of this layer's shape."""
        super().store(weight.t() if self.transposed else weight)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in_features] to [..., out_features]."""
        bias = self._parameters["bias"]
        if self._dense is not None:
            return F.linear(x, self._dense, bias)
        own: Any = self._buffers  # not `packed`: what is done here shows in small layers
        y: Tensor = operators.linear(
            x,
            own["values"],
            own["columns"],
            own["slices"],
            own["cells"],
            bias,
            self.out_features,
            self.dense_from,
        )
        return y

    def extra_repr(self) -> str:
        """What `repr` shows of the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {super().extra_repr()}"


class SparseConv(SparseLayer):
    """A convolution whose kernel is sparse; for inference. See `SparseLinear` for the notes.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``; as are `device` and `dtype`.
    """

    dense_type: ClassVar[type[nn.Conv1d | nn.Conv2d | nn.Conv3d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # It checks the arguments, and brings them into one form.
        convolution: Any = self.dense_type
        dense = convolution(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode=padding_mode,
            device="meta",
        )
        super().__init__(tuple(dense.weight.shape), groups, bias, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, ...] = dense.kernel_size
        self.stride: tuple[int, ...] = dense.stride
        self.padding: str | tuple[int, ...] = dense.padding
        self.dilation: tuple[int, ...] = dense.dilation
        self.padding_mode = padding_mode
        # The last dimension first, before and after, as `F.pad` takes them.
        pads: list[int] = list(dense._reversed_padding_repeated_twice)
        zeros = padding_mode == "zeros" and pads[::2] == pads[1::2]
        # What the kernel pads itself, or what is padded for it.
        self._own_padding = tuple(pads[::-2]) if zeros else (0,) * len(dense.kernel_size)
        self._pads = () if zeros else tuple(pads)

    def forward(self, x: Tensor) -> Tensor:
        """X [N, in_channels, positions...], or without N, to [N, out_channels, positions...]."""
        if self._pads:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._pads, mode)
        bias = self._parameters["bias"]
        geometry = self.stride, self._own_padding, self.dilation
        if self._dense is not None:
            convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
            return convolve(x, self._dense, bias, *geometry, self.groups)  # type: ignore[no-any-return]
        y: Tensor = operators.conv(
            x,
            *self.packed,
            bias,
            self.out_channels,
            self.kernel_size,
            *geometry,
            self.groups,
            self.dense_from,
        )
        return y

    def extra_repr(self) -> str:
        """What `repr` shows of the layer."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name in ("stride", "padding", "dilation", "groups", "padding_mode"):
            value = getattr(self, name)
            usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
            if value not in (usual[name], (usual[name],) * len(self.kernel_size)):
                text += f", {name}={value}"
        return f"{text}, {super().extra_repr()}"


class SparseConv1d(SparseConv):
    """``nn.Conv1d`` whose kernel is sparse; for inference."""

    dense_type = nn.Conv1d


class SparseConv2d(SparseConv):
    """``nn.Conv2d`` whose kernel is sparse; for inference."""

    dense_type = nn.Conv2d


class SparseConv3d(SparseConv):
    """``nn.Conv3d`` whose kernel is sparse; for inference."""

    dense_type = nn.Conv3d
