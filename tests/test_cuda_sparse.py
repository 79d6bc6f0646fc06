"""The CUDA kernels of sparse layers, run on the CPU in lockstep and held to the CPU's operators."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import FLAGS, check_sanitized, kernels
from torch import Tensor

from confprune.sparse.modules import NEVER
from confprune.sparse.operators import Packed, check, linear, pack, unpack

pytestmark = pytest.mark.usefixtures("one_thread")

ELEMENTS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # by number
NARROW = [torch.float32, torch.float16, torch.bfloat16]
GUARD = 16
"""Numbers around a result, which a kernel must leave alone."""


class SparseMatrix(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        ("element", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("columns", "slices", "cells")),
        *((name, ctypes.c_int64) for name in ("rows", "row_size", "groups")),
    ]


class SparseLinear(ctypes.Structure):
    _fields_ = [
        ("weight", SparseMatrix),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        ("element", ctypes.c_int),
        ("vectors", ctypes.c_int64),
        ("x_strides", ctypes.c_int64 * 2),
    ]


def matrix_of(packed: Packed, rows: int, row_size: int, groups: int) -> SparseMatrix:
    values, columns, slices, cells = packed
    addresses = (t.data_ptr() for t in (columns, slices, cells))
    element = ELEMENTS.index(values.dtype)
    return SparseMatrix(values.data_ptr(), element, *addresses, rows, row_size, groups)


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor to write to, and what lies around it: numbers that are no result."""
    size = torch.Size(shape).numel()
    room = torch.full((size + 2 * GUARD,), 7.25, dtype=dtype)
    return room[GUARD : GUARD + size].view(shape), room


def assert_guarded(room: Tensor) -> None:
    assert room[:GUARD].eq(7.25).all()
    assert room[-GUARD:].eq(7.25).all()


def product(
    x: Tensor, packed: Packed, bias: Tensor | None = None, rows: int = 0, **device: Any
) -> Tensor:
    """As the kernel computes it, for x [vectors, inputs] and a matrix of so many rows."""
    y, room = guarded(len(x), rows, dtype=x.dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    own_bias = None if bias is None else bias.to(wide)
    arguments = SparseLinear(
        matrix_of(packed, rows, x.shape[1], 1),
        *(x.data_ptr(), None if own_bias is None else own_bias.data_ptr(), y.data_ptr()),
        *(ELEMENTS.index(x.dtype), len(x), tuple(x.stride())),
    )
    kernels(**device).cuda_sparse_linear(ctypes.byref(arguments))
    assert_guarded(room)
    return y


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None, **device: Any) -> Tensor:
    return product(x, pack(weight, 1), bias, len(weight), **device)


def dense(packed: Packed, rows: int, row_size: int, groups: int = 1, **device: Any) -> Tensor:
    """The matrix with its zeros, as the kernel writes it."""
    weight, room = guarded(rows, row_size, dtype=packed[0].dtype)
    sparse = matrix_of(packed, rows, row_size, groups)
    kernels(**device).cuda_sparse_unpack(ctypes.byref(sparse), ctypes.c_void_p(weight.data_ptr()))
    assert_guarded(room)
    return weight


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small ones, whose products and sums are exact in every type."""
    return torch.randint(-3, 4, shape).to(dtype)


def pruned(
    rows: int, row_size: int, density: float = 0.15, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Integers where something survives; rows and blocks without survivors among them."""
    weight = torch.randint(1, 4, (rows, row_size)) * (torch.rand(rows, row_size) < density)
    weight[torch.rand(rows) < 0.1] = 0
    weight[:, 128:200] = 0
    return weight.to(dtype)


def slow(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


SHAPES = [(1, 1), (5, 7), (16, 128), (17, 129), (130, 300), (257, 40), (300, 270)]


class TestProduct:
    @pytest.mark.parametrize("dtype", ELEMENTS)
    @pytest.mark.parametrize(("rows", "row_size"), SHAPES)
    def test_integers_are_exact(self, rows, row_size, dtype):
        x, weight = integers(3, row_size, dtype=dtype), pruned(rows, row_size, dtype=dtype)
        bias = integers(rows, dtype=dtype)
        assert torch.equal(times(x, weight, bias), slow(x, weight, bias))
        assert torch.equal(times(x, weight), slow(x, weight))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("vectors", [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33])
    def test_any_number_of_vectors(self, vectors, dtype):
        x, weight = integers(vectors, 140, dtype=dtype), pruned(40, 140, dtype=dtype)
        assert torch.equal(times(x, weight), slow(x, weight))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("vectors", [1, 3])
    def test_blocks_with_two_cells_and_a_last_one_with_one(self, vectors, dtype):
        row_size = 546 * 128 + 5  # 512 parts at most
        x, weight = integers(vectors, row_size, dtype=dtype), pruned(5, row_size, 0.02, dtype)
        assert torch.equal(times(x, weight), slow(x, weight))

    @pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
    @pytest.mark.parametrize("vectors", [1, 5])
    def test_any_number_of_survivors(self, vectors, density):
        x, bias = integers(vectors, 200), integers(150)
        weight = torch.randint(1, 4, (150, 200)).float() * (torch.rand(150, 200) < density)
        assert torch.equal(times(x, weight, bias), slow(x, weight, bias))

    @pytest.mark.parametrize("stored", NARROW)
    @pytest.mark.parametrize("given", NARROW)
    def test_inputs_and_weights_may_be_of_different_types(self, given, stored):
        for vectors in (1, 6):
            x, weight = integers(vectors, 30, dtype=given), pruned(20, 30, dtype=stored)
            assert torch.equal(times(x, weight), slow(x, weight))

    @pytest.mark.parametrize("dtype", ELEMENTS)
    def test_the_operator_of_the_cpu_gives_the_same(self, dtype):
        x, weight = torch.randn(5, 300).to(dtype), torch.randn(140, 300)
        weight = torch.where(torch.rand(140, 300) < 0.2, weight, 0).to(dtype)
        bias, packed = torch.randn(140).to(dtype), pack(weight, 1)
        expected = linear(x, *packed, bias, 140, NEVER)
        torch.testing.assert_close(product(x, packed, bias, 140), expected)

    def test_inputs_of_16_bits_are_summed_in_single_precision(self):
        x, weight = torch.full((2, 2048), 0.1).bfloat16(), torch.full((3, 2048), 0.1).bfloat16()
        expected = slow(x.float(), weight).bfloat16()
        assert torch.equal(times(x, weight), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_result_depends_on_its_vector_alone(self, dtype):
        x = torch.randn(33, 700, dtype=dtype)
        weight = torch.randn(20, 700, dtype=dtype) * (torch.rand(20, 700) < 0.3)
        found = times(x, weight, multiprocessors=1)
        for first, last in ((0, 1), (3, 5), (7, 10), (20, 27), (16, 32)):
            some = times(x[first:last], weight, multiprocessors=200, seed=first)
            assert torch.equal(some, found[first:last])

    def test_more_vectors_than_one_launch_takes(self):
        x, weight = integers(65_540, 3), torch.tensor([[0.0, 2.0, 1.0]])
        assert torch.equal(times(x, weight), slow(x, weight))

    @pytest.mark.parametrize("vectors", [1, 6])
    def test_inputs_of_any_strides(self, vectors):
        weight = pruned(40, 150)
        for x in (
            integers(150, vectors).t(),
            integers(vectors, 300)[:, ::2],
            integers(2 * vectors, 150)[::2],
            integers(1, 150).expand(vectors, -1),
        ):
            assert torch.equal(times(x, weight), slow(x, weight))

    def test_infinity_reaches_the_outputs_of_its_survivors(self):
        x, weight = torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, -1], [1, 0, 1]])
        x[0, 0], x[1, 2] = torch.inf, torch.nan
        expected = linear(x, *pack(weight, 1), None, 4, NEVER)
        assert expected.isfinite().sum() == 4
        torch.testing.assert_close(times(x, weight), expected, rtol=0, atol=0, equal_nan=True)


class TestUnpack:
    @pytest.mark.parametrize("dtype", ELEMENTS)
    @pytest.mark.parametrize(("rows", "row_size"), SHAPES)
    def test_the_matrix_comes_back(self, rows, row_size, dtype):
        weight = pruned(rows, row_size, dtype=dtype)
        assert torch.equal(dense(pack(weight, 1), rows, row_size), weight)

    @pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
    def test_any_number_of_survivors(self, density):
        weight = torch.randn(150, 200) * (torch.rand(150, 200) < density)
        assert torch.equal(dense(pack(weight, 1), 150, 200), weight)

    @pytest.mark.parametrize(("rows", "groups"), [(9, 3), (300, 2), (7, 7)])
    def test_groups(self, rows, groups):
        weight = pruned(rows, 40)
        assert torch.equal(dense(pack(weight, groups), rows, 40, groups), weight)

    def test_special_values_are_kept(self):
        weight = torch.tensor([[torch.inf, 0.0, -torch.inf], [1e-40, torch.nan, 0.0]])
        bits = dense(pack(weight, 1), 2, 3).view(torch.int32)
        assert torch.equal(bits, weight.view(torch.int32))


def one_row_a_slice(weight: Tensor) -> Packed:
    """The matrix [up to 256 rows, up to 128 columns], with each row in a slice of its own.

    Nobody packs so, but it is a matrix all the same.
    """
    values, columns, slices = [], [], bytearray()
    for place, row in enumerate(weight.tolist()):
        alive = [c for c, value in enumerate(row) if value]
        values += [row[c] for c in alive]
        columns += alive
        if alive:
            slices += bytes([0, len(alive), *[1] * len(alive), place])
    rows, row_size = weight.shape
    cells = [[0, 0], [len(values), len(slices)], [rows, row_size], [1, 128]]
    return (
        torch.tensor(values),
        torch.tensor(columns, dtype=torch.uint8),
        torch.frombuffer(slices, dtype=torch.uint8),
        torch.tensor(cells),
    )


def test_slices_of_one_row_in_any_number():
    weight = torch.randint(1, 4, (128, 100)).float() * (torch.rand(128, 100) < 0.9)
    packed, x = one_row_a_slice(weight), integers(3, 100)
    check(*packed, 128, 100, 1)
    assert torch.equal(unpack(*packed, 128, 100, 1), weight)
    assert torch.equal(dense(packed, 128, 100), weight)
    assert torch.equal(product(x, packed, None, 128), slow(x, weight))


@pytest.mark.parametrize(("rows", "row_size"), [(100, 300), (128, 257)])
def test_cells_of_another_shape_give_nan(rows, row_size):
    packed = pack(pruned(128, 300), 1)
    assert product(integers(3, row_size), packed, None, rows).isnan().all()
    assert dense(packed, rows, row_size).isnan().any(1).all()


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20)),
    st.sampled_from(ELEMENTS),
    st.floats(0, 1),
    st.integers(0, 1000),
)
@settings(max_examples=30)
def test_matrices_of_any_shape(sizes, dtype, density, seed):
    torch.manual_seed(seed)
    rows, row_size, vectors = sizes
    weight = pruned(rows, row_size, density, dtype)
    x, packed = integers(vectors, row_size, dtype=dtype), pack(weight, 1)
    found = product(x, packed, None, rows, multiprocessors=1 + seed % 200, seed=seed)
    assert torch.equal(found, slow(x, weight))
    assert torch.equal(dense(packed, rows, row_size, seed=seed), weight)


@pytest.mark.skipif(FLAGS in os.environ, reason="runs within itself")
def test_no_access_outside_of_memory():
    """Some of the tests above, again under AddressSanitizer."""
    some = "(exact or back) and 300-270 or two_cells and 1-dtype0 or slices or another or groups"
    check_sanitized(__file__, some, "address")


@pytest.mark.skipif(FLAGS in os.environ, reason="runs within itself")
def test_no_races():
    """Some of the tests above, again under ThreadSanitizer."""
    check_sanitized(__file__, "exact and 130-300 or two_cells and 3-dtype1 or 7-7", "thread")
