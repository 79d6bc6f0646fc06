"""What criteria need beside the weights, measured on data that calibration never sees.

Scores that were made from the calibration examples would depend on them, and so would the networks
under test: the guarantee would not hold. So either a set of data of its own is given, or examples
are taken off the calibration data before anything else is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from confprune.batches import (
    check_data,
    example_count,
    is_batched,
    order_length,
    permutable,
    random_order,
)
from confprune.calling import Forward
from confprune.certificate.evidence import ScoreData
from confprune.criteria import Criterion, Statistics
from confprune.input_norms import input_norms
from confprune.overlap import overlap
from confprune.parameters import ParameterFilter

MEASURED: dict[str, Callable[..., dict[str, Tensor]]] = {"input_norm": input_norms}
"""The statistics that are measured on data, by functions with the arguments of `input_norms`."""

_SHARE, _MOST = 10, 256


def score_size(n: int) -> int:
    """How many of `n` examples are set aside for scores: a tenth, but no more than 256.

    The statistics are means over examples and settle early: the paper of wanda takes 128.

    Examples
    --------
    >>> from confprune.scoring import score_size
    >>> score_size(1000), score_size(10_000)
    (100, 256)
    """
    return min(max(1, n // _SHARE), _MOST)


@dataclass(frozen=True)
class Scoring:
    """What the criteria of a calibration need, and where it comes from; made by `plan_scoring`.

    Attributes
    ----------
    measured : tuple of str
        The statistics to measure.
    given : mapping
        Those that the caller brings.
    data : data, or None
        The caller's own for the scores.
    record : ScoreData or None
        What the certificate says of the data; None where no data is needed.
    """

    measured: tuple[str, ...]
    given: Statistics
    data: Any
    record: ScoreData | None

    def statistics(
        self,
        model: nn.Module,
        data: Any,
        *,
        parameters: ParameterFilter | None,
        forward: Forward | None,
        batch_size: int | None,
        seed: int,
        progress: bool,
    ) -> Statistics:
        """All statistics, those to be measured from the data set aside."""
        found: dict[str, Any] = dict(self.given)
        order = None
        if self.data is not None:
            data, batch_size = self.data, None if is_batched(self.data) else batch_size
        elif self.record is not None:
            order = random_order(data, seed)[: self.record.examples]
        for name in self.measured:
            found[name] = MEASURED[name](
                model,
                data,
                parameters=parameters,
                forward=forward,
                batch_size=batch_size,
                order=order,
                progress=progress,
            )
        return found


def plan_scoring(
    criteria: Sequence[Criterion], data: Any, score_data: Any, statistics: Statistics | None
) -> Scoring:
    """Where what the criteria need will come from.

    Raises
    ------
    TypeError
        If `statistics` is no mapping.
    ValueError
        If score data shares examples with the calibration data, is given in vain, or is needed and
        cannot be taken off the data; if statistics of unknown data are given.
    """
    if statistics is not None and not isinstance(statistics, Mapping):
        raise TypeError(
            "statistics must be a mapping from names to statistics, such as {'deviation': "
            f"observer.deviations()}}, got {type(statistics).__name__}"
        )
    given = statistics or {}
    needs = list(dict.fromkeys(need for criterion in criteria for need in criterion.needs))
    measured = tuple(need for need in needs if need in MEASURED)
    for name in given:
        if name in MEASURED:
            raise ValueError(
                f"statistic {name!r} is measured on data, which calibration must not see: give "
                "score_data= instead of statistics"
            )
        if name not in needs:
            raise ValueError(f"statistic {name!r} is needed by none of the criteria; leave it out")
    names = ", ".join(repr(str(c)) for c in criteria if set(c.needs) & set(MEASURED))
    if not measured:
        if score_data is not None:
            raise ValueError("score_data is needed by none of the criteria; leave it out")
        return Scoring((), given, None, None)
    if score_data is None:
        if not permutable(data):
            raise ValueError(
                f"criterion {names} makes its scores from examples that do not calibrate, and none "
                "can be set aside from data that cannot be permuted: give score_data="
            )
        return Scoring(measured, given, None, ScoreData("split", score_size(order_length(data))))
    check_data(score_data, None)
    if overlap(score_data, data):
        raise ValueError(
            "score_data shares examples with data: scores must come from examples that do not "
            "calibrate; give others, or leave score_data out to have some set aside"
        )
    count = order_length(score_data) if permutable(score_data) else example_count(score_data)
    return Scoring(measured, given, score_data, ScoreData("given", count))
