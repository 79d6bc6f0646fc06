"""How examples and levels are taken apart, so that their activations fit a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

ACTIVATION_BYTES = 64 << 20
"""Default budget on the CPU for the activations of the levels and examples of a chunk."""

_GPU_SHARE = 8  # of whose memory one part is the budget, up to so many bytes:
_GPU_MOST = 8 << 30  # one activation then has fewer than 2^31 elements, where many kernels end
_LIVE = 4  # activations of the largest size that are alive at once, roughly


def default_budget(device: torch.device) -> int:
    """Bytes for activations where none were asked for."""
    if device.type != "cuda":
        return ACTIVATION_BYTES
    total = int(torch.cuda.get_device_properties(device).total_memory)
    return min(total // _GPU_SHARE, _GPU_MOST)


class Footprint(NamedTuple):
    """Bytes that one example or one level costs, and the examples that fill the lanes.

    `plain` is `activation` in a run of one level, where layers write what is between them.
    """

    activation: int
    plain: int
    weight: int
    examples: int

    def fitting(self, levels: int, budget: int) -> int:
        """Examples whose activations at so many levels fit the budget, in full lanes.

        Examples
        --------
        >>> from confprune.grid.chunks import Footprint
        >>> Footprint(activation=100, plain=100, weight=0, examples=16).fitting(10, budget=200_000)
        48
        """
        fit = budget // max(1, self.activation * _LIVE * levels)
        return fit - fit % self.examples

    def example_chunks(self, size: int, levels: int, budget: int) -> Iterator[tuple[int, int]]:
        """Ranges of examples: as many as fit with all levels, but enough to fill the lanes."""
        most = max(self.fitting(levels, budget), self.examples)
        step = max(1, min(most, budget // max(1, self.plain * _LIVE)))
        for begin in range(0, size, step):
            yield begin, min(size, begin + step)

    def levels_at_once(self, examples: int, budget: int) -> int:
        """How many levels fit the budget with so many examples; at least one."""
        per_level = self.activation * _LIVE * examples + self.weight
        return max(1, budget // max(1, per_level))
