"""Prune levels, loss matrices and calibrations of models on a GPU, held to those of the CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from level_by_level import DISTANCE, GRID, grid_losses, slow_losses
from test_cuda_ops import not_waiting
from torch import nn
from torch.nn.utils import prune as torch_prune

import confprune
from confprune import calibrate, loss_matrix, prune_levels
from confprune.batches import Reordered, move_batch
from confprune.grid import GridForward
from confprune.nn.utils import prune


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.pool(x + self.branch(x))
        return self.head(self.depthwise(x).relu().flatten(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens):
        return self.layers(self.words(tokens)).mean(1)


def subject(name, n=40):
    """A network and its inputs."""
    if name == "perceptron":
        layers = (nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.GELU(), nn.Linear(30, 5))
        return nn.Sequential(*layers).eval(), torch.randn(n, 20)
    if name == "residual":
        model = Residual().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        return model, torch.randn(n, 3, 8, 8)
    return Encoder().eval(), torch.randint(0, 50, (n, 7))


SUBJECTS = ("perceptron", "residual", "encoder")


@pytest.fixture(autouse=True)
def full_precision():
    """Convolutions in float32, as everything else: torch's default is less on a GPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_too_little_memory_names_what_to_lower(monkeypatch):
    model, x = subject("perceptron")
    levels = prune_levels(model, GRID)

    def without_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(GridForward, "_grid_outputs", without_memory)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"for 40 examples and 7 levels .* lower activation_bytes= "
        r"\(now 1000000; try 250000\) or batch_size=. "
        r"CUDA out of memory. Tried to allocate 2.00 GiB.",
    ):
        loss_matrix(model, x, levels, DISTANCE, activation_bytes=1_000_000, progress=False)


@pytest.mark.cuda
class TestLevels:
    @pytest.mark.parametrize("pattern", [None, "N:4", "2x2", "rows"])
    @pytest.mark.parametrize(
        "criterion", ["magnitude", "random", "erdos_renyi_kernel", "magnitude(min_per_layer=2)"]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_prune_levels_are_those_of_the_cpu(self, dtype, criterion, pattern):
        if pattern is not None and "min_per_layer" in criterion:
            pytest.skip("spares single weights")
        model = nn.Sequential(nn.Linear(40, 64), nn.Conv2d(8, 16, 3)).to(dtype)
        settings = {"criterion": criterion, "pattern": pattern}
        expected = prune_levels(model, GRID, **settings)
        found = prune_levels(copy.deepcopy(model).cuda(), GRID, **settings)
        assert found.sparsities == expected.sparsities
        assert torch.equal(found.counts, expected.counts)
        assert torch.equal(found.thresholds, expected.thresholds)
        for name, levels in expected.levels.items():
            assert found.levels[name].is_cuda
            assert torch.equal(found.levels[name].cpu(), levels)

    @pytest.mark.parametrize("scope", ["layer", "row"])
    def test_scopes(self, scope):
        model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 8))
        expected = prune_levels(model, GRID, scope=scope)
        found = prune_levels(copy.deepcopy(model).cuda(), GRID, scope=scope)
        assert torch.equal(found.thresholds, expected.thresholds)
        assert all(torch.equal(found.levels[n].cpu(), expected.levels[n]) for n in expected.levels)

    def test_a_pruned_model_stays_on_its_device(self):
        model, _ = subject("residual")
        levels = prune_levels(model, GRID)
        expected = levels.prune(model, 3).state_dict()
        there = copy.deepcopy(model).cuda()
        for found in (prune_levels(there, GRID), levels):
            pruned = found.prune(there, 3).state_dict()
            assert all(pruned[n].is_cuda for n in pruned)
            assert all(torch.equal(pruned[n].cpu(), expected[n]) for n in expected)
        assert found.pruned_by_layer.keys() == levels.pruned_by_layer.keys()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_the_drop_in_prunes_what_torch_prunes(self, dtype):
        ours = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 100)).to("cuda", dtype)
        theirs = copy.deepcopy(ours)
        for module, network in ((prune, ours), (torch_prune, theirs)):
            for amount in (0.3, 0.5):
                module.global_unstructured(
                    [(network[0], "weight"), (network[1], "weight")],
                    pruning_method=module.L1Unstructured,
                    amount=amount,
                )
            module.l1_unstructured(network[0], "bias", amount=0.25)
        kept = [
            sum(int((layer.weight_mask == 1).sum()) for layer in network)
            for network in (ours, theirs)
        ]
        assert kept[0] == kept[1]
        for own, other in zip(ours, theirs, strict=True):
            if dtype == torch.float32:  # others tie
                assert torch.equal(own.weight, other.weight)


@pytest.mark.cuda
class TestLosses:
    @pytest.mark.parametrize("budget", [None, 200_000, 1])
    @pytest.mark.parametrize("name", SUBJECTS)
    def test_losses_are_those_of_the_masked_networks(self, name, budget):
        model, x = subject(name)
        there, x = model.cuda(), x.cuda()
        levels = prune_levels(there, GRID)
        settings = {} if budget is None else {"activation_bytes": budget}
        found = grid_losses(there, x, levels, **settings)
        expected = slow_losses(there, [x], levels).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", SUBJECTS)
    def test_16_bit_networks(self, name, dtype):
        model, x = subject(name)
        model = model.to("cuda", dtype)
        x = x.cuda().to(dtype) if x.is_floating_point() else x.cuda()
        levels = prune_levels(model, GRID)
        found = grid_losses(model, x, levels)
        expected = slow_losses(model, [x], levels).cpu()
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)

    @pytest.mark.parametrize("ordered", [False, True])
    @pytest.mark.parametrize("name", SUBJECTS)
    def test_a_batch_is_evaluated_without_waiting_for_the_device(self, name, ordered):
        model, x = subject(name)
        model, x = model.cuda(), x.cuda()
        if ordered:
            x = move_batch(Reordered(x, torch.arange(len(x)).flip(0)), x.device)
        levels = prune_levels(model, GRID)
        loss = confprune.losses.resolve_loss("disagreement")
        grid = GridForward(model, levels, [loss])
        expected = grid.evaluate(x, range(len(GRID)))
        with not_waiting():
            found = grid.evaluate(x, range(len(GRID)))
        assert found.is_cuda
        assert torch.equal(found, expected)

    def test_memory_that_is_not_there(self):
        model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 10)).cuda()
        levels = prune_levels(model, [j / 100 for j in range(100)])
        x = torch.randn(4096, 64, device="cuda")
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((200 << 20) / total)
        try:
            with pytest.raises(torch.OutOfMemoryError, match="lower activation_bytes="):
                loss_matrix(model, x, levels, "disagreement", progress=False)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        small = {"activation_bytes": 16 << 20, "progress": False}
        assert loss_matrix(model, x, levels, "disagreement", **small).shape == (4096, 100)

    def test_a_loss_that_is_nan_is_named_at_its_example(self):
        model, x = subject("perceptron", 30)
        x[17] = torch.nan
        model = model.cuda()
        levels = prune_levels(model, GRID)
        with pytest.raises(ValueError, match="is nan for example 17 at level 0"):
            loss_matrix(model, x, levels, "soft_disagreement", progress=False)


@pytest.mark.cuda
class TestCalibration:
    @pytest.mark.parametrize("name", SUBJECTS)
    def test_the_same_level_is_certified_as_on_the_cpu(self, name):
        model, x = subject(name, 600)
        settings = {"loss": "soft_disagreement", "alpha": 0.1, "delta": 0.1, "progress": False}
        if name == "encoder":
            settings["loss"] = "cosine"
        expected = calibrate(model, x, **settings)
        there = copy.deepcopy(model).cuda()
        for found in (
            calibrate(there, x, **settings),
            calibrate(there, x.cuda(), **settings),
            calibrate(model, x, device="cuda", **settings),
            calibrate(there, x, device="cpu", **settings),
        ):
            assert found.level == expected.level
            assert found.rejected == expected.rejected
            assert found.pruning.fingerprint == expected.pruning.fingerprint
            np.testing.assert_allclose(found.risks, expected.risks, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("settings", [{"looks": None}, {"scope": ["global", "layer"]}])
    def test_all_at_once_and_several_ways(self, settings):
        model, x = subject("perceptron", 400)
        settings |= {"loss": "disagreement", "alpha": 0.2, "delta": 0.1, "progress": False}
        expected = calibrate(model, x, **settings)
        found = calibrate(model.cuda(), x, **settings)
        assert found.level == expected.level
        assert found.pruning.scope == expected.pruning.scope

    def test_batches_of_a_loader(self):
        model, x = subject("perceptron", 400)
        loader = torch.utils.data.DataLoader(x, batch_size=32)
        settings = {"loss": "disagreement", "alpha": 0.2, "delta": 0.1, "progress": False}
        expected = calibrate(model, loader, **settings)
        assert calibrate(model.cuda(), loader, **settings).level == expected.level
