"""The GPU: selection, products, calibration and pruning, against torch's own and the ceilings.

Every group of rows stands alone: what fails, crashes or hangs leaves a row that says why.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import gpu_networks, gpu_sparse
from benchmarks.comparisons import at_least, at_most, bars, compare, table
from benchmarks.gpu_timing import device_seconds, extra_bytes, wall_seconds
from benchmarks.isolated import Group, isolated
from benchmarks.records import Row, Unavailable, markdown
from benchmarks.timing import round_digits, spread
from confprune import build_info, prune_levels
from confprune.grid import materialised, on_cuda
from confprune.selection import assign, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "On a GPU: how near the ceilings are the kernels, and how fast against torch's own?"
PEERS = ()

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CONV_WAYS = ("one by one", "as groups")


@dataclass(frozen=True)
class Sizes:
    """Weights that are selected; levels; the layer, tokens and sweep of the product; and effort."""

    weights: int
    part: int  # of them, for peers that take long
    levels: int
    width: int
    product_levels: int
    tokens: tuple[tuple[int, float], ...]  # a level, with the target against the better peer
    sweep: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    examples: int
    rounds: int


FULL = Sizes(
    1_000_000_000,
    50_000_000,
    100,
    4096,
    32,
    ((16, 3.0), (128, 1.5), (2048, 0.95)),
    (1, 4, 16, 64, 128, 192, 256, 384, 512, 1024, 2048),
    ((4096, 4096), (1024, 4096), (4096, 1024), (384, 1536), (384, 384)),
    20_000,
    rounds=15,
)
QUICK = Sizes(
    20_000_000, 2_000_000, 20, 512, 8, ((16, 0.0),), (16, 256), ((512, 512),), 500, rounds=3
)


def measure(sizes: Sizes, seed: int) -> Iterator[Row]:
    """All rows, as they come.

    Raises
    ------
    Unavailable
        Where there is no GPU, or this confprune was built without kernels for it.
    """
    if not torch.cuda.is_available():
        raise Unavailable("there is no CUDA device here")
    if build_info()["cuda"] is None:
        raise Unavailable(
            "this confprune was built without CUDA kernels: CONFPRUNE_CUDA=1 says why"
        )
    groups = {
        name: functools.partial(_seeded, seed, group) for name, group in _groups(sizes).items()
    }
    yield from isolated(groups, _check)


def _seeded(seed: int, group: Group) -> Iterator[Row]:
    torch.manual_seed(seed)
    yield from group()


def _groups(sizes: Sizes) -> dict[str, Group]:
    """What is measured, by name; what there is a target for comes first."""
    part = functools.partial
    return {
        "ceilings": part(_ceilings, sizes),
        **{f"selection of {name}": part(_selection, name, sizes) for name in DTYPES},
        **{
            f"{name} products of {tokens} tokens": part(_products, name, tokens, target, sizes)
            for name in DTYPES
            for tokens, target in sizes.tokens
        },
        "pruning": part(_pruning, sizes),
        **{s.name: part(_network, s, sizes) for s in gpu_networks.SUBJECTS},
        **{
            f"sparse layer of {sparsity:.0%} zeros": part(
                gpu_sparse.rows, sparsity, sizes.width, sizes.rounds
            )
            for sparsity in gpu_sparse.SPARSITIES
        },
        **{f"sorting of {name}": part(_sorting, name, sizes) for name in DTYPES},
        **{f"sweep of {name}": part(_sweep, name, sizes) for name in DTYPES},
        "convolutions": part(_convolutions, sizes),
    }


def settings() -> dict[str, Any]:
    """The device, and what runs on it."""
    if not torch.cuda.is_available():
        return {}
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "device_memory_gib": round(device.total_memory / 2**30, 1),
        "cuda_of_torch": torch.version.cuda,
        "build": build_info(),
        "fused_vectors": {str(dtype): n for dtype, n in on_cuda.FUSED_VECTORS.items()},
    }


def _check() -> None:
    """Give memory back, and raise where an error has left the device unusable."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@functools.cache
def _bandwidth() -> float:
    """Bytes a second that a copy on the device moves, read and written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    [times] = device_seconds({"copy": lambda: target.copy_(source)}, rounds=9).values()
    return 2 * source.nbytes / spread(times)["median"]


def _ceilings(sizes: Sizes) -> Iterator[Row]:
    yield {
        "ceiling": "bandwidth of a copy on the device",
        "value": round_digits(_bandwidth() / 1e9),
        "unit": "GB/s",
    }
    size = 8192 if sizes == FULL else 1024
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        [times] = device_seconds({"product": lambda a=a, b=b: a @ b}, rounds=9).values()
        rate = 2 * size**3 / spread(times)["median"]
        yield {
            "ceiling": f"{name} product of {size} x {size} matrices",
            "value": round_digits(rate / 1e12),
            "unit": "TFLOP/s",
        }


def _weights(name: str, sizes: Sizes) -> tuple[Tensor, list[int]]:
    """The weights that are selected from, and the ranks of the levels' cuts."""
    weights = torch.randn(sizes.weights, device="cuda", dtype=DTYPES[name]).mul_(0.02)
    return weights, [round(sizes.weights * j / sizes.levels) for j in range(sizes.levels)]


def _what(name: str, sizes: Sizes) -> str:
    return f"of {sizes.levels} levels, {sizes.weights / 1e6:g} M {name}"


def _thresholds(weights: Tensor, ranks: list[int]) -> Callable[[], Any]:
    wanted = torch.tensor(ranks, device="cuda")
    return lambda: torch.ops.confprune.magnitude_select([weights], weights.dtype, wanted)


def _selection(name: str, sizes: Sizes) -> Iterator[Row]:
    """Thresholds and prune levels against the floor of their bytes."""
    weights, ranks = _weights(name, sizes)
    scores = {"w": weights}
    cuts = select(scores, ranks)
    ours = {"thresholds": _thresholds(weights, ranks), "levels": lambda: assign(scores, cuts)}
    times = device_seconds(ours, rounds=sizes.rounds)
    counted = torch.bincount(assign(scores, cuts)["w"], minlength=sizes.levels + 1)
    exact = counted.cumsum(0)[:-1].tolist() == ranks
    yield compare(
        f"thresholds {_what(name, sizes)}",
        times["thresholds"],
        "reading the weights once",
        [weights.nbytes / _bandwidth()],
        target=at_most({"bf16": 1.3, "fp32": 2.2}[name]),
        agrees=exact,
    )
    yield compare(
        f"prune levels {_what(name, sizes)}",
        times["levels"],
        "reading the weights and writing a byte each",
        [(weights.nbytes + sizes.weights) / _bandwidth()],
        target=at_most(1.3),
        agrees=exact,
    )


def _sorting(name: str, sizes: Sizes) -> Iterator[Row]:
    """Thresholds against torch's ways to them, on a part of the weights."""
    weights, ranks = _weights(name, sizes)
    part, share = weights[: sizes.part], sizes.weights / sizes.part
    index = torch.tensor(ranks, device="cuda").float().div_(share).long().clamp_(1) - 1
    middle = sizes.part // 2
    ours = device_seconds({"": _thresholds(weights, ranks)}, rounds=sizes.rounds)[""]
    for peer, run, scale in (
        ("`torch.sort`", lambda: part.abs().sort().values[index], share),
        (
            "`torch.kthvalue`, level by level",
            lambda: part.abs().kthvalue(middle),
            share * len(ranks),
        ),
    ):
        yield compare(
            f"thresholds {_what(name, sizes)}",
            ours,
            peer,
            device_seconds({peer: run}, rounds=3)[peer],
            part=f"{sizes.part / 1e6:g} M weights",
            scale=scale,
            target=at_least(50),
        )


def _layer(
    outputs: int, inputs: int, levels: int, tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [K, N, inputs], weight, prune levels and level of a layer."""
    x = torch.randn(levels, tokens, inputs, device="cuda", dtype=dtype)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=dtype) / inputs**0.5
    prune = torch.randint(0, levels + 1, (outputs, inputs), device="cuda").byte()
    return x, weight, prune, torch.arange(levels, device="cuda")


def _masked(weight: Tensor, prune: Tensor, level: Tensor) -> Tensor:
    zero = torch.zeros((), device="cuda", dtype=weight.dtype)
    return torch.where(prune > level[:, None, None], weight, zero)


def _one_by_one(x: Tensor, weight: Tensor, prune: Tensor, level: Tensor) -> Tensor:
    """(a) masking and cuBLAS, level by level."""
    zero = torch.zeros((), device="cuda", dtype=weight.dtype)
    y = x.new_empty(len(level), x.shape[1], weight.shape[0])
    for k in range(len(level)):
        torch.mm(x[k], torch.where(prune > k, weight, zero).mT, out=y[k])
    return y


def _all_at_once(x: Tensor, weight: Tensor, prune: Tensor, level: Tensor) -> Tensor:
    """(b) all masked weights and `torch.bmm`."""
    return torch.bmm(x, _masked(weight, prune, level).mT)


def _products(name: str, tokens: int, target: float, sizes: Sizes) -> Iterator[Row]:
    """The grid product against the better of both peers, with its rate and its memory."""
    case = _layer(sizes.width, sizes.width, sizes.product_levels, tokens, DTYPES[name])
    x, weight, prune, level = case
    ours = functools.partial(_grid_linear, *case)
    contenders = {
        "confprune": ours,
        "masking and cuBLAS, level by level": functools.partial(_one_by_one, *case),
        "K masked weights and `torch.bmm`": functools.partial(_all_at_once, *case),
    }
    times = device_seconds(contenders, rounds=sizes.rounds)
    own = times.pop("confprune")
    best = min(times, key=lambda peer: spread(times[peer])["median"])
    expected = _one_by_one(*case).double()
    error = (ours().double() - expected).abs().max() / expected.abs().max()
    extra = extra_bytes(ours) - expected.numel() * weight.element_size()
    fused = on_cuda.fused(tokens, weight, prune)
    yield compare(
        f"{name} product of {sizes.width} x {sizes.width}, K = {sizes.product_levels}, "
        f"{tokens} tokens a level",
        own,
        best,
        times[best],
        target=at_least(target if name == "bf16" else 0),
        agrees=bool(error < {"bf16": 2e-2, "fp32": 1e-5}[name]),
        way="masked on the way" if fused else "written out",
        tflops=round_digits(2 * x.numel() * len(weight) / spread(own)["median"] / 1e12),
        extra_share=round_digits(max(0, extra) / (len(level) * weight.nbytes)),
        others={peer: spread(values) for peer, values in times.items()},
    )


def _grid_linear(x: Tensor, weight: Tensor, prune: Tensor, level: Tensor) -> Tensor:
    y: Tensor = torch.ops.confprune.grid_linear(
        x, None, level, [weight, prune], len(weight), 0, False
    )
    return y


def _sweep(name: str, sizes: Sizes) -> Iterator[Row]:
    """Where writing masked weights out overtakes masking on the way, for one x and for K."""
    for (outputs, inputs), shared, tokens in itertools.product(
        sizes.shapes, (False, True), sizes.sweep
    ):
        x, *others = _layer(outputs, inputs, sizes.product_levels, tokens, DTYPES[name])
        case = (x[:1] if shared else x, *others)
        contenders = {
            "fused": functools.partial(torch.ops.confprune.masked_linear, *case),
            "written": functools.partial(materialised.grid_linear, *case),
        }
        times = device_seconds(contenders, rounds=5)
        yield {
            "sweep": f"{name} {outputs} x {inputs}" + (", one x" if shared else ""),
            "tokens": tokens,
            **{way: spread(values) for way, values in times.items()},
        }


def _convolutions(sizes: Sizes) -> Iterator[Row]:
    """Convolutions of K levels: one by one, or as groups of one."""
    for channels, side, batch in ((16, 8, 1), (32, 28, 16), (64, 14, 64), (256, 14, 32)):
        levels = sizes.product_levels
        x = torch.randn(levels, batch, channels, side, side, device="cuda")
        weight = torch.randn(channels, channels, 3, 3, device="cuda")
        prune = torch.randint(0, levels + 1, weight.shape, device="cuda").byte()
        level = torch.arange(levels, device="cuda")

        def run(small: int, x: Tensor = x, weight: Tensor = weight, prune: Tensor = prune) -> Any:
            before, materialised._SMALL = materialised._SMALL, small
            try:
                return materialised.grid_conv(
                    *(x, weight, prune, level),  # noqa: B023  the one of this turn
                    stride=[1, 1],
                    padding=[1, 1],
                    dilation=[1, 1],
                    groups=1,
                )
            finally:
                materialised._SMALL = before

        contenders = {
            way: functools.partial(run, small)
            for way, small in zip(_CONV_WAYS, (0, 1 << 40), strict=True)
        }
        times = wall_seconds(contenders, rounds=5)
        yield {
            "convolution": f"{channels} channels, {side} x {side}, {batch} examples",
            "outputs_a_level": batch * channels * side**2,
            **{way: spread(values) for way, values in times.items()},
        }


def _network(subject: gpu_networks.Subject, sizes: Sizes) -> Iterator[Row]:
    """A calibration against the level-by-level loop, to the same certified level."""
    yield gpu_networks.row(subject, sizes.examples, sizes.levels, rounds=3)


def _pruning(sizes: Sizes) -> Iterator[Row]:
    """A model of so many bf16 weights, levelled and pruned."""
    width = 4096 if sizes == FULL else 512
    count = max(1, sizes.weights // width**2)
    with torch.device("cuda"):
        layers = [nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(count)]
    model = nn.Sequential(*layers)
    grid = [j / sizes.levels for j in range(sizes.levels)]
    half = len(grid) // 2
    what = f"{count * width**2 / 1e6:,.0f} M bf16 weights"
    contenders = {
        "levels": lambda: prune_levels(model, grid),
        "both": lambda: prune_levels(model, grid).prune(model, half),
    }
    times = wall_seconds(contenders, rounds=7)
    pruned = prune_levels(model, grid).prune(model, half)
    zeros = sum(int((layer.weight == 0).sum()) for layer in pruned)
    exact = abs(zeros - round(grid[half] * count * width**2)) <= count * width**2 / 1e4
    limit = at_most(1) if sizes == FULL else at_most(0)
    yield compare(
        f"{what} levelled and pruned", times["both"], "50 ms", [0.05], target=limit, agrees=exact
    )
    yield compare(f"{what} levelled", times["levels"], "50 ms", [0.05], target=at_most(0))


def tables(record: Mapping[str, Any]) -> str:
    """The ceilings, the comparisons, and the break-even points."""
    rows = record["rows"]
    compared = [row for row in rows if "what" in row]
    parts = [
        f"On {record['settings'].get('device', 'no device')}.",
        markdown(
            ["ceiling", "measured"],
            [[r["ceiling"], f"{r['value']:g} {r['unit']}"] for r in rows if "ceiling" in r],
        ),
        table(compared),
        markdown(
            ["product", "way", "TFLOP/s", "extra memory, of the K copies"],
            [
                [r["what"], r["way"], f"{r['tflops']:g}", f"{100 * r['extra_share']:.1f} %"]
                for r in compared
                if "way" in r
            ],
        ),
        markdown(
            ["convolutions of all levels", "one by one", "as groups of one"],
            [
                [r["convolution"], *(f"{1e3 * r[way]['median']:.3g} ms" for way in _CONV_WAYS)]
                for r in rows
                if "convolution" in r
            ],
        ),
        markdown(
            ["layer", "masked on the way is faster up to"],
            [[name, f"{tokens} tokens"] for name, tokens in break_even(rows).items()],
        ),
    ]
    return "\n\n".join(parts)


def break_even(rows: list[Row]) -> dict[str, int]:
    """The most tokens of a sweep up to which masking on the way is no slower, by layer."""
    found: dict[str, int] = {}
    ended = set()
    for row in rows:
        if "sweep" not in row:
            continue
        name = row["sweep"]
        found.setdefault(name, 0)
        if row["fused"]["median"] > row["written"]["median"]:
            ended.add(name)
        elif name not in ended:
            found[name] = row["tokens"]
    return found


def plot(record: Mapping[str, Any]) -> Figure:
    """Speed-ups over the peers."""
    return bars(record["rows"], f"confprune on {record['settings'].get('device', 'a GPU')}")
