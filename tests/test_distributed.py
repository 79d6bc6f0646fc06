"""Two processes give what one gives, to the last bit, and fail together."""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import confprune
from confprune import Loss, Risk, calibrate, prune_levels, selection
from confprune.distributed import Ranks
from confprune.levels import levels_of

GRID = [j / 20 for j in range(20)]
SETTINGS: dict[str, Any] = {
    "alpha": 0.2,
    "delta": 0.1,
    "sparsities": GRID,
    "progress": False,
    "activation_bytes": 1 << 21,  # eight chunks of examples, to be shared
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.stop()


# Selection. What each rank does stands above the test, with assertions of its own.


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """Distinct and rounded values, and a tensor of one element."""
    torch.manual_seed(0)
    return {
        "a": torch.randn(70, 11).to(dtype),
        "b": (torch.randn(500) * 3).round().to(dtype),
        "c": torch.full((1,), 2.0, dtype=dtype),
        "d": (torch.randn(13, 2, 3) * 2).round().to(dtype),
    }


def part(tensor: Tensor, rank: int, where: float) -> Tensor:
    """Of two flat parts the one of this rank."""
    cut = round(where * tensor.numel())
    return tensor.flatten()[:cut] if rank == 0 else tensor.flatten()[cut:]


def select_in_parts(rank: int, scope: str) -> None:
    group = dist.group.WORLD
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        whole = weights(dtype)
        for grid in (GRID, [j / 300 for j in range(300)]):
            expected = levels_of(whole, grid, scope=scope)
            for where in (0.37, 1.0):
                mine = {name: part(tensor, rank, where) for name, tensor in whole.items()}
                with Ranks(group).together() as ranks:
                    found = levels_of(mine, grid, scope=scope, ranks=ranks)
                assert torch.equal(found.counts, expected.counts)
                assert torch.equal(found.thresholds, expected.thresholds)
                for name, levels in expected.levels.items():
                    assert torch.equal(found.levels[name], part(levels, rank, where)), name


def select_by_counting(rank: int) -> None:
    collect, selection._COLLECT = selection._COLLECT, -1  # no key to spare
    try:
        select_in_parts(rank, "global")
    finally:
        selection._COLLECT = collect


def select_some_tensors(rank: int) -> None:
    """Each rank has tensors that the other lacks; ties go by the order of rank 0, then of 1."""
    whole = weights(torch.bfloat16)
    with Ranks(dist.group.WORLD).together() as ranks:
        found = levels_of({name: whole[name] for name in ("ab", "cd")[rank]}, GRID, ranks=ranks)
    expected = levels_of(whole, GRID)
    assert list(found.levels) == list(("ab", "cd")[rank])
    for name, levels in found.levels.items():
        assert torch.equal(levels, expected.levels[name])


def select_modules(rank: int) -> None:
    """A pipeline: each rank's model holds some of the layers."""
    torch.manual_seed(0)
    layers = [nn.Linear(9, 7), nn.Linear(7, 5)]
    found = prune_levels(nn.ModuleDict({f"{rank}": layers[rank]}), GRID, group=dist.group.WORLD)
    expected = prune_levels(nn.ModuleList(layers), GRID)
    assert torch.equal(found.levels[f"{rank}.weight"], expected.levels[f"{rank}.weight"])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prune_levels_of_parts_are_parts_of_the_prune_levels(pair, scope):
    assert pair.run(select_in_parts, scope) == [None, None]


def test_selection_by_counting_alone_may_be_split_too(pair):
    assert pair.run(select_by_counting) == [None, None]


def test_each_rank_may_hold_other_tensors(pair):
    assert pair.run(select_some_tensors) == [None, None]
    assert pair.run(select_modules) == [None, None]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    # Odd numbers of rows, and one, of which a rank gets none.
    return nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 5), nn.Linear(5, 1)).to(dtype)


def shard(rank: int, kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for dtype in (torch.float32, torch.bfloat16):
        model, expected = network(dtype), prune_levels(network(dtype), GRID)
        if kind == "fully_shard":
            mesh = init_device_mesh("cpu", (2,))
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            placements = {
                "columns": [Shard(1)],
                "replicated": [Replicate()],
                "hybrid": [Replicate(), Shard(0)],
                "mixed": [Shard(0)],
            }[kind]
            mesh = init_device_mesh("cpu", (1, 2) if kind == "hybrid" else (2,))
            for index in (0, 2, 3)[: 1 if kind == "mixed" else 3]:
                sharded = distribute_tensor(model[index].weight.data, mesh, placements)
                model[index].weight = nn.Parameter(sharded)
        found = prune_levels(model, GRID)
        check_sharded(model, found, expected)


def check_sharded(model: nn.Module, found: Any, expected: Any) -> None:
    from torch.distributed.tensor import DTensor

    assert repr(found) == repr(expected)
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.thresholds, expected.thresholds)
    found.check_model(model)
    pruned = expected.prune(network(next(model.parameters()).dtype), 12).state_dict()
    for name, levels in expected.levels.items():
        parameter, own = model.get_parameter(name), found.levels[name]
        assert isinstance(own, DTensor) == isinstance(parameter, DTensor)
        assert torch.equal(found.pruned_by_layer[name], expected.pruned_by_layer[name])
        with torch.no_grad():
            parameter.masked_fill_(~found.mask(name, 12), 0)
        if isinstance(own, DTensor):
            assert own.placements == parameter.placements
            own, parameter = own.full_tensor(), parameter.full_tensor()
        assert torch.equal(own, levels)
        assert torch.equal(parameter, pruned[name])


@pytest.mark.parametrize("kind", ["fully_shard", "hybrid", "columns", "replicated", "mixed"])
def test_dtensors_of_any_placement_get_the_prune_levels_of_the_whole_model(pair, kind):
    assert pair.run(shard, kind) == [None, None]


def refuse(rank: int, kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    model = network()
    if kind == "wanda":
        prune_levels(model, GRID, criterion="wanda", group=dist.group.WORLD)
    if kind == "types":
        model.to(torch.float64 if rank else torch.float32)
        prune_levels(model, GRID, group=dist.group.WORLD)
    if kind == "meshes":
        for index, mesh in (
            (0, init_device_mesh("cpu", (2,))),
            (2, init_device_mesh("cpu", (1, 2))),
        ):
            data = distribute_tensor(model[index].weight.data, mesh, [Shard(0)] * mesh.ndim)
            model[index].weight = nn.Parameter(data)
        prune_levels(model, GRID)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if kind == "group":
        prune_levels(model, GRID, group=dist.group.WORLD)
    calibrate(model, torch.randn(100, 12), loss="cosine", **SETTINGS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("wanda", "split over ranks compete one by one and by magnitude.*'wanda'"),
        ("types", r"'0.weight' is torch.float32 on one rank and torch.float64 on another"),
        ("meshes", "several device meshes"),
        ("group", "DTensors have one: leave it out"),
        ("calibrate", "'0.weight' is sharded over ranks"),
    ],
)
def test_what_cannot_be_split_is_refused_on_all_ranks(pair, kind, message):
    for outcome in pair.run(refuse, kind):
        assert outcome.startswith("ValueError")
        assert re.search(message, outcome)


# Calibration.


def classifier() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Dropout(), nn.Linear(96, 4))
    x = torch.randn(900, 16)
    return model, (x, model.eval()(x).argmax(-1))


CASES: dict[str, dict[str, Any]] = {
    "early looks": {"loss": "disagreement"},
    "betting": {"loss": "soft_disagreement"},
    "one test": {"loss": "soft_disagreement", "looks": None},
    "groups and accept": {
        "loss": "error",
        "groups": "targets",
        "accept": confprune.confident(0.3, of="pruned"),
        "alpha": 0.3,
    },
    "two risks, two ways": {
        "risks": [Risk("disagreement", 0.2), Risk("soft_disagreement", 0.3)],
        "alpha": None,
        "scope": ["global", "layer"],
    },
    "scores from data": {"loss": "disagreement", "criterion": "wanda"},
    "expectation": {"loss": "disagreement", "guarantee": "expectation"},
    "own forward": {"loss": "disagreement", "forward": lambda m, b: m(b[0])},
    "dataset": {"loss": "disagreement", "batch_size": 50},
    "loader": {"loss": "disagreement"},
    "batches": {"loss": "soft_disagreement", "looks": None},
}


def calibrate_together(rank: int, case: str, folder: str) -> None:
    model, data = classifier()
    given: Any = data
    if case == "dataset":
        given = TensorDataset(*data)
    if case == "loader":
        given = DataLoader(TensorDataset(*data), batch_size=64, shuffle=True)
    if case == "batches":
        given = [(data[0][i : i + 90], data[1][i : i + 90]) for i in range(0, 900, 90)]
    settings = SETTINGS | CASES[case]
    files = [os.path.join(folder, f"{rank} {kind}.json") for kind in ("together", "alone")]
    calibrate(model, given, **settings, group=dist.group.WORLD).save(files[0])
    calibrate(model, given, **settings).save(files[1])
    together, alone = (Path(file).read_text() for file in files)
    assert together == alone


@pytest.mark.parametrize("case", CASES)
def test_the_certificate_is_that_of_a_single_process(pair, case, tmp_path):
    assert pair.run(calibrate_together, case, str(tmp_path)) == [None, None]
    first, second = (tmp_path / f"{rank} together.json" for rank in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    assert confprune.Certificate.load(first).certified


def share_of_examples(rank: int) -> float:
    model, data = classifier()
    seen = [0]

    def count(_: nn.Module, args: tuple[Tensor]) -> None:
        seen[-1] += len(args[0])

    model[0].register_forward_pre_hook(count)
    settings = SETTINGS | {"looks": None, "loss": "disagreement"}
    calibrate(model, data, **settings)
    seen.append(0)
    calibrate(model, data, **settings, group=dist.group.WORLD)
    return seen[1] / seen[0]


def test_each_rank_evaluates_its_share_of_the_examples(pair):
    assert all(0.3 < share < 0.7 for share in pair.run(share_of_examples))


# Failing.


def disagree(rank: int, kind: str) -> None:
    model, (x, y) = classifier()
    settings = SETTINGS | {"loss": "disagreement", "group": dist.group.WORLD}
    data: Any = (x, y)
    if kind == "model":
        model[0].weight.data += rank
    if kind == "data":
        data = (x[rank::2], y[rank::2])
    if kind == "seed":
        settings["seed"] = rank
    if kind == "iterator":
        data, settings["looks"] = iter([(x, y)]), None
    calibrate(model, data, **settings)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("model", "ValueError: the model must be the same on all ranks"),
        ("data", "ValueError: the data, whole and in one order, must be the same"),
        ("seed", "ValueError: the settings must be the same"),
        ("iterator", "ValueError: with group= the data is read more than once"),
    ],
)
def test_ranks_must_ask_the_same(pair, kind, message):
    for outcome in pair.run(disagree, kind):
        assert outcome.startswith(message)


def fail(rank: int, when: str) -> None:
    group = dist.group.WORLD
    model, (x, _) = classifier()
    if when == "NaN weight":
        if rank == 1:
            model[3].weight.data[0, 0] = torch.nan
        prune_levels(model, GRID, group=group)
    if when == "bad argument":
        calibrate(model, x, loss=("cosine", "unknown")[rank], group=group, **SETTINGS)
    if when == "loss":
        calls: list[int] = []

        def loss(outputs: Tensor, reference: confprune.Reference) -> Tensor:
            calls.append(len(outputs))
            if rank == 1 and len(calls) > 10:  # well after the checks
                raise OSError("the disk is full")
            return torch.zeros(len(outputs))

        calibrate(model, x, loss=Loss("own", loss), looks=None, group=group, **SETTINGS)
    if when == "end":
        with Ranks(group).together():
            if rank == 1:
                raise KeyError("late")


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ("NaN weight", "ValueError: parameter '3.weight' holds NaN"),
        ("bad argument", "ValueError: unknown loss 'unknown'"),
        ("loss", "OSError: the disk is full"),
        ("end", "KeyError: 'late'"),
    ],
)
def test_a_rank_that_fails_stops_the_other_with_its_reason(pair, when, reason):
    other, failed = pair.run(fail, when)
    assert failed.startswith(reason)
    assert other.startswith(f"RankError: rank 1 failed: {reason}")
    assert pair.run(select_some_tensors) == [None, None]  # and the group can go on


def be_late(rank: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=1))
    if rank == 0:
        prune_levels(network(), GRID, group=group)


def test_a_rank_that_does_not_come_is_not_waited_for(pair):
    waiting, absent = pair.run(be_late)
    assert absent is None
    assert waiting.startswith("RankError: rank 0 lost the others")
    assert "within the timeout" in waiting


def not_a_member(rank: int) -> None:
    group = dist.new_group([0])
    if rank == 1:
        Ranks(group)


@pytest.mark.parametrize("group", [3, "gloo", True])
def test_a_group_is_a_process_group(group):
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup, .* got"):
        Ranks(group)


def test_a_group_that_has_been_left_is_told():
    with pytest.raises(ValueError, match=r"there is none: call init_process_group\(\) before"):
        Ranks(dist.ProcessGroup(0, 1))


def test_only_members_of_a_group_may_call(pair):
    assert pair.run(not_a_member)[1].startswith("ValueError: this process is no member of group")


def run_example(rank: int) -> None:
    example = Path(__file__).parent.parent / "examples" / "distributed.py"
    runpy.run_path(str(example))["main"]()


def test_the_example_runs(pair):
    assert pair.run(run_example) == [None, None]


def die(rank: int) -> None:
    if rank == 1:
        os._exit(1)
    prune_levels(network(), GRID, group=dist.group.WORLD)


def test_a_rank_that_dies_does_not_leave_the_other_hanging(pair):  # the last: the pair is gone
    waiting, dead = pair.run(die)
    assert dead is None
    assert waiting.startswith("RankError: rank 0 lost the others")


def test_one_process_needs_no_group():
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.objects("x") == ["x"]
    assert [a.tolist() for a in ranks.around(np.array([1, 2]))] == [[0, 0], [0, 0]]
    ranks.meet()
    with pytest.raises(KeyError), ranks.together():
        raise KeyError("as it is")


def test_what_stands_before_a_rank_and_after_it(monkeypatch):
    ranks = Ranks()
    ranks.rank, ranks.size = 1, 3
    monkeypatch.setattr(ranks, "_gather", lambda own: [own + 5, own, own + 7])
    assert [a.tolist() for a in ranks.around(np.array([1, 2]))] == [[6, 7], [8, 9]]
