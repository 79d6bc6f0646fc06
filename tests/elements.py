"""The element types of weights, and the integers that hold their bits."""

from __future__ import annotations

import torch

INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
DTYPES = list(INTEGERS)
