"""Calibration data in every form people have it."""

from __future__ import annotations

from collections import OrderedDict, UserList
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import confprune
from confprune.batches import (
    Reordered,
    batch_length,
    batches,
    check_data,
    check_independent,
    describe,
    example_count,
    move_batch,
    order_length,
    permutable,
    slice_batch,
    take,
    tensors_of,
)
from confprune.calling import targets_of

X = torch.arange(14.0).reshape(7, 2)
Y = torch.arange(7)
TWICE = TensorDataset(X)


class Dictionaries(Dataset):
    """Examples as Hugging Face has them."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": X[index], "labels": Y[index]}


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


DATA: dict[str, Any] = {
    "tensor": lambda: X,
    "tuple": lambda: (X, Y),
    "mapping": lambda: {"input_ids": X, "labels": Y},
    "ordered mapping": lambda: OrderedDict(input_ids=X, labels=Y),
    "named tuple": lambda: Pair(X, Y),
    "dataset": lambda: TensorDataset(X, Y),
    "dataset of inputs": lambda: TensorDataset(X),
    "dataset of dictionaries": Dictionaries,
    "subset": lambda: Subset(TensorDataset(X, Y), range(7)),
    "list as dataset": lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "stream": Stream,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=3),
    "loader by a batch sampler": lambda: DataLoader(
        TensorDataset(X, Y), batch_sampler=BatchSampler(SequentialSampler(X), 3, drop_last=False)
    ),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=3),
    "list": lambda: [X[:3], X[3:]],
    "tuple of batches": lambda: ((X[:3], Y[:3]), (X[3:], Y[3:])),
    "generator": lambda: (X[i : i + 2] for i in range(0, 7, 2)),
    "named batches": lambda: [Pair(X[:3], Y[:3]), Pair(X[3:], Y[3:])],
    "nested inputs": lambda: [(((X[:5], X[:5] + 1)), Y[:5]), ((X[5:], X[5:] + 1), Y[5:])],
}


def inputs_of(batch: Any) -> Tensor:
    if isinstance(batch, dict):
        return batch["input_ids"]
    while not isinstance(batch, Tensor):
        batch = batch[0]
    return batch


@pytest.mark.parametrize("kind", DATA)
def test_every_example_comes_once_and_in_order(kind):
    found = list(batches(DATA[kind]()))
    assert torch.equal(torch.cat([inputs_of(batch) for batch in found]), X)
    labels = [targets_of(batch) for batch in found]
    if labels[0] is not None:
        assert torch.equal(torch.cat(labels), Y)
    assert sum(batch_length(batch) for batch in found) == 7


@pytest.mark.parametrize("kind", [k for k in DATA if k not in ("stream", "generator", "loader of a stream")])  # fmt: skip # noqa: E501
def test_the_number_of_examples_is_known_before_they_are_read(kind):
    assert example_count(DATA[kind]()) == 7


@pytest.mark.parametrize("kind", ["stream", "generator", "loader of a stream"])
def test_the_number_of_examples_of_a_stream_is_not_known(kind):
    assert example_count(DATA[kind]()) is None


def test_the_number_of_examples_of_a_loader_is_that_of_its_sampler():
    dataset = TensorDataset(X, Y)
    assert example_count(DataLoader(dataset, batch_size=2, drop_last=True)) == 6
    weighted = WeightedRandomSampler(torch.ones(7), 4)
    assert example_count(DataLoader(dataset, batch_size=2, sampler=weighted)) == 4
    part = SubsetRandomSampler([4, 0, 2])
    for drop_last, count in [(False, 3), (True, 2)]:
        by_batches = BatchSampler(part, 2, drop_last=drop_last)
        loader = DataLoader(dataset, batch_sampler=by_batches)
        assert example_count(loader) == count
        assert sum(batch_length(batch) for batch in batches(loader)) == count
    loader = DataLoader(dataset, batch_sampler=[[0, 1], [2, 3]])
    assert example_count(loader) is None
    assert len(list(batches(loader))) == 2


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping", "dataset", "stream", "subset"])
def test_data_that_is_not_in_batches_is_cut_into_some(kind):
    sizes = [batch_length(batch) for batch in batches(DATA[kind](), batch_size=3)]
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("kind", ["loader", "list", "generator", "tuple of batches"])
def test_a_batch_size_for_data_in_batches_is_refused(kind):
    with pytest.raises(ValueError, match=r"batch_size=3 was given, .* in batches already; leave"):
        list(batches(DATA[kind](), batch_size=3))


def test_a_batch_size_may_come_from_numpy():
    for data in (X, TensorDataset(X)):
        sizes = [batch_length(batch) for batch in batches(data, batch_size=np.int64(4))]
        assert sizes == [4, 3]


@pytest.mark.parametrize("batch_size", [0, True, -1, 2.5, "3"])
def test_a_batch_size_is_a_positive_integer(batch_size):
    with pytest.raises(ValueError, match=f"positive integer, got {batch_size!r}"):
        check_data(X, batch_size)


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(0, 3),
        (torch.zeros(0, 3), torch.zeros(0)),
        TensorDataset(torch.zeros(0, 3)),
        DataLoader(TensorDataset(torch.zeros(0, 3))),
        [],
        (),
        {},
        [torch.zeros(0, 3)],
        iter([]),
        iter([torch.zeros(0, 3)]),
    ],
    ids=lambda data: type(data).__name__,
)
def test_empty_data_is_refused(data):
    with pytest.raises(ValueError, match="data is empty"):
        list(batches(data))


def test_empty_batches_among_others_are_left_out():
    assert [len(x) for x in batches([X[:3], X[:0], X[3:]])] == [3, 4]


@pytest.mark.parametrize("data", [None, 5, "data.csv", b"data", nn.Linear(2, 2), len])
def test_what_is_no_data_is_refused(data):
    with pytest.raises(TypeError, match=f"data must be a Dataset, .* got {type(data).__name__}"):
        list(batches(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y[:5]), r"as many rows; got \(a tensor of shape \[7, 2\], a tensor of shape \[5\]\)"),
        ({"a": X, "b": Y[:5]}, r"got \{a: a tensor of shape \[7, 2\], b: a tensor"),
        (torch.tensor(3.0), r"got a tensor of shape \[\]"),
        ([(X, Y[:5])], "as many rows"),
        ([1, 2, 3], "got a int"),
        (iter(["text"]), "got a str"),
        (np.zeros((3, 2)), "got a ndarray: make it tensors with torch.from_numpy"),
        ([(X[0], torch.tensor(1))], r"single examples become batches in a DataLoader\(data"),
    ],
)
def test_batches_without_a_common_length_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        list(batches(data))


def test_a_batch_is_cut_in_its_own_structure():
    names = [f"{i}.png" for i in range(7)]
    batch = {"images": (X, X + 1), "labels": Y, "names": names, "constant": 3}
    part = slice_batch(batch, 2, 5)
    assert torch.equal(part["images"][1], X[2:5] + 1)
    assert part["names"] == ["2.png", "3.png", "4.png"]
    assert part["constant"] == 3
    named = slice_batch(Pair(X, Y), 1, 3)
    assert isinstance(named, Pair)
    assert torch.equal(named.label, Y[1:3])
    assert isinstance(slice_batch([X, Y], 1, 3), list)


def test_examples_are_taken_in_any_order():
    index = torch.tensor([3, 0, 6])
    for batch in [X, (X, Y), {"x": X, "y": (Y, [X])}, Pair(X, Y)]:
        assert (
            torch.equal(inputs_of(take({"input_ids": batch}, index)["input_ids"]), X[index])
            if (isinstance(batch, Tensor))
            else type(take(batch, index)) is type(batch)
        )
    assert torch.equal(take(Pair(X, Y), index).label, index)


def test_a_reordered_batch_is_gathered_as_it_is_sliced():
    order = torch.tensor([3, 0, 6, 2])
    for data in [X, (X, Y), {"x": X, "y": Y}, Pair(X, Y)]:
        [batch] = batches(data, order=order, gather=Reordered)
        assert isinstance(batch, Reordered)
        assert batch_length(batch) == 4
        part, expected = slice_batch(batch, 1, 3), take(data, order[1:3])
        assert type(part) is type(data)
        assert all(map(torch.equal, tensors_of(part), tensors_of(expected)))
        # Where it is, only the order has to move; what goes elsewhere is gathered first.
        there = move_batch(batch, torch.device("cpu"))
        assert there.data is batch.data
        assert there.order is batch.order
        moved = move_batch(batch, torch.device("meta"))
        assert type(moved) is type(data)
        assert all(tensor.is_meta and len(tensor) == 4 for tensor in tensors_of(moved))


def test_data_whose_order_others_know_is_gathered_by_them():
    data = Dictionaries()
    [batch] = batches(data, order=torch.tensor([3, 0]), gather=Reordered)
    assert not isinstance(batch, Reordered)


def test_a_batch_is_moved_in_its_own_structure():
    batch = {"x": (X, [Y]), "names": "text"}
    moved = move_batch(batch, torch.device("meta"))
    assert moved["x"][0].is_meta
    assert moved["x"][1][0].is_meta
    assert moved["names"] == "text"
    assert isinstance(move_batch(Pair(X, Y), torch.device("meta")), Pair)


@pytest.mark.parametrize(
    "kind",
    [
        "tensor",
        "tuple",
        "mapping",
        "named tuple",
        "dataset",
        "subset",
        "loader",
        "loader by a batch sampler",
    ],
)
def test_data_that_can_be_permuted_comes_in_the_order_asked_for(kind):
    data = DATA[kind]()
    assert permutable(data)
    assert order_length(data) == 7
    order = torch.randperm(7)
    found = torch.cat([inputs_of(batch) for batch in batches(data, order=order)])
    assert torch.equal(found, X[order])


def test_a_part_of_the_data_may_be_asked_for():
    for data in (X, TensorDataset(X), DataLoader(TensorDataset(X), batch_size=2)):
        found = torch.cat([inputs_of(b) for b in batches(data, order=torch.tensor([5, 1, 2]))])
        assert torch.equal(found, X[[5, 1, 2]])


@pytest.mark.parametrize("kind", ["list", "generator", "stream", "loader of a stream"])
def test_streams_cannot_be_permuted(kind):
    assert not permutable(DATA[kind]())


def test_a_loader_is_permuted_only_where_it_visits_every_example_once():
    dataset = TensorDataset(X, Y)
    assert permutable(DataLoader(dataset, shuffle=True))
    for sampler in (
        RandomSampler(dataset, replacement=True),
        RandomSampler(dataset, num_samples=3),
        WeightedRandomSampler(torch.ones(7), 7),
    ):
        assert not permutable(DataLoader(dataset, sampler=sampler))
    own = BatchSampler(SequentialSampler(dataset), 2, drop_last=False)
    assert permutable(DataLoader(dataset, batch_sampler=own))
    assert not permutable(DataLoader(dataset, batch_sampler=[[0, 1], [2, 3]]))
    part = BatchSampler(SubsetRandomSampler([0, 2, 4]), 2, drop_last=False)
    assert not permutable(DataLoader(dataset, batch_sampler=part))


@pytest.mark.parametrize(
    ("sampler", "why"),
    [
        (RandomSampler(X, replacement=True), r"RandomSampler\(replacement=True\) gives the same"),
        (RandomSampler(X, num_samples=50), r"RandomSampler\(num_samples=50\) repeats 7 examples"),
        (WeightedRandomSampler(torch.ones(7), 7), "WeightedRandomSampler prefers some"),
        (WeightedRandomSampler(torch.ones(7), 4, replacement=False), "WeightedRandomSampler"),
    ],
)
@pytest.mark.parametrize("by", ["sampler", "batch_sampler"])
def test_samplers_that_repeat_or_prefer_examples_do_not_calibrate(sampler, why, by):
    given = sampler if by == "sampler" else BatchSampler(sampler, 2, drop_last=False)
    loader = DataLoader(TensorDataset(X), **{by: given})
    model = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=f"data must be independent .*{why}.* that takes each example once"
    ):
        confprune.calibrate(
            model, loader, loss="disagreement", alpha=0.5, delta=0.5, progress=False
        )
    with pytest.raises(ValueError, match=why):
        confprune.loss_matrix(model, loader, confprune.prune_levels(model, [0.5]), "disagreement")


@pytest.mark.parametrize("sampler", [RandomSampler(X, num_samples=3), SubsetRandomSampler([1, 5])])
def test_samplers_of_a_part_of_the_examples_are_taken(sampler):
    check_independent(DataLoader(TensorDataset(X), sampler=sampler))


@pytest.mark.parametrize(
    "data",
    [
        Subset(TensorDataset(X), [0, 1, 1, 5]),
        Subset(TensorDataset(X), torch.tensor([0, 1, -6, 5])),
        Subset(Subset(TensorDataset(X), [3, 3, 4]), [0, 1]),
        DataLoader(Subset(TensorDataset(X), [0, 1, 1, 5]), batch_size=2),
        DataLoader(Subset(TensorDataset(X), [3, 3, 4]), sampler=range(2)),
        DataLoader(TensorDataset(X), sampler=[0, 2, 2]),
        DataLoader(TensorDataset(X), sampler=SubsetRandomSampler([0, 2, -5])),
        DataLoader(TensorDataset(X), batch_sampler=[[0, 1], [1, 2]]),
        DataLoader(X, sampler=np.array([4, 4])),
        ConcatDataset([TWICE, TWICE]),
        ConcatDataset([Subset(TWICE, [0, 1, 2]), Subset(TWICE, [2, 3])]),
        Subset(ConcatDataset([TWICE, TensorDataset(Y), TWICE]), [1, 8, -6]),
        DataLoader(ConcatDataset([TWICE, ConcatDataset([TensorDataset(Y), TWICE])]), batch_size=2),
        DataLoader(ConcatDataset([TWICE, TWICE]), shuffle=True),
    ],
)
def test_indices_that_repeat_examples_do_not_calibrate(data):
    with pytest.raises(ValueError, match=r"indices repeat examples: .*takes each example once"):
        check_independent(data)
    with pytest.raises(ValueError, match="indices repeat examples"):
        confprune.calibrate(nn.Linear(2, 2), data, loss="disagreement", alpha=0.5, delta=0.5)


class OwnIndices(UserList):
    """A sequence that nobody knows."""


class OwnSampler(Sampler):
    def __iter__(self):
        return iter([0, 0])

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    "data",
    [
        Subset(TensorDataset(X), [4, 0, 1]),
        Subset(Subset(TensorDataset(X), [3, 3, 4]), [0, 2]),
        Subset({"a": X[0], "b": X[1]}, ["a", "a"]),
        DataLoader(TensorDataset(X), sampler=[0, 2, 6]),
        DataLoader(Subset(TensorDataset(X), range(1, 7)), batch_sampler=[[0, 1], [2]]),
        DataLoader(TensorDataset(X), sampler=OwnSampler()),
        DataLoader(Stream()),
        ConcatDataset([TWICE, TensorDataset(X)]),
        ConcatDataset([Subset(TWICE, [0, 1, 2]), Subset(TWICE, [3, 4])]),
        Subset(ConcatDataset([TWICE, TWICE]), [0, 8, -2]),
        ConcatDataset([Subset(TWICE, []), TWICE]),
        ConcatDataset([Subset(TWICE, OwnIndices([0, 1])), Subset(TWICE, OwnIndices([2]))]),
        DataLoader(ConcatDataset([TWICE, TWICE]), sampler=OwnSampler()),
    ],
)
def test_indices_that_take_each_example_once_or_cannot_be_read_are_taken(data):
    check_independent(data)


def test_batches_are_described_in_words():
    assert describe({"x": (X, [Y]), "n": 3}) == (
        "{x: (a tensor of shape [7, 2], (a tensor of shape [7])), n: a int}"
    )
