"""Pruning criteria: functions from a weight, and what else they need, to its scores.

========================== ================================================== ==================
name                       score of a weight                                  needs
========================== ================================================== ==================
``magnitude``              its absolute value; ``min_per_layer`` largest of
                           each layer are never pruned
``magnitude_uncertainty``  absolute value / (``damping`` + standard deviation ``deviation``
                           over the last training steps)
``lamp``                   its square over the squares that outlive it in its
                           layer
``erdos_renyi_kernel``     magnitude within layers of Erdős–Rényi-kernel
                           budgets
``wanda``                  absolute value times the norm of its input, ranked ``input_norm``
                           within each output
``random``                 chance: a control
========================== ================================================== ==================

The weights with the smallest absolute scores are pruned first. A criterion is named by text,
``"magnitude"`` or ``"magnitude(min_per_layer=100)"``, or by a function of the table, plain or in a
``functools.partial`` with its settings.

To add one, write a function from a weight to scores of the same shape and name it in `CRITERIA`.
Keyword-only parameters with a default are its settings; those without are what it needs: the
statistic of that name (see `confprune.prune_levels`), or ``position``, the index of the weight's
parameter among the pruned ones.
"""

from confprune.criteria.layers import erdos_renyi_kernel, lamp
from confprune.criteria.observer import WeightObserver
from confprune.criteria.registry import CRITERIA, Criterion, CriterionLike, resolve_criterion
from confprune.criteria.scores import Scores, Statistics
from confprune.criteria.weights import magnitude, magnitude_uncertainty, random, wanda

__all__ = [
    "CRITERIA",
    "Criterion",
    "CriterionLike",
    "Scores",
    "Statistics",
    "WeightObserver",
    "erdos_renyi_kernel",
    "lamp",
    "magnitude",
    "magnitude_uncertainty",
    "random",
    "resolve_criterion",
    "wanda",
]
