"""Pruned networks that are smaller and faster: surviving weights only, and kernels for them."""

from confprune.sparse.compression import compress, decompress
from confprune.sparse.modules import SparseConv1d, SparseConv2d, SparseConv3d, SparseLinear

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseLinear",
    "compress",
    "decompress",
]
