"""Whether the ranks of a process group ask the same of the same network on the same data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter

from confprune.batches import example_count
from confprune.certificate.fingerprint import fingerprint
from confprune.distributed import Ranks
from confprune.levels import PruneLevels
from confprune.question import Question


def check_agreement(
    ranks: Ranks,
    question: Question,
    data: Any,
    stream: Iterator[Any],
    ways: Sequence[PruneLevels],
    weights: Sequence[Any],
) -> None:
    """Raise ValueError, on all ranks, unless they agree on everything that can be compared.

    A loss is known by its name alone, and data by its length and first batch: enough to notice that
    each rank was given a part of it.

    Parameters
    ----------
    ranks : Ranks
    question : Question
    data : Dataset, DataLoader, tuple of tensors, or list of batches
    stream : iterator
        Over the batches of `data`, in the order of the calibration.
    ways : sequence of PruneLevels
    weights : sequence
        Their fingerprints.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            "with group= the data is read more than once, which an iterator cannot be: give "
            "tensors, a Dataset, a DataLoader or a list of batches"
        )
    batch = [leaf for leaf in tree_iter(next(stream)) if isinstance(leaf, Tensor)]
    first = fingerprint({str(position): tensor for position, tensor in enumerate(batch)})
    ranks.agree(
        {
            "the settings": (
                [(risk.loss.name, risk.alpha) for risk in question.risks],
                (repr(question.delta), question.pvalue, question.procedure.name, question.looks),
                (question.guarantee, question.seed, question.order, question.score_data),
                [(way.sparsities, way.scope, way.criterion, way.pattern) for way in ways],
            ),
            "the model": weights,
            "the data, whole and in one order,": (example_count(data), first),
        }
    )
