"""The grid forward: a network's losses on a batch, at every level of a grid, in one pass.

The grid is a batch dimension: the model runs once under ``torch.vmap`` over the levels, with its
prunable weights masked on the way (see `confprune.grid.mode`). What that gives is compared with the
plain masked network on the first batch; where it differs, or the model does not lend itself, the
same numbers are made level by level. The full network, with which the losses compare, is run by
itself, or is one more level of the grid where that takes less time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from confprune.batches import batch_length, slice_batch
from confprune.calling import Forward, reference_of
from confprune.grid.checks import (
    check_outputs,
    check_own_weights,
    check_state,
    check_unwritten,
    check_values,
    divisible,
    first_line,
    is_random,
    unused,
    warn_of_hooks,
)
from confprune.grid.chunks import ACTIVATION_BYTES, Footprint, default_budget
from confprune.grid.comparison import difference
from confprune.grid.fusion import Fusion
from confprune.grid.layers import Layer
from confprune.grid.mode import GridMode
from confprune.grid.network import Network, PlainNetwork, full_precision
from confprune.grid.probe import Met, Probe
from confprune.levels import PruneLevels
from confprune.losses import Loss, Reference, check_shapes
from confprune.ops import check_kernels
from confprune.parameters import named_parameters
from confprune.warning import warn

_WARM_BYTES = 31 << 20
"""Of a block that is freed at once. glibc then keeps memory of up to twice this size rather than
return it after every call, and the next activations cost no page faults."""

_CHECK_EXAMPLES = 4
_CHECK_LEVELS = 3


class GridForward:
    """Evaluates losses of a model at the levels of a grid, batch by batch.

    Parameters
    ----------
    model : torch.nn.Module
        Never run or changed: what runs are copies with its parameters, in evaluation mode.
    levels : PruneLevels
        Of this model.
    losses : sequence of Loss
        What is computed of the outputs; every one costs little beside the outputs.
    forward : callable (model, batch) -> outputs, optional
    activation_bytes : int, optional
        Memory for the activations of a chunk of levels and examples. Default: 64 MiB, or an eighth
        of a GPU's memory, up to 8 GiB.

    Attributes
    ----------
    fallback : str or None
        Why the levels are run one by one, if they are.
    notes : list of str
        What a reader of the result should know.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: PruneLevels,
        losses: Sequence[Loss],
        *,
        forward: Forward | None = None,
        activation_bytes: int | None = None,
    ) -> None:
        levels.check_model(model)
        check_kernels(parameter.device for parameter in model.parameters())
        self.levels = levels
        self.losses = tuple(losses)
        self.fallback: str | None = None
        self._network = Network(model, forward)
        self._make_plain = functools.partial(PlainNetwork, model, forward)
        self._plain: PlainNetwork | None = None
        self._budget = activation_bytes or default_budget(self._network.device)
        parameters = named_parameters(model)
        self._layers = {
            id(parameters[name]): Layer(name, parameters[name], prune, len(levels))
            for name, prune in levels.levels.items()
        }
        self.notes: list[str] = []
        warn_of_hooks(model, self.notes)
        self._batch_minor = self._network.device.type == "cpu"
        self._fusions: list[Fusion] = []
        self._unused: AbstractSet[str] = frozenset()
        self._written = 0  # bytes of the largest masked weight that an operation was given
        self._full: int | None = None  # the level that is the full network, if the grid makes it
        self._footprint: Footprint | None = None

    @torch.inference_mode(mode=False)  # where in-place work leaves no trace
    @torch.no_grad()
    def capacity(self, batch: Any, levels: int) -> int:
        """The most examples that cost little more than one, evaluated in one go at so many levels.

        Their number fills the lanes of the products, and their activations are few whatever the
        budget; 0 where these cannot be both.
        """
        budget = min(self._budget, ACTIVATION_BYTES)
        with self._explaining(batch_length(batch), levels):
            return self._prepared(batch).fitting(levels + (self._full is not None), budget)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def evaluate(
        self,
        batch: Any,
        active: Sequence[int],
        done: Callable[[int], object] | None = None,
        share: Iterator[bool] | None = None,
    ) -> Tensor:
        """The losses of each example of a batch at some levels, [losses, B, len(active)] float32.

        They stay on the network's device.

        `done` is told the number of examples each time some are. `share` says of each chunk of
        examples in turn whether to evaluate it; the losses of the others are left 0.

        Raises
        ------
        ValueError
            If a loss cannot take the outputs.
        torch.OutOfMemoryError
            If the device has too little memory, naming the setting to lower.
        """
        size = batch_length(batch)
        with self._explaining(size, len(active)):
            return self._evaluate(batch, size, active, done, share)

    @contextmanager
    def _explaining(self, examples: int, levels: int) -> Iterator[None]:
        """Say what to do where memory is short."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{self._network.device} has too little memory for {examples} examples and "
                f"{levels} levels in chunks of {self._budget >> 20} MiB of activations: lower "
                f"activation_bytes= (now {self._budget}; try {self._budget // 4}) or batch_size=. "
                f"{first_line(error)}"
            ) from error

    def _evaluate(
        self,
        batch: Any,
        size: int,
        active: Sequence[int],
        done: Callable[[int], object] | None,
        share: Iterator[bool] | None,
    ) -> Tensor:
        footprint = self._prepared(batch)
        shape = len(self.losses), size, len(active)
        result = torch.zeros(shape, dtype=torch.float32, device=self._network.device)
        levels = len(self._evaluated(active))
        for begin, end in footprint.example_chunks(size, levels, self._budget):
            if share is None or next(share):
                part = slice_batch(batch, begin, end)
                result[:, begin:end] = self._chunk_losses(part, active)
            if done is not None:
                done(end - begin)
        return result

    def _evaluated(self, active: Sequence[int]) -> Sequence[int]:
        """The levels that are evaluated: these, after that of the full network if it is one.

        They settle how examples are taken apart, which ranks must agree about.
        """
        if self._full is None or active[0] == self._full:
            return active
        return [self._full, *active]

    def _chunk_losses(self, batch: Any, active: Sequence[int]) -> Tensor:
        """The losses of a chunk of examples, [losses, B, len(active)], levels in chunks too."""
        levels = self._evaluated(active)
        outputs = self._outputs(batch, levels)
        if self._full is None:
            full = self._network(batch)
        else:
            first = next(outputs)
            # A copy: a loss may work in place on the outputs of the same level.
            full = first[0].clone(memory_format=torch.contiguous_format)
            outputs = itertools.chain([first[len(levels) - len(active) :]], outputs)
            del first
        check_outputs(full, batch_length(batch))
        reference = reference_of(full, batch)
        values = []
        for part in outputs:
            if len(part):
                values.append(self._losses_of(part, reference))
            del part  # before the next are computed
        return torch.cat(values, dim=-1)

    def _outputs(self, batch: Any, levels: Sequence[int]) -> Iterator[Tensor]:
        """The outputs [some levels, B, ...] of all in turn; level by level where it must be."""
        step = self._prepared(batch).levels_at_once(batch_length(batch), self._budget)
        for first in range(0, len(levels), step):
            chunk = levels[first : first + step]
            reason = ""
            if self.fallback is None:
                try:
                    outputs = self._grid_outputs(batch, chunk)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    # Infinite activations are of some examples; the others may go on as before.
                    if "holds infinity or NaN" not in str(error):
                        reason = f"{type(error).__name__}: {first_line(error)}"
                else:
                    yield outputs
                    del outputs
                    continue
            for j in chunk:
                outputs = self._masked_outputs(batch, j)
                if reason:
                    self._fall_back(reason)  # now that the model has not failed by itself
                    reason = ""
                yield outputs[None]
                del outputs

    def _losses_of(self, outputs: Tensor, reference: Reference) -> Tensor:
        """Losses [losses, B, levels] of outputs [levels, B, ...]."""
        values = []
        for loss in self.losses:
            if loss.broadcasts:
                of_levels = loss(outputs, reference)
            elif loss.vmappable:
                of_levels = torch.vmap(loss, in_dims=(0, None))(outputs, reference)
            else:
                of_levels = torch.stack([loss(y, reference) for y in outputs])
            check_values(loss, of_levels, (len(outputs), len(reference.outputs)))
            values.append(of_levels.T.to(torch.float32))
        return torch.stack(values)

    def _grid_outputs(self, batch: Any, active: Sequence[int]) -> Tensor:
        """The outputs at several levels at once, [levels, B, ...]."""
        met: set[str] = set()

        def at_level(level: Tensor) -> Tensor:
            mode = GridMode(
                self._layers, level, batch_minor=self._batch_minor, fusions=self._fusions
            )
            with mode:
                outputs = self._network(batch)
            mode.finish(outputs)
            met.update(mode.met)
            self._written = max(self._written, mode.written)
            return outputs

        level = torch.tensor(active).to(self._network.device, non_blocking=True)
        outputs: Tensor = torch.vmap(at_level)(level)
        missed = set(self.levels.levels) - met - self._unused
        if missed:
            raise _NotSeen(f"the model used {sorted(missed)[0]!r} where it could not be masked")
        return outputs

    def _masked_outputs(self, batch: Any, j: int) -> Tensor:
        """The outputs of the plain network with the masked weights of level `j`, [B, ...]."""
        return self._run_plain(batch, lambda layer: layer.masked(j))

    def _run_plain(self, batch: Any, weight_of: Callable[[Layer], Tensor]) -> Tensor:
        if self._plain is None:
            self._plain = self._make_plain(self._layers)
        return self._plain(batch, weight_of)

    def _prepared(self, batch: Any) -> Footprint:
        """What an example costs, after the checks on a few of the first batch."""
        if self._footprint is None:
            with full_precision(self._network.device):
                self._footprint = self._prepare(batch)
        return self._footprint

    def _prepare(self, batch: Any) -> Footprint:
        """Check outputs and loss on a few examples, size the chunks, and check the grid."""
        torch.empty(min(_WARM_BYTES, self._budget), dtype=torch.uint8)
        part = slice_batch(batch, 0, _CHECK_EXAMPLES)
        plain = self._plain = self._make_plain(self._layers)
        last = len(self.levels) - 1
        some = sorted({round(i * last / (_CHECK_LEVELS - 1)) for i in range(_CHECK_LEVELS)})
        with divisible(plain, batch, part), Met(self._layers) as originals:
            # The sparsest first: what a network would keep of it tells.
            masked = [self._masked_outputs(part, j) for j in reversed(some)]
        check_own_weights(originals.names)
        check_unwritten(plain, lambda layer: layer.masked(some[0]))
        probe = Probe(self._layers)
        with divisible(plain, batch, part), probe:
            full = self._network(part)
        self._fusions = probe.fusions(full)
        size = batch_length(part)
        check_outputs(full, size)
        reference = reference_of(full, part)
        for loss in self.losses:
            check_shapes(loss, full, reference)
            check_values(loss, loss(full.clone(), reference), (size,))
        random = is_random(self._network, part, full, self.notes)
        check_state(plain, self._network, part, full, random=random)
        self._unused = unused(plain, batch, part, full, probe.met, self.notes)
        self._cross_check(part, some, torch.stack(masked[::-1]))
        if self.fallback is None:
            self._plain = None  # it takes as much memory as the weights
        if probe.mostly_filtered and int(self.levels.counts[0]) == 0:
            self._full = 0
        return probe.footprint(size, self._written)

    def _cross_check(self, batch: Any, some: Sequence[int], plain: Tensor) -> None:
        """Compare the grid with the plain masked network at some levels; else fall back."""
        reason = ""
        layouts = (True, False) if self._batch_minor else (False,)
        for self._batch_minor in layouts:
            try:
                outputs = self._grid_outputs(batch, some)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                continue
            reason = difference(outputs, plain)
            if not reason:
                return
        self._fall_back(reason)

    def _fall_back(self, reason: str) -> None:
        self.fallback = reason
        self.notes.append(f"evaluated level by level: {reason}")
        warn(
            "the levels are evaluated one by one, as plain masked networks, which takes longer: "
            f"{reason}"
        )


class _NotSeen(RuntimeError):
    """A prunable weight was used where no torch function saw it."""
