"""The CUDA kernels of the masked product and of the masked weights, run on the CPU in lockstep."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import SANITIZE, library
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

ELEMENTS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # by number


class GridLinear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "levels", "level")),
        *((name, ctypes.c_void_p) for name in ("scale", "bias", "y")),
        *((name, ctypes.c_int) for name in ("element", "follow")),
        *((name, ctypes.c_int64) for name in ("num_levels", "batch", "inputs", "outputs")),
        *((name, ctypes.c_int64) for name in ("x_level_stride", "x_stride")),
        *((name, ctypes.c_int64) for name in ("weight_stride", "levels_stride")),
        ("relu", ctypes.c_bool),
    ]


class MaskedWeights(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "levels", "level", "out")),
        ("element", ctypes.c_int),
        ("wide_levels", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("size", "num_levels")),
    ]


def kernels(multiprocessors: int = 3, shared_bytes: int = 99 << 10, seed: int = 0) -> ctypes.CDLL:
    found = library("grid_linear.cu", "masked_weights.cu", "exports_grid.cpp")
    found.settings(multiprocessors, shared_bytes, seed)
    return found


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def grid_linear(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    level: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    **device: Any,
) -> Tensor:
    """As the kernel computes it; `x` is [1 or K, N, inputs]."""
    outputs, inputs = weight.shape
    y = x.new_full((len(level), x.shape[1], outputs), 7.25)
    follow = bias if scale is None else scale
    product = GridLinear(
        *(pointer(t) for t in (x, weight, levels, level, scale, bias, y)),
        ELEMENTS.index(x.dtype),
        0 if follow is None else ELEMENTS.index(follow.dtype),
        *(len(level), x.shape[1], inputs, outputs),
        *(x.stride(0) if len(x) > 1 else 0, x.stride(1), weight.stride(0), levels.stride(0)),
        relu,
    )
    kernels(**device).grid_linear(ctypes.byref(product))
    return y


def reference(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    level: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Masked weights, level by level, in float64."""
    slices = []
    for k, j in enumerate(level.tolist()):
        masked = torch.where(levels.int() > j, weight, 0).double()
        y = x[k if len(x) > 1 else 0].double() @ masked.T
        y = y if scale is None else y * scale.double()
        y = y if bias is None else y + bias.double()
        slices.append(y.relu() if relu else y)
    return torch.stack(slices)


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small ones, whose products and sums are exact in every type."""
    return torch.randint(-2, 3, shape).to(dtype)


def random_case(
    outputs: int, inputs: int, batch: int, num_levels: int, dtype: torch.dtype, shared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = integers(1 if shared else num_levels, batch, inputs, dtype=dtype)
    levels = torch.randint(0, 256, (outputs, inputs)).to(torch.uint8)
    level = torch.randperm(256)[:num_levels].sort().values
    return x, integers(outputs, inputs, dtype=dtype), levels, level


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize(
    ("outputs", "inputs", "batch", "num_levels"),
    [(1, 1, 1, 1), (17, 33, 5, 3), (70, 48, 16, 9), (130, 80, 33, 4), (20, 64, 130, 2)],
)
def test_integers_are_exact(outputs, inputs, batch, num_levels, dtype, shared):
    case = random_case(outputs, inputs, batch, num_levels, dtype, shared)
    assert torch.equal(grid_linear(*case).double(), reference(*case))
