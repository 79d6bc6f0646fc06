"""Verification: the certified network, run plainly on the calibration data, has the stated risks.

Nothing of the grid forward or of the tests takes part: the model and a pruned copy of it, masked or
compressed, are called on the examples that the certified level was tested on, and their losses are
averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from confprune.batches import (
    batch_length,
    check_data,
    example_count,
    order_length,
    ordering_size,
    permutable,
    random_order,
    slice_batch,
)
from confprune.calling import Forward, call, check_forward, reference_of
from confprune.certificate.consistency import why_unsupported
from confprune.certificate.evidence import Part
from confprune.copies import running_copy
from confprune.evaluation import moved_batches, progress_bar
from confprune.grid.network import eagerly
from confprune.losses import BUILT_IN, Loss, LossLike, check_shapes, cloned, resolve_loss
from confprune.risks import Accept, Groups, group_labels, resolve_accept

if TYPE_CHECKING:
    from confprune.certificate import Certificate


class VerificationError(ValueError):
    """The risk is not the one that the certificate states, or does not show what it promises."""


def verify(
    certificate: Certificate,
    model: nn.Module | None,
    pruned: Callable[[int], nn.Module],
    data: Any,
    *,
    loss: LossLike | Sequence[LossLike] | None = None,
    groups: Groups | None = None,
    accept: Accept | None = None,
    forward: Forward | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> float:
    """Compute a certificate's risks again and compare; see `confprune.Certificate.verify`.

    Parameters
    ----------
    certificate : Certificate
    model : Module or None
        The full network, where it is at hand.
    pruned : callable
        From a level to the pruned network.
    data, loss, groups, accept, forward, batch_size, progress
        As for `confprune.Certificate.verify`.

    Returns
    -------
    float

    Raises
    ------
    VerificationError, ValueError
        As for `confprune.Certificate.verify`.
    """
    level = certificate.level
    if level is None:
        raise ValueError("nothing was certified: there is no risk to verify")
    check_data(data, batch_size)
    check_forward(forward)
    parts = certificate.parts or (_whole(certificate, level),)
    measures = _losses(parts, loss)
    rule = _acceptance_rule(certificate, accept)
    if groups is None and any(part.group is not None for part in parts):
        raise ValueError("the risks are kept by group: pass groups= as given to calibrate")
    if certificate.guarantee != "risk" and isinstance(data, Iterator):
        raise ValueError("a monotonised loss takes every level: give data that can be read again")
    order, examples = _tested_examples(certificate, data, level)

    def measure(j: int) -> _Measured:
        return _measure(
            model,
            pruned(j),
            data,
            measures if rule is None else [*measures, rule],
            groups=groups,
            forward=forward,
            batch_size=batch_size,
            progress=progress,
            order=order,
            examples=examples,
        )

    measured = measure(level)
    _check_number(certificate, measured.values.shape[1], examples)
    if certificate.guarantee != "risk":
        for denser in range(level):
            np.maximum(measured.values, measure(denser).values, out=measured.values)
    rows = {of.name: row for of, row in zip(measures, measured.values, strict=False)}
    risks = {}
    for part in parts:
        counted = np.ones(measured.values.shape[1], dtype=bool)
        if part.group is not None:
            counted &= measured.labels == part.group
        if rule is not None:
            counted &= measured.values[-1] > 0.5
        risks[part.name] = _compare(certificate, part, level, rows[part.loss][counted])
    unsupported = why_unsupported(certificate, parts, level)
    if unsupported is not None:
        raise VerificationError(unsupported)
    return risks[(certificate.binding or parts[0]).name]


def plain_risk(
    model: nn.Module,
    pruned: nn.Module,
    data: Any,
    loss: LossLike,
    *,
    forward: Forward | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[float, int]:
    """The mean loss of a pruned network, run as it is, and the number of examples.

    Examples
    --------
    >>> from confprune.certificate.verification import plain_risk
    >>> model = torch.nn.Linear(4, 2)
    >>> plain_risk(model, model, torch.randn(10, 4), "disagreement", progress=False)
    (0.0, 10)
    """
    values = _measure(
        model,
        pruned,
        data,
        [resolve_loss(loss)],
        forward=forward,
        batch_size=batch_size,
        progress=progress,
    ).values[0]
    return float(values.mean()), len(values)


@dataclass(frozen=True)
class _Measured:
    """Measures [M, n] float64 of n examples, and the groups of these."""

    values: NDArray[np.float64]
    labels: NDArray[np.str_]


class _WithoutFull(NamedTuple):
    """What a pruned network is compared with where the full one is not at hand."""

    targets: Tensor | None
    mask: Tensor | None

    def clone(self) -> _WithoutFull:
        return _WithoutFull(cloned(self.targets), cloned(self.mask))

    @property
    def outputs(self) -> Tensor:
        raise ValueError(
            "the risk is one against the full network: pass full=, the network that was calibrated"
        )


def _measure(
    model: nn.Module | None,
    pruned: nn.Module,
    data: Any,
    measures: Sequence[Loss],
    *,
    groups: Groups | None = None,
    forward: Forward | None,
    batch_size: int | None,
    progress: bool,
    order: Tensor | None = None,
    examples: int | None = None,
) -> _Measured:
    """Run the networks through the examples, the first so many if a number is given."""
    values: list[Tensor] = []
    labels: list[str] = []
    seen = 0
    pruned = running_copy(pruned)
    model = None if model is None else running_copy(model)
    with (
        torch.no_grad(),
        eagerly(),
        progress_bar(data, order, progress, "verify") as bar,
    ):
        for whole in moved_batches(pruned, data, batch_size, order):
            left = batch_length(whole) if examples is None else examples - seen
            batch = slice_batch(whole, 0, left) if batch_length(whole) > left else whole
            outputs = call(pruned, batch, forward)
            reference: Any = reference_of(
                outputs if model is None else call(model, batch, forward), batch
            )
            for measure in measures:
                check_shapes(measure, outputs, reference)
            if model is None:
                reference = _WithoutFull(reference.targets, reference.mask)
            values.append(torch.stack([of(outputs, reference).double() for of in measures]).cpu())
            if groups is not None:
                labels += group_labels(batch, groups)
            seen += batch_length(batch)
            bar.update(batch_length(batch))
            if seen == examples:
                break
    return _Measured(torch.cat(values, dim=1).numpy(), np.array(labels, dtype=np.str_))


def _whole(certificate: Certificate, level: int) -> Part:
    """The one risk of a certificate without parts, at the certified level."""
    count = _seen(certificate, level)
    if certificate.acceptance is not None:
        count = round(count * certificate.acceptance[level])
    counts = [0] * len(certificate.sparsities)
    counts[level] = count
    return Part(
        loss=certificate.loss,
        pvalue=certificate.pvalue,
        alpha=certificate.alpha,
        group=None,
        counts=tuple(counts),
        risks=certificate.risks,
        pvalues=certificate.pvalues,
        bounds=certificate.bounds,
    )


def _seen(certificate: Certificate, level: int) -> int:
    return certificate.n if certificate.looks is None else certificate.looks.seen[level]


def _losses(parts: Sequence[Part], given: LossLike | Sequence[LossLike] | None) -> list[Loss]:
    """The losses of the parts: those given, the others built in."""
    if given is None:
        given = []
    elif isinstance(given, str | Loss) or callable(given):
        given = [given]
    own = {loss.name: loss for loss in map(resolve_loss, given)}
    names = list(dict.fromkeys(part.loss for part in parts))
    for name in own:
        if name not in names:
            about = ", ".join(map(repr, names))
            raise ValueError(f"the certificate is about the loss {about}, not {name!r}")
    for name in names:
        if name not in own and name not in BUILT_IN:
            raise ValueError(f"the loss {name!r} is not built in: pass it as loss=")
    return [own.get(name) or BUILT_IN[name] for name in names]


def _acceptance_rule(certificate: Certificate, accept: Accept | None) -> Loss | None:
    rule = None if accept is None else resolve_accept(accept)
    if (None if rule is None else rule.name) == certificate.accept:
        return rule
    if rule is None:
        raise ValueError(
            f"the risk is among accepted predictions ({certificate.accept}): pass accept= as given "
            "to calibrate"
        )
    about = "all predictions" if certificate.accept is None else repr(certificate.accept)
    raise ValueError(f"the certificate is about {about}, not {rule.name!r}")


def _tested_examples(
    certificate: Certificate, data: Any, level: int
) -> tuple[Tensor | None, int | None]:
    """The order in which the level was tested, where it can be had, and how many examples of it.

    None for an order that does not matter or is that of the data; None for all examples.
    """
    looks = certificate.looks
    examples = None if looks is None else looks.seen[level]
    set_aside = certificate.procedure == "split_fixed_sequence"
    if not permutable(data):
        if set_aside or (looks is not None and looks.order == "permuted"):
            raise ValueError(
                "the level was tested on a random part of the examples, which this data cannot "
                "give: verify needs the map-style Dataset or the tensors that were calibrated on"
            )
        count = example_count(data)
        if count is not None:
            _check_total(certificate, count)
        return None, examples
    pruning = certificate.pruning
    scored = 0 if pruning is None or pruning.score_data is None else pruning.score_data.taken
    total = order_length(data)
    aside = scored + (ordering_size(total - scored) if set_aside else 0)
    _check_total(certificate, total - aside)
    if certificate.seed is None or (looks is not None and looks.order == "given"):
        order = torch.arange(total)
    else:
        order = random_order(data, certificate.seed)
    return order[aside:][:examples], examples


def _check_number(certificate: Certificate, count: int, examples: int | None) -> None:
    """Refuse a stream that had another number of examples than could be known before."""
    if examples is None:
        _check_total(certificate, count)
    elif count != examples:
        raise VerificationError(
            f"the certified level was tested on {examples} examples, the data has {count}: "
            "give the data that was calibrated on"
        )


def _check_total(certificate: Certificate, count: int) -> None:
    if count != certificate.n:
        raise VerificationError(
            f"the certificate rests on {certificate.n} examples, the data has {count}: "
            "give the data that was calibrated on"
        )


def _compare(
    certificate: Certificate, part: Part, level: int, losses: NDArray[np.float64]
) -> float:
    """The mean of the losses that count for a part; an error if it is not the stated one."""
    pruning = certificate.pruning
    assert pruning is not None
    dtypes = {entry["dtype"] for entry in pruning.fingerprint.values()}
    near_ties = 1e-3 if dtypes <= {"float32", "float64"} else 1e-2
    count, stated = len(losses), part.counts[level]
    of = f" of {part.name}" if certificate.parts else ""
    # Which predictions are accepted may hang on a near-tie; who is in a group does not.
    allowed = 0.0 if certificate.accept is None else near_ties * _seen(certificate, level) + 2
    if abs(count - stated) > allowed:
        raise VerificationError(
            f"the certificate counts {stated} examples{of}, the data has {count} of them: "
            "give the data that was calibrated on"
        )
    risk = float(losses.mean()) if count else float("nan")
    tolerance = near_ties + 2 / max(count, 1)
    # Not `>`, which a NaN would pass.
    if not abs(risk - part.risks[level]) <= tolerance:
        raise VerificationError(
            f"the certificate states a risk{of} of {part.risks[level]:.6g} at "
            f"{certificate.sparsities[level]:g} sparsity, the pruned network has {risk:.6g} on "
            f"this data (tolerance {tolerance:.2g}): the data is other, or the certificate was "
            "made with another forward="
        )
    return risk
