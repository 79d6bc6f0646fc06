"""The drop-in for torch.nn.utils.prune does what torch does, side by side."""

import copy
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as theirs

import confprune.nn.utils.prune as ours

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _however_few(monkeypatch):
    """The networks here are small, for which it would leave the work to torch."""
    monkeypatch.setattr(ours, "_FEW", 0)


BOTH = pytest.mark.parametrize("prune", [ours, theirs], ids=["confprune", "torch"])


def distinct(count, dtype=torch.float32):
    """Values of distinct magnitudes in any order, exact in every type."""
    return (torch.randperm(count) + 1).to(dtype) * (2 * torch.randint(2, (count,)) - 1)


def network(dtype=torch.float32, seed=0):
    """Two layers whose weights all differ in magnitude."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(7, 5)).to(dtype)
    values = distinct(24 + 35, dtype)
    with torch.no_grad():
        net[0].weight.copy_(values[:24].view(3, 2, 2, 2))
        net[2].weight.copy_(values[24:].view(5, 7))
    return net


def weights(net):
    return [(net[0], "weight"), (net[2], "weight")]


def assert_same(a, b):
    """The same parameters, buffers, masks, values and hooks."""
    assert a.state_dict().keys() == b.state_dict().keys()
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x, y), name
    assert [n for n, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]
    assert [n for n, _ in a.named_buffers()] == [n for n, _ in b.named_buffers()]
    for left, right in zip(a.modules(), b.modules(), strict=True):
        hooks = [list(module._forward_pre_hooks.values()) for module in (left, right)]
        assert len(hooks[0]) == len(hooks[1])
        for hook, other in zip(*hooks, strict=True):
            assert isinstance(hook, type(other))
            assert len(getattr(hook, "_pruning_methods", ())) == len(
                getattr(other, "_pruning_methods", ())
            )


AMOUNTS = [0, 1, 13, 35, 0.0, 0.2, 0.5, 0.99, 1.0]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_global_unstructured(amount, dtype):
    nets = []
    for prune in (ours, theirs):
        net = network(dtype)
        result = prune.global_unstructured(
            weights(net), pruning_method=prune.L1Unstructured, amount=amount
        )
        assert result is None
        assert prune.is_pruned(net)
        nets.append(net)
    assert_same(*nets)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_l1_unstructured(amount, dtype):
    nets = []
    for prune in (ours, theirs):
        net = network(dtype)
        assert prune.l1_unstructured(net[2], "weight", amount) is net[2]
        nets.append(net)
    assert_same(*nets)


@hypothesis.given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["global", "l1", "bias", "random", "remove"]),
            st.one_of(st.integers(0, 5), st.floats(0, 0.6)),
        ),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 9),
)
def test_repeated_pruning_accumulates(steps, seed):
    nets = []
    for prune in (ours, theirs):
        net = network(seed=seed)
        for step, amount in steps:
            torch.manual_seed(seed)
            if step == "global":
                prune.global_unstructured(weights(net), prune.L1Unstructured, amount=amount)
            elif step == "l1":
                prune.l1_unstructured(net[2], "weight", amount=amount)
            elif step == "bias":
                prune.l1_unstructured(net[2], name="bias", amount=0.2)
            elif step == "random":
                prune.random_unstructured(net[0], "weight", amount)
            elif prune.is_pruned(net[0]):
                prune.remove(net[0], "weight")
        nets.append(net)
    assert_same(*nets)
    x = torch.randn(1, 2, 2, 2)
    assert torch.equal(nets[0][0](x), nets[1][0](x))


def test_importance_scores_decide_in_place_of_the_weights():
    nets = []
    scores = [distinct(24).view(3, 2, 2, 2), distinct(35).view(5, 7) * 100]
    for prune in (ours, theirs):
        net = network()
        importance = {(net[0], "weight"): scores[0], (net[2], "weight"): scores[1]}
        prune.global_unstructured(weights(net), prune.L1Unstructured, importance, amount=15)
        prune.l1_unstructured(net[0], "weight", 2, importance_scores=-scores[0])
        partly = {(net[2], "weight"): scores[1]}
        prune.global_unstructured(
            weights(net), pruning_method=prune.L1Unstructured, importance_scores=partly, amount=0.3
        )
        nets.append(net)
    assert_same(*nets)


def test_a_trained_network_after_remove():
    nets = []
    for prune in (ours, theirs):
        net = network()
        prune.global_unstructured(weights(net), prune.L1Unstructured, amount=0.5)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net[2](torch.ones(1, 7)).sum().backward()
        optimizer.step()
        for module, name in weights(net):
            assert prune.remove(module, name) is module
        assert not prune.is_pruned(net)
        nets.append(net)
    assert_same(*nets)
    assert int((nets[0][0].weight == 0).sum() + (nets[0][2].weight == 0).sum()) == round(59 / 2)


def test_deepcopy_pickle_and_state_dict():
    net = network()
    ours.global_unstructured(weights(net), ours.L1Unstructured, amount=0.5)
    ours.l1_unstructured(net[2], "bias", amount=2)
    net[0].weight, net[2].weight, net[2].bias = (
        tensor.detach() for tensor in (net[0].weight, net[2].weight, net[2].bias)
    )  # torch can copy no tensor that was computed
    assert_same(copy.deepcopy(net), net)
    assert_same(pickle.loads(pickle.dumps(net)), net)
    other = network(seed=1)
    theirs.global_unstructured(weights(other), theirs.L1Unstructured, amount=0.1)
    theirs.l1_unstructured(other[2], "bias", amount=1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other[2](torch.ones(1, 7)), net[2](torch.ones(1, 7)))


def test_torch_s_own_class_is_fast_too(monkeypatch):
    net, other = network(), network()
    theirs.global_unstructured(weights(other), theirs.L1Unstructured, amount=0.5)
    monkeypatch.setattr(torch, "topk", None)
    ours.global_unstructured(weights(net), theirs.L1Unstructured, amount=0.5)
    ours.global_unstructured(iter(weights(net)), ours.L1Unstructured, amount=0)
    ours.l1_unstructured(net[2], "weight", 3)
    assert torch.equal(net[0].weight_mask, other[0].weight_mask)


def test_few_weights_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(ours, "_FEW", 60)
    monkeypatch.setattr(ours, "select", None)
    nets = []
    for prune in (ours, theirs):
        net = network()
        prune.global_unstructured(weights(net), prune.L1Unstructured, amount=0.5)
        prune.l1_unstructured(net[2], "weight", 3)
        nets.append(net)
    assert_same(*nets)


def test_ties_go_to_the_first():
    layer = nn.Linear(4, 2, bias=False)
    nn.init.ones_(layer.weight)
    ours.l1_unstructured(layer, "weight", 0.5)
    assert layer.weight_mask.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    other = nn.Linear(4, 2, bias=False)
    nn.init.ones_(other.weight)
    ours.l1_unstructured(other, "weight", 3)
    assert int(other.weight_mask.sum()) == 5


def nan_network():
    net = network()
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    return net


class Ternary(theirs.BasePruningMethod):
    """A user's own method."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount):
        self.amount = amount

    def compute_mask(self, t, default_mask):
        return default_mask * (t.abs() > self.amount)


def shaped(net):
    """Scores of another shape that torch flattens all the same."""
    return {(net[0], "weight"): distinct(24)}


@pytest.mark.parametrize(
    "call",
    [
        lambda prune, net: prune.global_unstructured(
            weights(net), pruning_method=prune.RandomUnstructured, amount=0.5
        ),
        lambda prune, net: prune.global_unstructured(weights(net), Ternary, amount=20),
        lambda prune, net: prune.global_unstructured(
            weights(net), prune.L1Unstructured, shaped(net), amount=0.5
        ),
        lambda prune, net: prune.ln_structured(net[2], "weight", amount=1, n=2, dim=0),
        lambda prune, net: prune.custom_from_mask(net[2], "bias", torch.tensor([0, 1, 1, 0, 1])),
        lambda prune, net: prune.identity(net[2], "bias"),
        lambda prune, net: prune.random_structured(net[2], "weight", amount=2, dim=1),
        lambda prune, net: prune.PruningContainer(),
        lambda prune, net: prune._validate_pruning_amount_init(0.5),
    ],
)
def test_the_rest_is_torch_s(call):
    nets = []
    for prune in (ours, theirs):
        net = network()
        torch.manual_seed(0)
        call(prune, net)
        nets.append(net)
    assert_same(*nets)


def test_nan_is_kept_as_torch_does():
    nets = []
    for prune in (ours, theirs):
        net = nan_network()
        prune.global_unstructured(weights(net), prune.L1Unstructured, amount=0.5)
        prune.l1_unstructured(net[2], "bias", amount=1)
        other = nan_network()
        prune.l1_unstructured(other[0], "weight", amount=5)
        nets.append((net[0].weight_mask, net[2].weight_mask, other[0].weight_mask))
    assert all(torch.equal(a, b) for a, b in zip(*nets, strict=True))


@BOTH
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda p, net: p.global_unstructured(1, p.L1Unstructured, amount=1), TypeError),
        (lambda p, net: p.global_unstructured(weights(net), p.L1Unstructured), TypeError),
        (lambda p, net: p.global_unstructured(weights(net), p.L1Unstructured, rate=1), TypeError),
        (
            lambda p, net: p.global_unstructured(weights(net), p.L1Unstructured, [], amount=1),
            TypeError,
        ),
        (
            lambda p, net: p.global_unstructured(weights(net), p.L1Unstructured, [1], amount=1),
            TypeError,
        ),
        (
            lambda p, net: p.global_unstructured(weights(net), p.LnStructured, amount=1, n=1),
            TypeError,
        ),
        (
            lambda p, net: p.global_unstructured([(net[0], "wait")], p.L1Unstructured, amount=1),
            AttributeError,
        ),
        (lambda p, net: p.global_unstructured([], p.L1Unstructured, amount=1), ValueError),
        *(
            (
                lambda p, net, a=amount: p.global_unstructured(
                    weights(net), p.L1Unstructured, amount=a
                ),
                error,
            )
            for amount, error in [(60, ValueError), (-1, ValueError), (1.5, ValueError)]
        ),
        (lambda p, net: p.l1_unstructured(net[2], "weight", "half"), TypeError),
        (lambda p, net: p.l1_unstructured(net[2], "weight", 36), ValueError),
        (lambda p, net: p.l1_unstructured(net[2], "weight", -0.1), ValueError),
        (lambda p, net: p.l1_unstructured(net[2], "wait", 1), AttributeError),
        (
            lambda p, net: p.l1_unstructured(net[2], "weight", 1, torch.ones(35)),
            AssertionError,
        ),
        (lambda p, net: p.remove(net[2], "weight"), ValueError),
        (lambda p, net: p.nothing, AttributeError),
    ],
)
def test_errors_are_of_the_same_type_and_change_nothing(prune, call, error):
    net = network()
    with pytest.raises(error):
        call(prune, net)
    assert not prune.is_pruned(net)
    before = network().state_dict()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
