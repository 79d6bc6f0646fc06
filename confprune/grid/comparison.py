"""Whether the grid gives what the plain masked network gives."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 2e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 1e-1,
}


def difference(outputs: Tensor, plain: Tensor) -> str:
    """Why two sets of outputs are not the same, or nothing if they are."""
    if outputs.shape != plain.shape:
        return f"outputs have shape {list(outputs.shape)} rather than {list(plain.shape)}"
    tolerance = _TOLERANCE.get(plain.dtype, 2e-3)
    a, b = outputs.double(), plain.double()
    if a.numel() and (a - b).abs().max() <= tolerance * b.abs().max():  # not with NaN or infinity
        return ""
    if not torch.equal(a.isnan(), b.isnan()):
        return "outputs are NaN in other places than the plain masked network's"
    finite = torch.isfinite(b)
    if not torch.equal(a[~finite].nan_to_num(0.5), b[~finite].nan_to_num(0.5)):
        return "outputs are infinite in other places than the plain masked network's"
    if not finite.any():
        return ""
    scale = b[finite].abs().max()
    error = (a[finite] - b[finite]).abs().max()
    if error > tolerance * scale:
        return (
            f"outputs differ by {error / scale:.1e} of their size from the plain masked network's"
        )
    return ""
