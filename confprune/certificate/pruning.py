"""From what a certificate says of the pruning to the pruned network."""

from __future__ import annotations

from torch import nn

from confprune.certificate.evidence import Pruning
from confprune.certificate.fingerprint import difference, fingerprint
from confprune.criteria import Statistics
from confprune.levels import prune_levels
from confprune.parameters import check_module, named_parameters


def check_same_weights(pruning: Pruning, model: nn.Module, way_out: str = "") -> None:
    """Raise ValueError, naming the difference, for another network than the one calibrated."""
    check_module(model)
    parameters = named_parameters(model)
    found = {name: parameters[name] for name in pruning.parameters if name in parameters}
    differs = difference(pruning.fingerprint, fingerprint(found))
    if differs is not None:
        raise ValueError(f"the certificate is for another network: {differs}{way_out}")


def pruned_copy(
    pruning: Pruning, model: nn.Module, sparsity: float, statistics: Statistics | None
) -> nn.Module:
    """A masked copy of the network that was calibrated, at any sparsity.

    Parameters
    ----------
    pruning : Pruning
    model : Module
    sparsity : float
    statistics : mapping, optional
        What the scores were made from; by default what is still in memory.

    Raises
    ------
    ValueError
        If the statistics are needed and not given, or others.
    """
    levels = prune_levels(
        model,
        [sparsity],
        scope=pruning.scope,
        criterion=pruning.criterion,
        pattern=pruning.pattern,
        parameters=list(pruning.parameters),
        statistics=_known(pruning, statistics),
    )
    return levels.prune(model, 0)


def _known(pruning: Pruning, statistics: Statistics | None) -> Statistics:
    """The statistics that the certificate was made with, given again or still in memory."""
    if statistics is None:
        if pruning.statistics and not pruning.kept:
            raise ValueError(
                f"criterion {pruning.criterion!r} was certified with statistics "
                f"({', '.join(pruning.statistics)}), which a certificate's file does not hold: "
                "pass statistics=, stored from certificate.statistics after the calibration"
            )
        return pruning.kept
    for name, expected in pruning.statistics.items():
        differs = difference(expected, fingerprint(statistics.get(name, {})))
        if differs is not None:
            raise ValueError(f"the certificate rests on another statistic {name!r}: {differs}")
    return statistics
