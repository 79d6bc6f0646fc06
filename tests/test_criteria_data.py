"""Scores that are made from data: measured rightly, and never on what calibrates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)
from transformers.pytorch_utils import Conv1D

import confprune
from confprune import Certificate, criteria, input_norms
from confprune.batches import ordering_size, random_order
from confprune.overlap import overlap
from confprune.scoring import score_size

QUIET = {"progress": False}
PROMISE = {"loss": "disagreement", "alpha": 0.1, "delta": 0.1, "progress": False}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))


class Recorded(Dataset):
    """A dataset that notes which examples were asked for."""

    def __init__(self, size: int) -> None:
        self.inputs = torch.randn(size, 6)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return self.inputs[index]


# The norms.


def rms(patches: Tensor) -> Tensor:
    """Root mean square over all dimensions but the last."""
    return patches.double().square().flatten(0, -2).mean(0).sqrt()


def test_norms_of_a_linear_layer_are_over_examples_and_positions():
    layer, x = nn.Linear(6, 4), torch.randn(50, 7, 6)
    found = input_norms(layer, x, batch_size=13, **QUIET)["weight"]
    assert found.shape == (1, 6)
    torch.testing.assert_close(found[0].double(), rms(x), rtol=1e-6, atol=0)


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "rectangular": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "same": nn.Conv2d(4, 6, 4, padding="same"),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_norms_of_a_convolution_are_those_of_its_patches(kind):
    layer = CONVOLUTIONS[kind]
    x = torch.randn(5, 4, 9, 8)
    found = input_norms(layer, x, batch_size=2, **QUIET)["weight"]
    padded = x
    if kind == "circular":
        padded = F.pad(x, (1, 1, 1, 1), mode="circular")
    elif kind == "same":
        padded = F.pad(x, (1, 2, 1, 2))
    elif kind != "valid":
        padded = F.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)
    by_group = rms(patches.transpose(1, 2)).view(layer.groups, -1, *layer.kernel_size)
    expected = by_group.repeat_interleave(layer.out_channels // layer.groups, 0)
    torch.testing.assert_close(found.double().expand(layer.weight.shape), expected)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_norms_of_convolutions_in_one_and_three_dimensions(dimensions):
    layer = (nn.Conv1d if dimensions == 1 else nn.Conv3d)(2, 3, 2)
    x = torch.randn(4, 2, *[5] * dimensions)
    found = input_norms(layer, x, **QUIET)["weight"]
    for place in ((0,) * dimensions, (1,) * dimensions):
        part = x[(slice(None), slice(None), *(slice(p, p + 4) for p in place))]
        expected = part.transpose(0, 1).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(found[(0, slice(None), *place)], expected)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose1d(4, 6, 3), nn.ConvTranspose2d(4, 6, 2), nn.ConvTranspose3d(4, 6, 2)]
)
def test_norms_of_a_transposed_convolution_are_by_channel(layer):
    x = torch.randn(3, 4, *[5] * (layer.weight.ndim - 2))
    found = input_norms(layer, x, **QUIET)["weight"]
    assert found.shape == (4, *[1] * (layer.weight.ndim - 1))
    torch.testing.assert_close(found.flatten().double(), rms(x.movedim(1, -1)), rtol=1e-6, atol=0)


def test_norms_of_transformers_are_met_inside_attention_and_gpt2():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1), torch.randn(3, 5, 8)
    found = input_norms(model, x, parameters=lambda name, p: p.ndim == 2, **QUIET)
    torch.testing.assert_close(
        found["layers.0.self_attn.in_proj_weight"][0].double(), rms(x), rtol=1e-6, atol=0
    )
    assert found["layers.0.linear2.weight"].shape == (1, 16)
    gpt2 = Conv1D(6, 8)
    found = input_norms(gpt2, x, **QUIET)["weight"]
    torch.testing.assert_close(found[:, 0].double(), rms(x), rtol=1e-6, atol=0)


def test_norms_of_a_tied_weight_are_over_all_its_uses():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(40, 6)
    both = torch.cat([x, model[0](x).relu()]).detach()
    found = input_norms(model, x, **QUIET)
    torch.testing.assert_close(found["0.weight"][0].double(), rms(both), rtol=1e-6, atol=0)


def test_measuring_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(30, 6)
    first, second = input_norms(model, x, **QUIET), input_norms(model, x, **QUIET)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_whose_inputs_are_not_seen_are_named():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2))
    with pytest.raises(
        ValueError, match=r"inputs of parameter '0.weight' were not met.*parameters="
    ):
        input_norms(model, torch.arange(9), parameters=["0.weight", "1.weight"], **QUIET)
    assert list(input_norms(model, torch.arange(9), **QUIET)) == ["1.weight"]


# The split.


def test_no_example_both_scores_and_calibrates(one_thread):
    data = Recorded(900)
    seen: list[list[int]] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(data.asked.copy())
        data.asked.clear()
        return model(batch)

    certificate = confprune.calibrate(
        network(), data, criterion="wanda", forward=forward, looks=None, seed=7, **PROMISE
    )
    size = score_size(900)
    scoring, calibrating = seen[0], [index for part in seen[1:] for index in part]
    assert scoring == random_order(data, 7)[:size].tolist()
    assert sorted(scoring + calibrating) == list(range(900))
    assert certificate.n == 900 - size
    assert certificate.pruning.score_data == confprune.certificate.ScoreData("split", size)
    text = " ".join(str(certificate).split())
    assert f"made with {size} other examples, set aside from the data; none of them cal" in text
    assert "criterion wanda" in text


def test_the_norms_are_those_of_the_examples_set_aside(one_thread):
    model, x = network(), torch.randn(600, 6)
    certificate = confprune.calibrate(model, x, criterion="wanda", seed=3, **PROMISE)
    order = random_order(x, 3)[: score_size(600)]
    expected = input_norms(model, x[order], **QUIET)
    found = certificate.statistics["input_norm"]
    assert list(found) == list(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_with_several_candidates_scores_order_and_test_are_all_apart(one_thread):
    data = Recorded(1000)
    certificate = confprune.calibrate(
        network(), data, criterion=["magnitude", "wanda", "random"], looks=None, **PROMISE
    )
    size = score_size(1000)
    assert certificate.n == 1000 - size - ordering_size(1000 - size)
    assert len(data.asked) == len(set(data.asked)) == 1000
    assert certificate.pruning.score_data.taken == size
    assert (certificate.pruning.criterion == "wanda") == bool(certificate.pruning.statistics)


@pytest.mark.parametrize("settings", [{}, {"looks": None}])
def test_a_chosen_criterion_without_data_is_verified_on_what_calibrated(settings, one_thread):
    model, x = network(), torch.randn(1500, 6)
    certificate = confprune.calibrate(
        model, x, criterion=["lamp", "wanda"], scope="row", **PROMISE, **settings
    )
    plain = confprune.calibrate(
        model, x, criterion=["random", "wanda"], scope="global", **PROMISE, **settings
    )
    for found in (certificate, plain):
        found.verify(model, x, **QUIET)
        text = " ".join(str(found).split())
        whose = "Their scores" if found.pruning.statistics else "The scores of another candidate"
        assert f"{whose} were made with 150 other examples" in text
    chosen = {bool(found.pruning.statistics) for found in (certificate, plain)}
    assert False in chosen


@pytest.mark.parametrize("settings", [{}, {"looks": None}, {"groups": "targets"}])
def test_the_certificate_verifies_on_the_examples_that_calibrated(settings, one_thread, tmp_path):
    model = network()
    data = (torch.randn(1200, 6), torch.randint(0, 2, (1200,)))
    certificate = confprune.calibrate(model, data, criterion="wanda", **PROMISE, **settings)
    assert certificate.certified
    groups = settings.get("groups")
    certificate.verify(model, data, groups=groups, **QUIET)
    certificate.save(tmp_path / "certificate.json")
    loaded = Certificate.load(tmp_path / "certificate.json")
    assert loaded == certificate
    loaded.verify(model, data, groups=groups, statistics=certificate.statistics, **QUIET)


def test_too_few_examples_are_counted_without_those_set_aside():
    with pytest.raises(ValueError, match="20 examples cannot certify"):
        confprune.calibrate(network(), torch.randn(22, 6), criterion="wanda", **PROMISE)


def test_planned_looks_end_at_the_examples_that_are_left(one_thread):
    data = torch.randn(500, 6)
    plan = confprune.risk.looks.default_looks(450, 0.1, 0.1)
    certificate = confprune.calibrate(network(), data, criterion="wanda", looks=plan, **PROMISE)
    assert certificate.n == 450
    with pytest.raises(ValueError, match="500"):
        confprune.calibrate(
            network(),
            data,
            criterion="wanda",
            looks=confprune.risk.looks.default_looks(500, 0.1, 0.1),
            **PROMISE,
        )


@pytest.mark.parametrize("settings", [{"pattern": "N:2"}, {"guarantee": "expectation"}])
def test_scores_from_data_go_with_patterns_and_other_guarantees(settings, one_thread):
    model, x = network(), torch.randn(900, 6)
    promise = PROMISE | {"alpha": 0.3}
    if "guarantee" in settings:
        del promise["delta"]
    certificate = confprune.calibrate(model, x, criterion="wanda", **promise, **settings)
    assert certificate.certified
    assert certificate.n == 900 - score_size(900)
    certificate.verify(model, x, **QUIET)


# Data of its own for the scores.


def test_scores_may_have_a_set_of_their_own(one_thread, tmp_path):
    model, x = network(), torch.randn(700, 6)
    loader = DataLoader(TensorDataset(x[500:]), batch_size=64)
    certificate = confprune.calibrate(
        model, x[:500], criterion="wanda", score_data=loader, batch_size=100, **PROMISE
    )
    assert certificate.n == 500
    assert certificate.pruning.score_data == confprune.certificate.ScoreData("given", 200)
    expected = input_norms(model, x[500:], **QUIET)
    for name, norm in certificate.statistics["input_norm"].items():
        torch.testing.assert_close(norm, expected[name])
    certificate.verify(model, x[:500], **QUIET)


def test_a_stream_can_score(one_thread):
    stream = (torch.randn(10, 6) for _ in range(5))
    batches = [torch.randn(50, 6) for _ in range(8)]
    certificate = confprune.calibrate(
        network(), batches, criterion="wanda", score_data=stream, **PROMISE
    )
    assert certificate.pruning.score_data == confprune.certificate.ScoreData("given", None)
    assert "made with others, given for that" in " ".join(str(certificate).split())


def test_data_that_cannot_be_split_needs_a_set_of_its_own():
    batches = [torch.randn(50, 6) for _ in range(8)]
    with pytest.raises(ValueError, match=r"'wanda' makes its scores .* give score_data="):
        confprune.calibrate(network(), batches, criterion="wanda", **PROMISE)


def shared(kind: str) -> tuple[object, object]:
    x = torch.randn(200, 6)
    data = TensorDataset(x)
    left, right = random_split(data, [150, 50])
    return {
        "itself": (x, x),
        "a view": (x, x[150:]),
        "rows of one tensor": (x[:160], x[150:]),
        "one of several tensors": ((x, torch.zeros(200)), x[10:20]),
        "the dataset of a loader": (data, DataLoader(data, batch_size=9)),
        "a subset": (data, right),
        "subsets that meet": (Subset(data, range(160)), Subset(data, range(150, 200))),
        "subsets of subsets": (left, Subset(Subset(left, range(10, 60)), [0])),
        "a dataset and its tensor": (data, x[:3]),
        "a list of its batches": (x, [x[:50], x[50:70]]),
        "one mapping": ({"x": x}, {"x": x[5:9]}),
        "every other row and the next": (x[::2], x[2:4]),
    }[kind]


@pytest.mark.parametrize("kind", ["itself", "a view", "rows of one tensor",
    "one of several tensors", "the dataset of a loader", "a subset", "subsets that meet",
    "subsets of subsets", "a dataset and its tensor", "a list of its batches", "one mapping",
    "every other row and the next"])  # fmt: skip
def test_score_data_that_shares_examples_is_refused(kind):
    data, score_data = shared(kind)
    assert overlap(data, score_data)
    assert overlap(score_data, data)
    with pytest.raises(ValueError, match="score_data shares examples with data"):
        confprune.calibrate(network(), data, criterion="wanda", score_data=score_data, **PROMISE)


def test_disjoint_parts_of_one_set_are_not_confused():
    x = torch.randn(200, 6)
    data = TensorDataset(x)
    left, right = random_split(data, [150, 50])
    assert not overlap(left, right)
    assert not overlap(Subset(left, range(10)), Subset(left, range(10, 20)))
    halves = [DataLoader(left, sampler=SubsetRandomSampler(part)) for part in ([0, 2], [1, 3])]
    assert not overlap(*halves)
    assert overlap(halves[0], Subset(left, [2]))
    both = ConcatDataset([TensorDataset(x + 1), left])
    assert overlap(both, data)
    assert overlap(Subset(both, [200]), Subset(left, [0]))
    assert not overlap(Subset(both, [0, 201]), Subset(left, [0]))
    assert not overlap(x[:100], x[100:])
    assert not overlap(x[::2], x[1::2])
    assert not overlap(data, TensorDataset(torch.randn(200, 6)))
    assert not overlap(x[:0], x)
    assert not overlap(Subset([1, 2, 3], [0]), Subset([1, 2, 3], [0]))  # not known to be one
    assert not overlap(iter([x]), iter([x]))


def test_what_is_needed_by_nothing_is_refused():
    x = torch.randn(200, 6)
    with pytest.raises(ValueError, match="score_data is needed by none of the criteria"):
        confprune.calibrate(network(), x, score_data=torch.randn(9, 6), **PROMISE)
    with pytest.raises(ValueError, match="'deviation' is needed by none of the criteria"):
        confprune.calibrate(network(), x, statistics={"deviation": {}}, **PROMISE)
    with pytest.raises(ValueError, match=r"'input_norm' is measured on data.*score_data="):
        confprune.calibrate(
            network(), x, criterion="wanda", statistics={"input_norm": {}}, **PROMISE
        )


# Statistics and the certificate.


def trained() -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with criteria.WeightObserver(model, optimizer) as observer:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()
    return model, {"deviation": observer.deviations()}


def test_a_certificate_from_a_file_asks_for_its_statistics(tmp_path, one_thread):
    model, statistics = trained()
    data = torch.randn(400, 6)
    certificate = confprune.calibrate(
        model, data, criterion="magnitude_uncertainty", statistics=statistics, **PROMISE
    )
    sparse = certificate.prune(model)
    certificate.save(tmp_path / "certificate.json")
    assert (tmp_path / "certificate.json").stat().st_size < 50_000  # fingerprints only
    loaded = Certificate.load(tmp_path / "certificate.json")
    assert loaded == certificate
    assert loaded.statistics == {}
    with pytest.raises(ValueError, match=r"statistics \(deviation\), .* pass statistics="):
        loaded.prune(model)
    torch.save(certificate.statistics, tmp_path / "statistics.pt")
    again = loaded.prune(model, statistics=torch.load(tmp_path / "statistics.pt"))
    assert torch.equal(again[0].weight, sparse[0].weight)
    other = {"deviation": {n: 2 * t for n, t in statistics["deviation"].items()}}
    with pytest.raises(
        ValueError, match=r"another statistic 'deviation': the values of .*'0.weight"
    ):
        loaded.prune(model, statistics=other)
    with pytest.raises(ValueError, match=r"another statistic 'deviation': .*'0.weight' is missing"):
        loaded.prune(model, statistics={})


def test_an_older_file_without_the_new_fields_is_read(tmp_path, one_thread):
    import json

    model = network()
    certificate = confprune.calibrate(model, torch.randn(400, 6), **PROMISE)
    path = tmp_path / "certificate.json"
    certificate.save(path)
    content = json.loads(path.read_text())
    for name in ("pattern", "inputs_first", "statistics", "score_data"):
        del content["pruning"][name]
    path.write_text(json.dumps(content))
    assert Certificate.load(path) == certificate


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "guess", "examples": 3}, "source is 'guess', not one of"),
        ({"source": "split", "examples": None}, "a split has a number of examples"),
        ({"source": "given", "examples": 0}, "examples is 0, fewer than one"),
    ],
)
def test_score_data_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        confprune.certificate.ScoreData(**fields)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (9, 1), (100, 10), (2560, 256), (10**6, 256)])
def test_a_tenth_scores_but_not_more_than_is_of_use(n, size):
    assert score_size(n) == size
    assert math.isclose(size, min(max(1, n // 10), 256))
