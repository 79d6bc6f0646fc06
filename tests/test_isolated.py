"""Rows measured in a process apart: none is lost because another fails, crashes or hangs."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__, gpu, records
from benchmarks.isolated import isolated
from benchmarks.records import Row


def rows(*values: int) -> Iterator[Row]:
    yield from ({"value": value} for value in values)


def failing() -> Iterator[Row]:
    yield {"value": 10}
    raise RuntimeError("an error on the device")


def crashing() -> Iterator[Row]:
    yield {"value": 20}
    os._exit(3)


def hanging() -> Iterator[Row]:
    yield {"value": 30}
    time.sleep(600)


def check(broken: str, marker: str) -> None:
    """Raise once: where `broken` has gone by."""
    if os.path.exists(broken) and not os.path.exists(marker):
        open(marker, "w").close()
        raise RuntimeError("the device is gone")


def breaking(path: str) -> Iterator[Row]:
    yield {"value": os.getpid()}
    open(path, "w").close()


def test_every_group_is_measured_whatever_becomes_of_the_others(tmp_path):
    paths = str(tmp_path / "broken"), str(tmp_path / "noticed")
    groups = {
        "first": functools.partial(rows, 1, 2),
        "failing": failing,
        "breaking": functools.partial(breaking, paths[0]),
        "in a new process": functools.partial(breaking, paths[0]),
        "crashing": crashing,
        "hanging": hanging,
        "last": functools.partial(rows, 3),
    }
    found = list(isolated(groups, functools.partial(check, *paths), patience=5))
    values = [row.get("value", row.get("absent")) for row in found]
    assert values[:4] == [1, 2, 10, "failed: RuntimeError('an error on the device')"]
    assert values[4] != values[5]
    assert values[6:] == [
        *(20, "its process ended with exit code 3"),
        *(30, "no row within 5 s"),
        3,
    ]
    assert [row["what"] for row in found if "absent" in row] == ["failing", "crashing", "hanging"]


def test_no_process_outlives_who_asks_no_more():
    found = isolated({"hanging": hanging}, dict)
    assert next(found) == {"value": 30}
    found.close()
    assert multiprocessing.active_children() == []


def test_the_groups_of_the_gpu_can_go_to_another_process():
    groups = gpu._groups(gpu.FULL)
    assert list(pickle.loads(pickle.dumps(groups))) == list(groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so(capsys):
    assert __main__.main(["gpu", "--quick"]) == 1
    assert "skipped: there is no CUDA device here" in capsys.readouterr().out


def test_rows_are_stored_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "QUICK", tmp_path)

    def measure(sizes, seed):
        yield {"value": 1}
        assert records.load("gpu", quick=True)["rows"] == [{"value": 1}]
        yield {"value": 2}
        raise KeyboardInterrupt

    benchmark = SimpleNamespace(
        QUESTION="?", QUICK=gpu.QUICK, PEERS=(), measure=measure, settings=dict
    )
    options = __main__._parser().parse_args(["gpu", "--quick"])
    monkeypatch.setattr(__main__, "_module", lambda name: benchmark)
    with pytest.raises(KeyboardInterrupt):
        __main__._run("gpu", options)
    assert records.load("gpu", quick=True)["rows"] == [{"value": 1}, {"value": 2}]
