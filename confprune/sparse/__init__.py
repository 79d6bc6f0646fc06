"""Pruned networks that are smaller and faster: surviving weights only, and kernels for them."""

from confprune.sparse.compression import compress, decompress
from confprune.sparse.export import export_onnx
from confprune.sparse.file import load_certificate, load_sparse, save_sparse
from confprune.sparse.modules import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseLinear,
    is_compressed,
)

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseLinear",
    "compress",
    "decompress",
    "export_onnx",
    "is_compressed",
    "load_certificate",
    "load_sparse",
    "save_sparse",
]
