"""From a network and data to a certificate: the one place that sees the whole line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from confprune.batches import check_data, check_independent
from confprune.calling import Forward, check_forward
from confprune.certificate import Certificate
from confprune.certify import certify, versions
from confprune.competition import reachable
from confprune.criteria import CriterionLike, Statistics
from confprune.devices import on_device
from confprune.distributed import Ranks
from confprune.evaluation import Evaluation, evaluate_all
from confprune.grid import GridForward
from confprune.levels import PruneLevels, check_sparsities, prune_levels
from confprune.losses import LossLike, resolve_loss
from confprune.ops import check_kernels
from confprune.parameters import ParameterFilter, check_module, prunable_parameters
from confprune.question import Question, check_enough, needs_more
from confprune.risk.bounds import upper_bound
from confprune.risk.inputs import check_losses, check_probability, loss_sums, losses_are_binary
from confprune.risk.looks import LookPlan
from confprune.risk.procedures import resolve_procedure
from confprune.risk.pvalues import resolve_pvalue
from confprune.risks import Accept, Groups, Risk, resolve_accept, resolve_risks
from confprune.scoring import plan_scoring
from confprune.ways import Way, resolve_ways

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TestingProcedure: TypeAlias = Callable[..., np.ndarray]
"""Testing of K p-values at level delta: (pvalues [K], delta) -> bool [K]."""

DEFAULT_SPARSITIES = tuple(j / 100 for j in range(100))


def loss_matrix(
    model: nn.Module,
    data: Any,
    levels: PruneLevels,
    loss: LossLike,
    *,
    forward: Forward | None = None,
    batch_size: int | None = None,
    activation_bytes: int | None = None,
    progress: bool = True,
) -> Tensor:
    """The loss of every example at every level, in one pass over the data.

    Parameters
    ----------
    model : torch.nn.Module
        A copy with its parameters is run, in evaluation mode, where they are.
    data : Dataset, DataLoader, tuple of tensors, or iterable of batches
        A batch is (inputs, targets), inputs alone, or a mapping.
    levels : PruneLevels
        Of this model.
    loss : str, Loss, or callable (outputs [B, ...], reference) -> [B]
    forward : callable (model, batch) -> outputs, optional
        For models that are not called with the inputs alone.
    batch_size : int, optional
        For data that is not in batches yet; default 256.
    activation_bytes : int, optional
        Memory for the activations of a chunk of levels and examples; default 64 MiB, or an eighth
        of a GPU's memory, up to 8 GiB. The result does not depend on it.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Tensor [n, K], float32, on the CPU

    Raises
    ------
    ValueError, TypeError
        For data or outputs that do not fit, and for a loss that is NaN or outside [0, 1]. For a
        model that cannot be copied, or whose pruned networks cannot be told: one that writes to its
        weights or keeps what it makes of them, or for which the mode of evaluation makes others.

    Examples
    --------
    >>> import torch, confprune
    >>> model = torch.nn.Linear(8, 3)
    >>> levels = confprune.prune_levels(model, [0.0, 0.5])
    >>> confprune.loss_matrix(model, torch.randn(20, 8), levels, "disagreement").shape
    torch.Size([20, 2])
    """
    check_module(model)
    if not isinstance(levels, PruneLevels):
        raise TypeError(
            f"levels must be the PruneLevels that prune_levels(model, sparsities) returns, got "
            f"{type(levels).__name__}"
        )
    resolved = resolve_loss(loss)
    check_data(data, batch_size)
    check_independent(data)
    check_forward(forward)
    _check_budget(activation_bytes)
    grid = GridForward(
        model, levels, [resolved], forward=forward, activation_bytes=activation_bytes
    )
    evaluation = Evaluation(model, [grid], [(0, j) for j in range(len(levels))], [resolved])
    evidence = evaluate_all(evaluation, data, batch_size=batch_size, order=None, progress=progress)
    return torch.from_numpy(evidence.losses[0])


def calibrate_losses(
    losses: np.ndarray | Tensor,
    sparsities: Sequence[float],
    alpha: float,
    delta: float,
    *,
    pvalue: str = "auto",
    procedure: str | TestingProcedure = "fixed_sequence",
) -> Certificate:
    """Certify a level from a loss matrix, by Learn-then-Test.

    Parameters
    ----------
    losses : [n, K], in [0, 1]
        Row = example (independent, identically distributed), column = level.
    sparsities : [K]
        Strictly increasing, in [0, 1).
    alpha, delta : float in (0, 1)
        With probability at least 1 - delta the risk of the certified level is at most alpha.
    pvalue : str
        "auto" is "binomial" for losses of 0 and 1, else "convex"; see `confprune.risk.pvalues`.
    procedure : str, or callable (pvalues [K], delta) -> bool [K]
        How many levels are tested together; see `confprune.risk.testing`.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        For arguments that do not fit, and where `n` is too small to certify even zero losses.

    References
    ----------
    Angelopoulos et al., "Learn then Test", arXiv 2110.01052, Theorem 1.

    Examples
    --------
    >>> import numpy as np, confprune
    >>> losses = np.zeros((100, 2)); losses[:50, 1] = 1
    >>> confprune.calibrate_losses(losses, [0.5, 0.9], alpha=0.05, delta=0.1).sparsity
    0.5
    """
    grid = check_sparsities(sparsities)
    check_probability("alpha", alpha)
    check_probability("delta", delta)
    test = resolve_procedure(procedure)
    if test.needs:
        raise ValueError(needs_more(test))
    resolve_pvalue(pvalue, losses_are_binary=True)
    if isinstance(losses, Tensor):
        wide = torch.float64 if losses.dtype == torch.float64 else torch.float32
        losses = losses.detach().to("cpu", wide).numpy()
    losses = check_losses(losses)
    if losses.shape[1] != len(grid):
        raise ValueError(f"losses has {losses.shape[1]} columns for {len(grid)} sparsities")
    check_enough(len(losses), alpha, delta)
    kind = resolve_pvalue(pvalue, losses_are_binary(losses))
    values = kind.from_losses(losses, alpha)
    return Certificate(
        sparsities=grid,
        alpha=alpha,
        delta=delta,
        n=len(losses),
        loss="losses",
        pvalue=kind.name,
        procedure=test.name,
        risks=tuple(loss_sums(losses) / len(losses)),
        pvalues=tuple(values),
        bounds=tuple(upper_bound(losses, delta, kind.name)),
        rejected=tuple(test.test(values, delta)),
        versions=versions(),
    )


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    loss: LossLike | None = None,
    alpha: float | None = None,
    delta: float | None = None,
    risks: Sequence[Risk] | None = None,
    groups: Groups | None = None,
    accept: Accept | None = None,
    sparsities: Sequence[float] | np.ndarray | Tensor | None = None,
    scope: str | Sequence[str] | None = None,
    criterion: CriterionLike | Sequence[CriterionLike] = "magnitude",
    pattern: str | Sequence[str | None] | None = None,
    parameters: ParameterFilter | None = None,
    score_data: Any = None,
    statistics: Statistics | None = None,
    pvalue: str = "auto",
    procedure: str | TestingProcedure = "fixed_sequence",
    looks: LookPlan | str | None = "auto",
    order: str = "random",
    guarantee: str = "risk",
    forward: Forward | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    activation_bytes: int | None = None,
    seed: int = 0,
    progress: bool = True,
    group: ProcessGroup | None = None,
) -> Certificate:
    """The sparsest magnitude-pruned network whose risk is certified.

    With probability at least 1 - delta over the calibration data, the expected loss on new data of
    the network pruned to the certified sparsity is at most alpha.

    Parameters
    ----------
    model : torch.nn.Module
        A copy with its parameters is evaluated, in evaluation mode.
    data : Dataset, DataLoader, tuple of tensors, or iterable of batches
        Independent, identically distributed examples that the model was not trained on. A batch is
        (inputs, targets), inputs alone, or a mapping (Hugging Face).
    loss : str, Loss, or callable (outputs [B, ...], reference) -> [B]
        Values in [0, 1]; see `confprune.losses`.
    alpha, delta : float in (0, 1)
    risks : sequence of Risk, optional
        Several losses, each with its alpha, to be kept all at once, instead of `loss` and `alpha`.
    groups : key of the batch, "targets", or callable (batch) -> groups [B], optional
        Keep the risk on every group of the examples.
    accept : callable (outputs, reference) -> [B], optional
        Count only accepted predictions, such as ``confprune.confident(0.9)``; the risk is the
        expected loss given acceptance.
    sparsities : [K], optional
        Strictly increasing, in [0, 1); default 0, 0.01, ..., 0.99.
    scope : {"global", "layer", "row"}, or several
        Whether the weights of all layers compete, those of each layer alone, or those of each
        output. Default: the criterion's own, "global" for all but "wanda".
    criterion : str, function of `confprune.criteria`, or several
        How weights are scored; see `confprune.criteria`.
    pattern : str or None, or several
        What is pruned together: "N:4", "4x4", "rows"; see `confprune.patterns`. With several
        criteria, scopes or patterns a fifth of the data orders all candidates and the rest tests
        along that order; the best certified candidate is returned.
    parameters : names, or predicate (name, parameter) -> bool, optional
        Default: the weights of linear layers and convolutions.
    score_data : data, optional
        For criteria whose scores are made from data, such as "wanda": examples that are not in
        `data`. Default: a tenth of `data`, at most 256 examples, is set aside for that and does not
        calibrate.
    statistics : mapping, optional
        What criteria need that is not made from data: ``{"deviation": observer.deviations()}``.
    pvalue, procedure : str
        As for `calibrate_losses`; "auto" goes by what the loss says of its values, and is "betting"
        where these are not 0 or 1 and there are early looks.
    looks : "auto", LookPlan, or None
        Early looks: levels whose fate is settled are not evaluated further. "auto" plans them where
        the examples can be permuted. None: one test on all examples, the paper's.
    order : {"random", "given"}
        "given" takes the order of data that cannot be permuted for a random one.
    guarantee : {"risk", "expectation", "monotone"}
        "risk": by testing, as above. "expectation": conformal risk control, the expectation over
        calibration data and new example of the monotonised loss is at most alpha (delta is not
        used). "monotone": upper confidence bounds on the monotonised risk.
    forward : callable (model, batch) -> outputs, optional
    batch_size : int, optional
        For data that is not in batches yet; default 256.
    device : optional
        Where to run; default where the model is. A model elsewhere is copied there.
    activation_bytes : int, optional
        Memory for the activations of a chunk of levels and examples; default 64 MiB, or an eighth
        of a GPU's memory, up to 8 GiB.
    seed : int
        Of the order of the examples; recorded in the certificate.
    progress : bool
        Show a progress bar.
    group : torch.distributed.ProcessGroup, optional
        Ranks that share the work, such as ``torch.distributed.group.WORLD``: all call with the
        same model, data and settings and read all of the data, each evaluates a part of the
        examples, and the losses are put together before each look.

    Returns
    -------
    Certificate
        The same on every rank of a group, and the same to the last bit as that of a single process
        with as many threads on the same hardware.
        Nothing certifiable is an ordinary outcome: then `certificate.certified` is False.

    Raises
    ------
    ValueError, TypeError
        Before any work: for settings that contradict each other, data or outputs that do not fit,
        NaN weights, or too few examples, in all or in a group, to certify even zero losses; for
        ranks whose models, data or settings differ; for models as `loss_matrix` refuses them.
    RankError
        If another rank of the group failed, with its reason, or did not come within the timeout of
        the group.

    References
    ----------
    Alvarez, "Confident magnitude-based neural network pruning", arXiv 2408.04759.
    Angelopoulos et al., "Learn then Test", arXiv 2110.01052. Several candidates: Laufer-Goldshtein
    et al., "Efficiently controlling multiple risks with Pareto Testing", arXiv 2210.07913.
    "expectation": Angelopoulos et al., arXiv 2208.02814, Theorem 1. "monotone": Bates et al.,
    arXiv 2101.02703, Theorem 1.

    Examples
    --------
    >>> import torch, confprune
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(16, 4)
    >>> data = torch.randn(500, 16)
    >>> certificate = confprune.calibrate(
    ...     model, data, loss="disagreement", alpha=0.1, delta=0.1, progress=False
    ... )
    >>> 0 < certificate.sparsity < 0.5
    True
    """
    with Ranks(group).together() as ranks:
        check_module(model)
        resolved = resolve_risks(loss, alpha, risks, pvalue)
        grid = None if sparsities is None else check_sparsities(sparsities)
        check_data(data, batch_size)
        check_forward(forward)
        _check_budget(activation_bytes)
        ways = resolve_ways(criterion, scope, pattern)
        scoring = plan_scoring([way.criterion for way in ways], data, score_data, statistics)
        question = Question(
            risks=resolved,
            delta=math.nan if guarantee == "expectation" else _needed_delta(delta),
            groups=groups,
            accept=None if accept is None else resolve_accept(accept),
            pvalue=pvalue,
            procedure=resolve_procedure(procedure),
            looks=looks,
            order=order,
            guarantee=guarantee,
            seed=seed,
            score_data=scoring.record,
        )
        question.check(data, len(ways))
        where = on_device(model, device)
        check_kernels(parameter.device for parameter in where.parameters())
        reading: dict[str, Any] = {
            "forward": forward,
            "batch_size": batch_size,
            "progress": progress and ranks.rank == 0,
        }
        if grid is None:
            grid = _default_grid(prunable_parameters(where, parameters), ways)
        found = scoring.statistics(where, data, parameters=parameters, seed=seed, **reading)
        levels = [
            prune_levels(where, grid, parameters=parameters, statistics=found, **way._asdict())
            for way in ways
        ]
        return certify(
            question, where, data, levels, activation_bytes=activation_bytes, ranks=ranks, **reading
        )


def _default_grid(prunable: Mapping[str, Tensor], ways: Sequence[Way]) -> tuple[float, ...]:
    """The sparsities that are tried where none are given: all that every way can reach."""
    sizes = [parameter.numel() for parameter in prunable.values()]
    grid = tuple(DEFAULT_SPARSITIES)
    for way in ways:
        for own in [sizes] if way.scope == "global" else [[size] for size in sizes]:
            grid = reachable(grid, way.criterion, own)
    return grid


def _check_budget(activation_bytes: object) -> None:
    """Raise for what is no number of bytes; None is fine."""
    if activation_bytes is None:
        return
    if not isinstance(activation_bytes, int | np.integer):
        raise TypeError(
            "activation_bytes must be a whole number of bytes, such as 1 << 30, got "
            f"{activation_bytes!r}"
        )
    if activation_bytes < 1:
        raise ValueError(f"activation_bytes must be positive, got {activation_bytes}")


def _needed_delta(delta: float | None) -> float:
    if delta is None:
        raise ValueError("give delta=, the largest probability of a false claim, such as delta=0.1")
    return delta
