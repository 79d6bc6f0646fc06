"""Sparse linear layers on a GPU: against cuBLAS with the zeros, and torch's CSR."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.comparisons import compare
from benchmarks.gpu_timing import device_seconds
from benchmarks.records import Row
from benchmarks.timing import round_digits, spread
from confprune.sparse import operators
from confprune.sparse.modules import NEVER

SPARSITIES = (0.9, 0.95)
VECTORS = (1, 16, 64)


def rows(sparsity: float, width: int, rounds: int) -> Iterator[Row]:
    """A bf16 layer of `width` inputs and outputs, for some vectors at a time."""
    weight = torch.randn(width, width, device="cuda") / width**0.5
    kept = torch.rand(width, width, device="cuda") >= sparsity
    dense = torch.where(kept, weight, 0).bfloat16()
    packed = operators.pack(dense, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR a beta
        csr = dense.to_sparse_csr()

    def sparse(x: Tensor) -> Tensor:
        y: Tensor = operators.linear(x, *packed, None, width, NEVER)
        return y

    peers = {
        "`F.linear` (cuBLAS)": lambda x: F.linear(x, dense),
        "torch CSR": lambda x: (csr @ x.mT).mT,
    }
    for (peer, run), vectors in itertools.product(peers.items(), VECTORS):
        x = torch.randn(vectors, width, device="cuda").bfloat16()
        expected = F.linear(x.double(), dense.double())
        error = (sparse(x).double() - expected).abs().max() / expected.abs().max()
        contenders = {"confprune": lambda x=x: sparse(x), peer: lambda x=x, run=run: run(x)}
        times = device_seconds(contenders, rounds=rounds)
        read = sum(tensor.nbytes for tensor in packed) / spread(times["confprune"])["median"]
        yield compare(
            f"sparse bf16 layer of {width} x {width}, {sparsity:.0%} zeros, {vectors} vectors",
            times["confprune"],
            peer,
            times[peer],
            agrees=bool(error < 2e-2),
            gb_a_second=round_digits(read / 1e9),
        )
