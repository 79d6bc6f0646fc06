"""torch.ops.confprune on a GPU, held to the CPU operators and to their slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_ops import (
    DTYPES,
    GEOMETRIES,
    conv_case,
    integers,
    linear_case,
    longs,
    random_levels,
    slow_conv,
    slow_linear,
)
from test_selection import problems, some_counts
from test_sparse_ops import pruned
from torch import Tensor

from confprune import selection
from confprune.grid import on_cuda
from confprune.selection import Cuts, assign, key_type, select
from confprune.sparse.modules import NEVER
from confprune.sparse.operators import linear as sparse_linear
from confprune.sparse.operators import pack

pytestmark = pytest.mark.cuda

ops = torch.ops.confprune


def on_gpu(values, device="cuda"):
    """The tensors among some values, moved; with their strides and offsets, as `.to` leaves not."""
    if isinstance(values, dict):
        return {name: on_gpu(value, device) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(on_gpu(value, device) for value in values)
    if not isinstance(values, Tensor):
        return values
    offset = values.storage_offset()
    if values.is_contiguous() and offset == 0:
        return values.to(device)
    whole = torch.empty(0, dtype=values.dtype).set_(values.untyped_storage())
    return whole.to(device).as_strided(values.shape, values.stride(), offset)


def assert_same_cuts(found: Cuts, expected: Cuts) -> None:
    assert found.key == expected.key
    for name in ("counts", "keys", "ties", "equal"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


def check_selection(scores: dict[str, Tensor], counts: list[int], device="cuda") -> None:
    """Cuts and prune levels of a GPU are those of the CPU, to the last bit."""
    cuts, there = select(scores, counts), on_gpu(scores, device)
    found = select(there, counts)
    assert_same_cuts(found, cuts)
    levels = assign(there, found)
    for name, expected in assign(scores, cuts).items():
        assert levels[name].device == there[name].device
        assert torch.equal(levels[name].cpu(), expected)


class TestSelection:
    @given(problem=problems())
    @settings(max_examples=100)
    def test_selection_is_that_of_the_cpu(self, problem):
        check_selection(*problem)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [1, 2, 3, 127, 4097, 65537, 1_000_003])
    def test_odd_sizes(self, dtype, size):
        scores = {"a": torch.randn(size).to(dtype), "b": torch.randn(7).to(dtype)}
        check_selection(scores, some_counts(size + 7, 100))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["one value", "two values", "few values", "steep", "zeros"])
    def test_skewed_scores(self, dtype, kind):
        size = 300_001
        values = {
            "one value": torch.full((size,), 0.25),
            "two values": torch.where(torch.rand(size) < 1e-4, 1.0, 2.0),
            "few values": torch.randint(-3, 4, (size,)) / 7,
            "steep": torch.randn(size) ** 9,
            "zeros": torch.where(torch.rand(size) < 0.9, 0.0, torch.randn(size)),
        }[kind]
        check_selection({"w": values.to(dtype)}, some_counts(size, 50))

    def test_ties_across_many_tensors(self):
        scores = {str(i): torch.randint(-2, 3, (i * 37,)).float() for i in range(40)}
        check_selection(scores, some_counts(sum(s.numel() for s in scores.values()), 31))

    def test_mixed_types(self):
        scores = {str(dtype): torch.randn(5000).to(dtype) for dtype in DTYPES}
        check_selection(scores, some_counts(20_000))

    @pytest.mark.parametrize("levels", [1, 255, 256, 1000])
    def test_grids_of_any_size(self, levels):
        check_selection({"w": torch.randn(50_000)}, some_counts(50_000, levels))

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
    def test_any_strides(self, layout):
        whole = torch.randn(60, 50)
        scores = {
            "transposed": whole.t(),
            "sliced": whole[::3, 1::2],
            "expanded": whole[:1].expand(20, -1),
            "offset": whole.flatten()[1:],
        }[layout]
        check_selection({"w": scores}, some_counts(scores.numel()))

    def test_nan_is_refused_by_name(self):
        scores = {"good": torch.randn(5000).cuda(), "bad": torch.tensor([1.0, torch.nan]).cuda()}
        with pytest.raises(ValueError, match="'bad' holds NaN"):
            select(scores, [10])

    @pytest.mark.parametrize("collect", [selection._COLLECT, -1], ids=["collected", "counted"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_selection_with_the_host_is_the_same(self, dtype, collect, monkeypatch):
        scores = {str(i): torch.randn(9_000 + i).to(dtype) for i in range(3)}
        counts = some_counts(27_003, 20)
        expected = select(scores, counts)
        monkeypatch.setattr(selection, "_on_one_device", lambda scores: None)
        monkeypatch.setattr(selection, "_COLLECT", collect)
        assert_same_cuts(select(on_gpu(scores), counts), expected)

    def test_scores_on_cpu_and_gpu_compete(self):
        scores = {"a": torch.randn(5000), "b": torch.randint(-3, 4, (5000,)).float()}
        counts = some_counts(10_000)
        mixed = {"a": scores["a"].cuda(), "b": scores["b"]}
        cuts = select(mixed, counts)
        assert_same_cuts(cuts, select(scores, counts))
        levels, expected = assign(mixed, cuts), assign(scores, cuts)
        assert all(torch.equal(levels[name].cpu(), expected[name]) for name in scores)

    def test_no_more_memory_than_a_byte_a_weight_and_some(self):
        scores = {"w": torch.randn(50_000_000, device="cuda", dtype=torch.bfloat16)}
        counts = some_counts(50_000_000, 100)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assign(scores, select(scores, counts))
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= 50_000_000 + (64 << 20)


class TestMaskedWeights:
    @pytest.mark.parametrize("num_levels", [7, 300])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1,), (5, 7), (129, 33), (8, 3, 3, 3), (256, 512)])
    def test_masked_weights_are_those_of_the_cpu(self, shape, dtype, num_levels):
        weight, levels = torch.randn(shape).to(dtype), random_levels(shape, num_levels)
        level = longs(0, 2, num_levels - 1)
        expected = ops.masked_weights(weight, levels, level)
        assert torch.equal(ops.masked_weights(*on_gpu((weight, levels, level))).cpu(), expected)

    def test_special_values_are_kept(self):
        weight = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-40])
        masked = ops.masked_weights(
            weight.cuda(), torch.full((5,), 3).byte().cuda(), longs(2).cuda()
        )
        assert torch.equal(masked[0].cpu().view(torch.int32), weight.view(torch.int32))


class TestMaskedLinear:
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 64, 100, 129, 300])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_it_is_the_masked_product_at_each_level(self, dtype, batch, shared):
        case = linear_case(batch=batch, inputs=100, outputs=70, dtype=dtype, shared=shared)
        assert torch.equal(fused(*case), slow_linear(*case))

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (16, 8), (63, 129), (1024, 257)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_size_of_weight(self, dtype, inputs, outputs, shared):
        case = linear_case(batch=19, inputs=inputs, outputs=outputs, dtype=dtype, shared=shared)
        assert torch.equal(fused(*case), slow_linear(*case))

    @pytest.mark.parametrize("number", [1, 32, 100, 255])
    def test_any_number_of_levels(self, number):
        case = linear_case(num_levels=255, level=tuple(range(number)), dtype=torch.bfloat16)
        assert torch.equal(fused(*case), slow_linear(*case))

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("scaled", [False, True])
    def test_with_what_follows(self, scaled, relu):
        case = linear_case(batch=33)
        x, bias, level, weight, levels = on_gpu(case)
        scale = integers(21) if scaled else None
        y = ops.masked_linear(x, weight, levels, level, bias, on_gpu(scale), relu).cpu()
        expected = slow_linear(case[0], None, *case[2:]) * (scale if scaled else 1) + case[1]
        assert torch.equal(y, expected.relu() if relu else expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_real_numbers_are_summed_in_single_precision(self, dtype):
        case = linear_case(batch=33, inputs=2000, outputs=50, dtype=dtype, random=True)
        wide = [t.double() if t.is_floating_point() else t for t in case]
        rounding = max(2e-5, torch.finfo(dtype).eps)
        difference = (fused(*case).double() - slow_linear(*wide)).abs().max()
        assert difference <= rounding * slow_linear(*wide).abs().max()

    def test_infinite_activations_are_nan_as_in_the_masked_network(self):
        x, bias, level, weight, levels = linear_case()
        x[:, 2, 3] = torch.inf
        y = fused(x, bias, level, weight, levels)
        torch.testing.assert_close(
            y, slow_linear(x, bias, level, weight, levels), equal_nan=True, rtol=0, atol=0
        )

    @pytest.mark.parametrize("layout", ["expanded", "sliced", "features apart", "offset"])
    def test_inputs_of_any_strides(self, layout):
        x, bias, level, weight, levels = linear_case(batch=6)
        x = {
            "expanded": x[:, :1].expand(-1, 6, -1),
            "sliced": integers(4, 12, 40)[:, ::2],
            "features apart": x.transpose(1, 2).contiguous().transpose(1, 2),
            "offset": integers(4 * 240 + 1)[1:].reshape(4, 6, 40),
        }[layout]
        there = on_gpu((x, weight, levels, level, bias))
        y = ops.masked_linear(*there).cpu()
        assert torch.equal(y, slow_linear(x, bias, level, weight, levels))

    def test_nothing_to_multiply(self):
        assert fused(*linear_case(batch=0)).shape == (4, 0, 21)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_extra_memory_is_a_small_part_of_the_masked_copies(self, dtype):
        x = torch.randn(32, 16, 2048, device="cuda", dtype=dtype)
        weight = torch.randn(2048, 2048, device="cuda", dtype=dtype)
        levels = torch.randint(0, 33, weight.shape, device="cuda").byte()
        level = torch.arange(32, device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = ops.masked_linear(x, weight, levels, level)
        extra = torch.cuda.max_memory_allocated() - before - y.nbytes
        assert extra <= 0.1 * 32 * weight.nbytes


def fused(x, bias, level, weight, levels) -> Tensor:
    x, bias, level, weight, levels = on_gpu((x, bias, level, weight, levels))
    y: Tensor = ops.masked_linear(x, weight, levels, level, bias)
    assert y.is_contiguous()
    return y.cpu()


@pytest.fixture(params=[0, 1 << 30], ids=["written out", "masked on the way"])
def way(request, monkeypatch):
    for dtype in DTYPES:
        monkeypatch.setitem(on_cuda.FUSED_VECTORS, dtype, request.param)


@pytest.mark.usefixtures("way")
class TestGridProducts:
    @pytest.mark.parametrize("batch_minor", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_linear_layer(self, dtype, shared, batch_minor):
        case = linear_case(batch=17, dtype=dtype, shared=shared)
        x, bias, level, weight, levels = on_gpu(case)
        y = ops.grid_linear(x, bias, level, [weight, levels], 21, 0, batch_minor)
        assert torch.equal(y.cpu(), slow_linear(*case))
        assert y.transpose(1, 2).is_contiguous() if batch_minor else y.is_contiguous()

    def test_levels_in_two_bytes(self):
        case = linear_case(num_levels=1000, level=(0, 500, 999))
        x, bias, level, weight, levels = on_gpu(case)
        y = ops.grid_linear(x, bias, level, [weight, levels], 21, 0, False)
        assert torch.equal(y.cpu(), slow_linear(*case))

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("name", GEOMETRIES)
    def test_a_convolution(self, name, shared):
        tensors, geometry = conv_case(*GEOMETRIES[name], shared=shared)
        x, bias, level, weight, levels = on_gpu(tensors)
        y = ops.grid_conv(
            *(x, bias, level, [weight, levels], weight.shape[0], 0, list(weight.shape[2:])),
            **geometry,
        )
        assert torch.equal(y.cpu(), slow_conv(*tensors, **geometry))

    def test_under_vmap(self):
        x, bias, level, weight, levels = on_gpu(linear_case())

        def layer(level, x):
            rows = [weight, levels]
            return ops.grid_linear(x, bias, level.reshape(1), rows, 21, 0, False)

        y = torch.vmap(layer)(level, x.unsqueeze(1))
        loop = [layer(j, own.unsqueeze(0)) for j, own in zip(level, x, strict=True)]
        assert torch.equal(y, torch.stack(loop))


def packed_on_gpu(weight: Tensor, groups: int = 1) -> tuple[Tensor, ...]:
    return on_gpu(pack(weight, groups))


class TestSparse:
    @pytest.mark.parametrize("batch", [0, 1, 2, 3, 5, 8, 16, 33])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_linear_layer(self, dtype, batch):
        x, bias = integers(batch, 300, dtype=dtype), integers(290, dtype=dtype)
        packed = pack(pruned(290, 300, dtype=dtype), 1)
        expected = sparse_linear(x, *packed, bias, 290, NEVER)
        for dense_from in (NEVER, 0):
            found = sparse_linear(*on_gpu((x, *packed, bias)), 290, dense_from)
            assert torch.equal(found.cpu(), expected)

    @pytest.mark.parametrize("shape", [(300,), (2, 3, 300)])
    def test_inputs_of_any_dimensions_and_another_type(self, shape):
        x, packed = integers(*shape), pack(pruned(70, 300, dtype=torch.bfloat16), 1)
        expected = sparse_linear(x, *packed, None, 70, NEVER)
        found = sparse_linear(*on_gpu((x, *packed)), None, 70, NEVER)
        assert torch.equal(found.cpu(), expected)

    @pytest.mark.parametrize("groups", [1, 3])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_packing_and_unpacking(self, dtype, groups):
        weight = pruned(300, 270, dtype=dtype)
        packed = packed_on_gpu(weight, groups)
        for found, expected in zip(ops.sparse_pack(weight.cuda(), groups), packed, strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(ops.sparse_unpack(*packed, 300, 270, groups).cpu(), weight)
        ops.sparse_check(*packed, 300, 270, groups)
        with pytest.raises(ValueError, match="not a sparse matrix"):
            ops.sparse_check(packed[0], packed[1] + 100, *packed[2:], 300, 270, groups)

    @pytest.mark.parametrize("batched", [False, True])
    def test_a_convolution(self, batched):
        x = integers(2, 6, 9, 8) if batched else integers(6, 9, 8)
        packed = pack(pruned(12, 2 * 9), 3)
        sizes = [3, 3], [2, 1], [1, 1], [1, 2], 3, NEVER
        expected = ops.sparse_conv(x, *packed, None, 12, *sizes)
        found = ops.sparse_conv(*on_gpu((x, *packed)), None, 12, *sizes)
        torch.testing.assert_close(found.cpu(), expected)

    def test_a_matrix_of_another_shape_gives_nan(self):
        packed = packed_on_gpu(pruned(128, 300))
        assert sparse_linear(integers(3, 300).cuda(), *packed, None, 100, NEVER).isnan().all()

    @pytest.mark.parametrize("operator", ["prefix_rows", "cut_weights"])
    def test_what_makes_sense_on_the_cpu_alone_is_refused_with_the_way_out(self, operator):
        _, _, _, weight, levels = on_gpu(linear_case())
        arguments = {
            "prefix_rows": (weight, levels, 7, 16),
            "cut_weights": (weight, -1, 5, 5, weight.clone(), longs(0, 0).cuda()),
        }[operator]
        with pytest.raises(RuntimeError, match=r"got CUDA tensors, but .* [oO]n CUDA"):
            getattr(ops, operator)(*arguments)


def registered_calls():
    """One call of every operator on a GPU: name and arguments, made when they are asked for."""
    scores = torch.randn(50)
    counts = torch.zeros(1 << 15, dtype=torch.int64)
    yield "magnitude_histogram", (scores, torch.float32, longs(), 16, 15, counts)
    brackets = (longs(1 << 16), longs((1 << 16) + 9999), 1000, longs(0))
    yield "magnitude_collect", (scores, torch.float32, longs(1), 16, *brackets)
    yield "magnitude_select", ([scores, scores[:3]], torch.float32, longs(0, 4, 9))
    cut = (longs(5), longs(0, 1), longs(1), torch.tensor([True]), longs(0))
    yield "assign_levels", ([scores, scores[:3]], torch.float32, *cut)
    x, bias, level, weight, levels = linear_case()
    yield "masked_weights", (weight, levels, level)
    yield "masked_linear", (x, weight, levels, level, bias, None, True)
    yield "grid_linear", (x, bias, level, [weight, levels], 21, 0, False)
    (x, bias, level, weight, levels), geometry = conv_case((5, 6), padding=1)
    sizes = [geometry[name] for name in ("stride", "padding", "dilation", "groups")]
    yield "grid_conv", (x, bias, level, [weight, levels], 6, 0, [3, 3], *sizes)
    (x, bias, level, *first), (_, _, _, *second) = linear_case(shared=True), linear_case(inputs=21)
    every = [21, 21], [0, 0], [bias, None], [None, bias], [True, False]
    yield "grid_mlp", (x, level, [*first, *second], *every)
    weight = pruned(21, 4 * 9)
    yield "sparse_pack", (weight, 3)
    packed = pack(weight, 1)
    yield "sparse_check", (*packed, 21, 4 * 9, 1)
    yield "sparse_unpack", (*packed, 21, 4 * 9, 1)
    yield "sparse_linear", (integers(5, 4 * 9), *packed, bias, 21, NEVER)
    sizes = [geometry[name] for name in ("stride", "padding", "dilation")]
    image = integers(2, 4, 5, 6)
    yield "sparse_conv", (image, *packed, bias, 21, [3, 3], *sizes, 1, NEVER)
    heads = [torch.randn(2, 3, tokens, 8) for tokens in (5, 7, 7)]
    yield "short_attention", (*heads, torch.randn(2, 3, 5, 7), 0.3, False)


CALLS = list(registered_calls())


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_operators_are_registered_as_torch_wants_them(name, arguments):
    torch.library.opcheck(getattr(ops, name).default, on_gpu(arguments))


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_operators_work_in_the_stream_of_the_call(name, arguments):
    """Where the device is kept busy first, a kernel in another stream would read too early."""
    operator, there = getattr(ops, name).default, on_gpu(arguments)
    expected = operator(*on_gpu(arguments))
    held = [t for t in torch.utils._pytree.tree_leaves(there) if isinstance(t, Tensor)]
    held = [t for t in held if t.is_floating_point()]
    saved = [t.clone() for t in held]
    for tensor in held:
        tensor.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for tensor, values in zip(held, saved, strict=True):
            tensor.copy_(values)
        found = operator(*there)
    stream.synchronize()
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        assert a is b is None or torch.equal(sorted_as(a), sorted_as(b))


def sorted_as(tensor: Tensor) -> Tensor:
    return tensor.sort().values if tensor.ndim == 1 else tensor


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_operators_work_on_the_device_of_their_tensors(name, arguments):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    operator = getattr(ops, name).default
    found, expected = operator(*on_gpu(arguments, "cuda:1")), operator(*on_gpu(arguments))
    assert torch.cuda.current_device() == 0
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        assert a is b is None or torch.equal(sorted_as(a).cpu(), sorted_as(b).cpu())


def waiting(name: str) -> bool:
    return name in ("magnitude_collect", "sparse_pack", "sparse_check")


QUIET = [(name, arguments) for name, arguments in CALLS if not waiting(name)]


@pytest.mark.parametrize(("name", "arguments"), QUIET, ids=[name for name, _ in QUIET])
def test_operators_do_not_wait_for_the_device(name, arguments):
    operator, there = getattr(ops, name).default, on_gpu(arguments)
    with not_waiting():
        operator(*there)


class not_waiting:
    """Within, what waits for the device raises."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


def test_assigning_levels_does_not_wait_for_the_device():
    scores = {str(i): torch.randn(5000, device="cuda") for i in range(3)}
    cuts = select(scores, some_counts(15_000))
    with not_waiting():
        assign(scores, cuts)


CAPTURED = (
    *("magnitude_select", "assign_levels", "masked_weights", "masked_linear"),
    *("sparse_unpack", "sparse_linear"),
)


@pytest.mark.parametrize("name", CAPTURED)
def test_a_graph_captures_operators_and_replays_them_on_new_data(name):
    arguments = dict(CALLS)[name]
    operator, there = getattr(ops, name).default, on_gpu(arguments)
    tensors = [t for t in torch.utils._pytree.tree_leaves(there) if isinstance(t, Tensor)]
    floats = [t for t in tensors if t.is_floating_point()]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        operator(*there)  # loads what is loaded at a first call
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = operator(*there)
    for tensor in floats:
        tensor.copy_(torch.randn(tensor.shape))
    expected = operator(*[t.clone() if isinstance(t, Tensor) else t for t in there])
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("masked_linear", {0: "cpu"}, ValueError, "x is on the CPU"),
        ("masked_linear", {1: "cpu"}, ValueError, "weight is on cpu but x is on cuda:0"),
        ("masked_linear", {2: "cpu"}, ValueError, "levels is on cpu"),
        ("masked_linear", {3: "cpu"}, ValueError, "level is on cpu"),
        ("masked_linear", {4: "cpu"}, ValueError, "bias is on cpu"),
        ("masked_linear", {1: torch.float16}, TypeError, "weight is Half but x is Float"),
        ("masked_linear", {0: torch.int32, 1: torch.int32}, TypeError, "x must be float32"),
        ("masked_linear", {2: torch.int16}, TypeError, "levels must be uint8, got Short"),
        ("masked_linear", {3: torch.int32}, TypeError, "level must be a contiguous int64"),
        ("masked_weights", {1: "cpu"}, ValueError, "levels is on cpu but weight is on cuda:0"),
        ("masked_weights", {0: torch.int32}, TypeError, "weight must be float32"),
        ("magnitude_select", {2: "cpu"}, ValueError, "rank is on cpu but scores is on cuda:0"),
        ("magnitude_select", {2: torch.int32}, TypeError, "rank must be a contiguous int64"),
        ("assign_levels", {2: "cpu"}, ValueError, "thresholds is on the CPU"),
        ("assign_levels", {0: "cpu"}, ValueError, "scores is on cpu but thresholds is on cuda:0"),
        ("magnitude_histogram", {5: "cpu"}, ValueError, "counts is on cpu"),
        ("magnitude_collect", {4: "cpu"}, ValueError, "low is on cpu"),
        ("grid_linear", {1: "cpu"}, ValueError, "bias is on cpu but x is on cuda:0"),
        ("grid_conv", {2: "cpu"}, ValueError, "level is on cpu but x is on cuda:0"),
        ("grid_mlp", {1: "cpu"}, ValueError, "level is on cpu but x is on cuda:0"),
        ("sparse_unpack", {3: "cpu"}, ValueError, "cells is on cpu but values is on cuda:0"),
        ("sparse_linear", {0: "cpu"}, ValueError, "x is on the CPU"),
        ("sparse_linear", {5: "cpu"}, ValueError, "bias is on cpu but x is on cuda:0"),
        ("sparse_linear", {0: torch.float64}, TypeError, "x is Double and the weights are Float"),
        ("sparse_linear", {2: torch.int32}, TypeError, "columns and slices must be uint8"),
        ("sparse_conv", {1: "cpu"}, ValueError, "values is on cpu but x is on cuda:0"),
    ],
)
def test_wrong_arguments_are_named(name, arguments, error, message):
    there = list(on_gpu(dict(CALLS)[name]))
    for place, change in arguments.items():
        there[place] = torch.utils._pytree.tree_map(lambda t, to=change: t.to(to), there[place])
    with pytest.raises(error, match=message):
        getattr(ops, name)(*there)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(5, 40)}, r"x \[1 or K, N, in\]"),
        ({0: torch.zeros(2, 5, 40)}, "x has 2 inputs for 4 levels"),
        ({0: torch.zeros(4, 5, 41)}, r"weight has shape \[21, 40\]"),
        ({2: torch.zeros(21, 41).byte()}, r"levels has \[21, 41\]"),
        ({4: torch.zeros(20)}, r"bias has shape \[20\] for 21 outputs"),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    there = list(on_gpu(dict(CALLS)["masked_linear"]))
    for place, tensor in changes.items():
        there[place] = tensor.cuda()
    with pytest.raises(ValueError, match=message):
        ops.masked_linear(*there)


def test_the_key_of_a_gpu_is_that_of_the_cpu():
    scores = {"a": torch.zeros(2, dtype=torch.float16), "b": torch.zeros(2)}
    assert key_type(on_gpu(scores)) == key_type(scores) == torch.float32
