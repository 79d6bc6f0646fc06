"""The GPU: selection, grid products, calibration and pruning, against torch's own and the ceilings.

Every group of rows stands alone: what fails leaves a row that says why, and the others go on.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import gpu_networks
from benchmarks.comparisons import absent, at_least, at_most, bars, compare, table
from benchmarks.gpu_timing import device_seconds, extra_bytes, wall_seconds
from benchmarks.records import Row, Unavailable, markdown
from benchmarks.timing import round_digits, spread
from confprune import build_info, prune_levels
from confprune.grid import materialised, on_cuda
from confprune.selection import assign, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "On a GPU: how near the ceilings are the kernels, and how fast against torch's own?"
PEERS = ()

FLOOR = "reading the weights once"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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


def measure(sizes: Sizes, seed: int) -> list[Row]:
    """All rows.

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
    torch.manual_seed(seed)
    rows = []
    for group in (_ceilings, _selection, _products, _sweep, _convolutions, _networks, _pruning):
        rows += _guarded(group, sizes)
    return rows


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


def _guarded(group: Callable[[Sizes], Iterator[Row]], sizes: Sizes) -> Iterator[Row]:
    """The rows of a group, up to one that fails, which becomes a row that says why."""
    rows = group(sizes)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except Exception as error:
            print(f"{group.__name__[1:]} failed: {error!r}")
            yield absent(group.__name__[1:], "everything after", f"failed: {error!r}"[:300])
            break
        print(_line(row), flush=True)
        yield row
    gc.collect()
    torch.cuda.empty_cache()


def _line(row: Row) -> str:
    """A row while others are still being measured."""
    if "ours" in row:
        median, ratio = row["ours"]["median"], row["ratio"]
        return f"  {row['what']}: {median:.4g} {row['unit']}, {ratio:.3g} x {row['peer']}"
    return "  " + ", ".join(f"{key} {value}" for key, value in row.items())


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


def _selection(sizes: Sizes) -> Iterator[Row]:
    """Thresholds and prune levels against the floor of their bytes, and against torch's sorting."""
    for name, dtype in DTYPES.items():
        weights = torch.randn(sizes.weights, device="cuda", dtype=dtype).mul_(0.02)
        ranks = [round(sizes.weights * j / sizes.levels) for j in range(sizes.levels)]
        scores, wanted = {"w": weights}, torch.tensor(ranks, device="cuda")
        cuts = select(scores, ranks)
        ours = {
            "thresholds": lambda s=[weights], k=dtype, r=wanted: (
                torch.ops.confprune.magnitude_select(s, k, r)
            ),
            "levels": lambda s=scores, c=cuts: assign(s, c),
        }
        times = device_seconds(ours, rounds=sizes.rounds)
        counted = torch.bincount(assign(scores, cuts)["w"], minlength=sizes.levels + 1)
        exact = counted.cumsum(0)[:-1].tolist() == ranks
        what = f"thresholds of {sizes.levels} levels, {sizes.weights / 1e6:g} M {name}"
        floor = weights.nbytes / _bandwidth()
        bound = {"bf16": 1.3, "fp32": 2.2}[name]
        yield compare(
            what, times["thresholds"], FLOOR, [floor], target=at_most(bound), agrees=exact
        )
        for peer, run, scale in _sorters(weights, sizes, ranks):
            other = device_seconds({peer: run}, rounds=3)[peer]
            yield compare(
                what,
                times["thresholds"],
                peer,
                other,
                part=f"{sizes.part / 1e6:g} M weights",
                scale=scale,
                target=at_least(50),
            )
        floor = (weights.nbytes + sizes.weights) / _bandwidth()
        yield compare(
            f"prune levels of {sizes.levels} levels, {sizes.weights / 1e6:g} M {name}",
            times["levels"],
            "reading the weights and writing a byte each",
            [floor],
            target=at_most(1.3),
            agrees=exact,
        )
        del weights, scores, ours, counted


def _sorters(
    weights: Tensor, sizes: Sizes, ranks: list[int]
) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Torch's ways to thresholds, on a part of the weights, with the share that they do."""
    part = weights[: sizes.part]
    share = sizes.weights / sizes.part
    index = torch.tensor(ranks, device="cuda").float().div_(share).long().clamp_(1) - 1
    yield "`torch.sort`", lambda: part.abs().sort().values[index], share
    middle = sizes.part // 2
    yield (
        "`torch.kthvalue`, level by level",
        lambda: part.abs().kthvalue(middle),
        (share * len(ranks)),
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


def _products(sizes: Sizes) -> Iterator[Row]:
    """The grid product against the better of both peers, with its rate and its memory."""
    for name, dtype in DTYPES.items():
        for tokens, target in sizes.tokens:
            case = _layer(sizes.width, sizes.width, sizes.product_levels, tokens, dtype)
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
            flops = 2 * x.numel() * len(weight)
            fused = on_cuda.fused(tokens, weight, prune)
            extra = extra_bytes(ours) - expected.numel() * weight.element_size()
            yield compare(
                f"{name} product of {sizes.width} x {sizes.width}, K = {sizes.product_levels}, "
                f"{tokens} tokens a level",
                own,
                best,
                times[best],
                target=at_least(target if name == "bf16" else 0),
                agrees=bool(error < {"bf16": 2e-2, "fp32": 1e-5}[name]),
                way="masked on the way" if fused else "written out",
                tflops=round_digits(flops / spread(own)["median"] / 1e12),
                extra_share=round_digits(max(0, extra) / (len(level) * weight.nbytes)),
                others={peer: spread(values) for peer, values in times.items()},
            )
            del case, x, weight, prune, level, expected, ours, contenders


def _grid_linear(x: Tensor, weight: Tensor, prune: Tensor, level: Tensor) -> Tensor:
    y: Tensor = torch.ops.confprune.grid_linear(
        x, None, level, [weight, prune], len(weight), 0, False
    )
    return y


def _sweep(sizes: Sizes) -> Iterator[Row]:
    """Where writing masked weights out overtakes masking on the way, for one x and for K."""
    for name, dtype in DTYPES.items():
        for outputs, inputs in sizes.shapes:
            for shared in (False, True):
                for tokens in sizes.sweep:
                    case = _layer(outputs, inputs, sizes.product_levels, tokens, dtype)
                    x, weight, prune, level = case
                    x = x[:1] if shared else x
                    contenders = {
                        "fused": functools.partial(
                            torch.ops.confprune.masked_linear, x, weight, prune, level
                        ),
                        "written": functools.partial(
                            materialised.grid_linear, x, weight, prune, level
                        ),
                    }
                    times = device_seconds(contenders, rounds=5)
                    yield {
                        "sweep": f"{name} {outputs} x {inputs}" + (", one x" if shared else ""),
                        "dtype": name,
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
            "one by one": functools.partial(run, 0),
            "as groups": functools.partial(run, 1 << 40),
        }
        times = wall_seconds(contenders, rounds=5)
        yield {
            "convolution": f"{channels} channels, {side} x {side}, {batch} examples",
            "outputs_a_level": batch * channels * side**2,
            **{way: spread(values) for way, values in times.items()},
        }


def _networks(sizes: Sizes) -> Iterator[Row]:
    """Calibrations against the level-by-level loop, to the same certified level."""
    for subject in gpu_networks.SUBJECTS:
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
