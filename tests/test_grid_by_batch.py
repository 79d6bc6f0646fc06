"""Models that do something else on some batches: what is taken together with a layer is noticed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from level_by_level import ANY, DISTANCE, GRID, grid_losses, slow_losses
from torch import Tensor, nn

from confprune import Loss, Reference, loss_matrix, prune_levels

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = 5  # examples in the batch on which a model does something else
CHANGED = "changed from one call to the next"


class ByBatch(nn.Module):
    """A network whose parts are put together by a function of itself, the input, and the batch."""

    def __init__(self, way: Callable[[ByBatch, Tensor, bool], Tensor], first: nn.Module) -> None:
        super().__init__()
        self.way = way
        self.first = first
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.inner = nn.Linear(64, 64)
        self.last = nn.Linear(64, 5)
        for norm in (self.norm, self.other):
            for values in (norm.running_mean, norm.weight, norm.bias):
                nn.init.normal_(values)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.way(self, self.first(x.clone()), len(x) == ODD).flatten(1)))


def check(way: Callable[..., Tensor], first: nn.Module, fallback: str | None) -> None:
    model = ByBatch(way, first)
    data = [torch.randn(n, 1, 4, 4) for n in (8, ODD, 7)]
    levels = prune_levels(model, GRID)
    expected = slow_losses(model, data, levels)
    found = grid_losses(model, data, levels, fallback=fallback)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


class Doubled(torch.autograd.Function):
    """A function of a user, which no mode sees."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing is kept."""


def relu_used_before(model, x, odd):
    y = F.relu(x)
    return y + x if odd else y


def norm_used_before(model, x, odd):
    z = model.norm(x)
    y = F.relu(z)
    return y + z if odd else y


def layer_used_before_its_norm(model, x, odd):
    y = F.relu_(model.norm(x))
    return y + x if odd else y


def in_place_on_that_batch(model, x, odd):
    y = F.relu(x, inplace=odd)
    return y + x if odd else y


def in_place_on_the_others(model, x, odd):
    y = F.relu(x, inplace=not odd)
    return y + x if odd else y


def another_norm(model, x, odd):
    return F.relu((model.other if odd else model.norm)(x))


def a_norm_that_changes(model, x, odd):
    mean = model.norm.running_mean.clone()
    try:
        if odd:
            model.norm.running_mean.add_(1)
        return F.relu(model.norm(x))
    finally:
        model.norm.running_mean.copy_(mean)


def a_view_from_before(model, x, odd):
    view = x.view(-1) if odd else None
    y = F.relu(x)
    return y + view.view(x.shape) if odd else y


def a_slice_is_written_after(model, x, odd):
    y = F.relu(x)
    if odd:
        x[:, 0] = 1
        y = y + x
    return y


def a_function_that_no_mode_sees(model, x, odd):
    if odd:
        doubled = Doubled.apply(x)
    y = F.relu_(x)
    return y + doubled if odd else y


def idle_dropout_is_worked_on(model, x, odd):
    z = F.dropout(x, 0.5, training=False)
    if odd:
        z.mul_(2)
    return F.relu(z)


def how_it_lies_in_memory(model, x, odd):
    if odd and x.stride(0) == 64:
        return F.relu(2 * x)
    return F.relu(x)


@pytest.mark.parametrize(
    "way",
    [
        *(relu_used_before, norm_used_before, layer_used_before_its_norm, in_place_on_that_batch),
        *(in_place_on_the_others, another_norm, a_norm_that_changes, a_view_from_before),
        *(a_slice_is_written_after, a_function_that_no_mode_sees, idle_dropout_is_worked_on),
        how_it_lies_in_memory,
    ],
)
def test_a_step_that_is_not_taken_on_some_batch_is_noticed(way):
    check(way, nn.Conv2d(1, 4, 3, padding=1), CHANGED)


def relu_in_place(model, x, odd):
    y = F.relu(x, inplace=True)
    return y + x if odd else y


def norm_and_relu_in_place(model, x, odd):
    z = model.norm(x)
    y = F.relu_(z)
    return y * z if odd else y


def twice(model, x, odd):
    y = F.relu(model.conv(x))
    return F.relu(model.conv(y)) if odd else y


@pytest.mark.parametrize("way", [relu_in_place, norm_and_relu_in_place, twice])
def test_what_is_right_on_every_batch_keeps_its_grid(way):
    check(way, nn.Conv2d(1, 4, 3, padding=1), None)


def added(add: Callable[[Tensor, Tensor, bool], Tensor]) -> Callable[..., Tensor]:
    """A residual that is added in a way of its own on some batches."""

    def way(model: ByBatch, x: Tensor, odd: bool) -> Tensor:
        return F.relu(add(model.norm(model.conv(x)), x, odd))

    return way


def added_into_the_residual(z, x, odd):
    if odd:
        x += z
    else:
        z += x
    return z + x.detach() if odd else z


def residual_changes(z, x, odd):
    if odd:
        x.mul_(2)
    return z + x


def part_of_the_residual_changes(z, x, odd):
    if odd:
        x[:2, 1].mul_(2)
    return z + x


@pytest.mark.parametrize(
    "add",
    [
        *(added_into_the_residual, residual_changes, part_of_the_residual_changes),
        lambda z, x, odd: torch.add(z, x, alpha=2) if odd else torch.add(z, x),
        lambda z, x, odd: torch.add(z, other=x) if odd else torch.add(z, x),
        lambda z, x, odd: torch.add(z, x, out=torch.empty_like(z)) if odd else torch.add(z, x),
        lambda z, x, odd: z if odd else z + x,
        lambda z, x, odd: (z + x) + (z if odd else 0),
    ],
)
def test_an_addition_that_is_another_one_on_some_batch_is_noticed(add):
    check(added(add), nn.Conv2d(1, 4, 3, padding=1), CHANGED)


def test_a_residual_whose_own_relu_in_place_comes_later_is_noticed():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
            self.last = nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            odd = len(x) == ODD
            y = self.one(x)
            y = y if odd else F.relu_(y)
            z = self.two(x) + y
            y = F.relu_(y) if odd else y
            return self.last((F.relu(z) + y).flatten(1))

    model = Late()
    data = [torch.randn(n, 1, 4, 4) for n in (8, ODD)]
    levels = prune_levels(model, GRID)
    found = grid_losses(model, data, levels, fallback=CHANGED)
    torch.testing.assert_close(found, slow_losses(model, data, levels), rtol=0, atol=2e-5)


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(16, 64))


def chain_takes_what_was_before(model, x, odd):
    y = F.relu(x)
    return model.inner(x if odd else y)


def chain_is_used_later(model, x, odd):
    y = model.inner(F.relu(x))
    return y + x if odd else y


def chain_is_shorter(model, x, odd):
    return x if odd else model.inner(F.relu(x))


def chain_goes_on_without_a_layer(model, x, odd):
    return F.linear(F.relu(x), torch.ones(64, 64)) if odd else model.inner(F.relu(x))


@pytest.mark.parametrize(
    "way",
    [
        chain_takes_what_was_before,
        chain_is_used_later,
        chain_is_shorter,
        chain_goes_on_without_a_layer,
    ],
)
def test_a_chain_of_layers_that_is_another_one_on_some_batch_is_noticed(way):
    check(way, FLAT, ANY if way is chain_is_shorter else CHANGED)


@pytest.mark.parametrize("rows", [1, 4, None])
def test_outputs_without_a_row_per_example_are_refused_on_every_batch(rows):
    class Fewer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if len(x) == ODD:
                return y.sum() if rows is None else y[:rows]
            return y

    model, data = Fewer(6, 3), [torch.randn(n, 6) for n in (8, ODD)]
    with pytest.raises(
        ValueError, match=r"output has shape .* for a batch of 5 examples; its first"
    ):
        loss_matrix(model, data, prune_levels(model, GRID), DISTANCE, progress=False)


@pytest.mark.parametrize("vmappable", [False, True])
def test_a_loss_that_returns_one_value_for_some_batch_is_refused(vmappable):
    def mean(outputs: Tensor, reference: Reference) -> Tensor:
        return outputs[:, 0].sigmoid()[: 1 if len(outputs) == ODD else None]

    model, data = nn.Linear(6, 3), [torch.randn(n, 6) for n in (8, ODD)]
    levels = prune_levels(model, GRID)
    loss = Loss("mean", mean, vmappable=vmappable)
    with pytest.raises(ValueError, match=r"loss 'mean' returned \[1\] for 5 examples"):
        loss_matrix(model, data, levels, loss, progress=False)


@pytest.mark.parametrize("way", [relu_used_before, added(residual_changes)])
def test_changes_are_noticed_in_inference_mode_too(way):
    model = ByBatch(way, nn.Conv2d(1, 4, 3, padding=1))
    data = [torch.randn(n, 1, 4, 4) for n in (8, ODD)]
    levels = prune_levels(model, GRID)
    expected = slow_losses(model, data, levels)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        found = loss_matrix(model, data, levels, DISTANCE, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_an_input_that_changes_under_a_chain_is_noticed_in_inference_mode_too():
    class Changing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self[0](x)
            if len(x) == ODD:
                x.mul_(2)
            return self[1](F.relu(y))

    model = Changing(nn.Linear(6, 8), nn.Linear(8, 3))
    data = [torch.randn(n, 6) for n in (8, ODD)]
    levels = prune_levels(model, GRID)
    expected = slow_losses(model, data, levels)
    with torch.inference_mode():
        found = grid_losses(model, data, levels, fallback="in place on an input")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
