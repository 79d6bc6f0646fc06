"""The grid operators called once for all that vmap batches."""

from __future__ import annotations

import pytest
import torch

from confprune.grid.levels_at_once import depends_on_level, levels_at_once


def weighted(level: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    assert level.ndim == 1
    assert not depends_on_level(level)
    return x * level.reshape(-1, *[1] * (x.ndim - 1))


LEVEL = torch.tensor([2.0, 3.0, 5.0])


def test_an_input_that_all_levels_share():
    x = torch.randn(4, 2)
    y = torch.vmap(lambda level: levels_at_once(weighted, level, x))(LEVEL)
    assert torch.equal(y, LEVEL[:, None, None] * x)


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_an_input_of_each_level(dimension):
    x = torch.randn(3, 4, 2)
    rule = torch.vmap(
        lambda x, level: levels_at_once(weighted, level, x) + 1, in_dims=(dimension, 0)
    )
    assert torch.equal(rule(x.movedim(0, dimension), LEVEL), LEVEL[:, None, None] * x + 1)


def test_one_level_without_vmap():
    x = torch.randn(4, 2)
    assert torch.equal(levels_at_once(weighted, LEVEL[1], x), 3 * x)


def test_the_levels_are_with_vmap_again_after_an_error():
    def fails(level, x):
        raise ValueError("no")

    def at_level(level):
        with pytest.raises(ValueError, match="no"):
            levels_at_once(fails, level, torch.ones(2))
        return level + 1

    assert torch.equal(torch.vmap(at_level)(LEVEL), LEVEL + 1)


def test_a_second_vmap_is_refused():
    def at_level(level):
        return torch.vmap(lambda x: levels_at_once(weighted, level, x))(torch.ones(2, 4))

    with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
        torch.vmap(at_level)(LEVEL)
