"""From a network and data to a certificate: the one place that sees the whole line."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import confprune
from confprune.batches import (
    Forward,
    batch_length,
    batches,
    check_data,
    example_count,
    move_batch,
)
from confprune.certificate import Certificate, Pruning
from confprune.fingerprint import fingerprint
from confprune.grid import ACTIVATION_BYTES, GridForward, evaluation_mode, plain_losses
from confprune.levels import PruneLevels, check_sparsities, prune_levels
from confprune.losses import Loss, LossLike, resolve_loss
from confprune.parameters import ParameterFilter
from confprune.risk.bounds import required_n, upper_bound
from confprune.risk.inputs import check_losses, check_probability, loss_sums, losses_are_binary
from confprune.risk.pvalues import resolve_pvalue
from confprune.risk.testing import resolve_procedure

DEFAULT_SPARSITIES = tuple(j / 100 for j in range(100))
_ROUNDING = 1e-5  # a loss may leave [0, 1] by this much in float arithmetic


def loss_matrix(
    model: nn.Module,
    data: Any,
    levels: PruneLevels,
    loss: LossLike,
    *,
    forward: Forward | None = None,
    batch_size: int | None = None,
    activation_bytes: int = ACTIVATION_BYTES,
    progress: bool = True,
) -> Tensor:
    """The loss of every example at every level, in one pass over the data.

    Parameters
    ----------
    model : torch.nn.Module
        Run in evaluation mode where its parameters are; left as it was.
    data : Dataset, DataLoader, tuple of tensors, or iterable of batches
        A batch is (inputs, targets), inputs alone, or a mapping.
    levels : PruneLevels
        Of this model.
    loss : str, Loss, or callable (outputs [B, ...], reference) -> [B]
    forward : callable (model, batch) -> outputs, optional
        For models that are not called with the inputs alone.
    batch_size : int, optional
        For data that is not in batches yet; default 256.
    activation_bytes : int
        Memory for the activations of the levels and examples evaluated together. The result does
        not depend on it.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Tensor [n, K], float32, on the CPU

    Raises
    ------
    ValueError, TypeError
        For data or outputs that do not fit, and for a loss that is NaN or outside [0, 1].

    Examples
    --------
    >>> import torch, confprune
    >>> model = torch.nn.Linear(8, 3)
    >>> levels = confprune.prune_levels(model, [0.0, 0.5])
    >>> confprune.loss_matrix(model, torch.randn(20, 8), levels, "disagreement").shape
    torch.Size([20, 2])
    """
    loss = resolve_loss(loss)
    check_data(data, batch_size)
    grid = GridForward(model, levels, [loss], forward=forward, activation_bytes=activation_bytes)
    return _loss_matrix(grid, model, data, batch_size, progress)


def calibrate_losses(
    losses: np.ndarray | Tensor,
    sparsities: Sequence[float],
    alpha: float,
    delta: float,
    *,
    pvalue: str = "auto",
    procedure: str = "fixed_sequence",
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
    procedure : str
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
    _check_settings(alpha, delta, pvalue, procedure)
    if isinstance(losses, Tensor):
        wide = torch.float64 if losses.dtype == torch.float64 else torch.float32
        losses = losses.detach().to("cpu", wide).numpy()
    losses = check_losses(losses)
    if losses.shape[1] != len(grid):
        raise ValueError(f"losses has {losses.shape[1]} columns for {len(grid)} sparsities")
    return _certify(losses, grid, alpha, delta, pvalue, procedure, loss_name="losses")


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    loss: LossLike,
    alpha: float,
    delta: float,
    sparsities: Sequence[float] | np.ndarray | Tensor | None = None,
    scope: str = "global",
    criterion: str = "magnitude",
    parameters: ParameterFilter | None = None,
    pvalue: str = "auto",
    procedure: str = "fixed_sequence",
    forward: Forward | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    activation_bytes: int = ACTIVATION_BYTES,
    seed: int = 0,
    progress: bool = True,
) -> Certificate:
    """The sparsest magnitude-pruned network whose risk is certified.

    With probability at least 1 - delta over the calibration data, the expected loss on new data of
    the network pruned to the certified sparsity is at most alpha.

    Parameters
    ----------
    model : torch.nn.Module
        Evaluated in evaluation mode; left as it was.
    data : Dataset, DataLoader, tuple of tensors, or iterable of batches
        Independent, identically distributed examples that the model was not trained on. A batch is
        (inputs, targets), inputs alone, or a mapping (Hugging Face).
    loss : str, Loss, or callable (outputs [B, ...], reference) -> [B]
        Values in [0, 1]; see `confprune.losses`.
    alpha, delta : float in (0, 1)
    sparsities : [K], optional
        Strictly increasing, in [0, 1); default 0, 0.01, ..., 0.99.
    scope : {"global", "layer"}
        Whether the weights of all layers compete, or those of each layer alone.
    criterion : str
        How weights are scored; see `confprune.criteria`.
    parameters : names, or predicate (name, parameter) -> bool, optional
        Default: the weights of linear layers and convolutions.
    pvalue, procedure : str
        As for `calibrate_losses`.
    forward : callable (model, batch) -> outputs, optional
    batch_size : int, optional
        For data that is not in batches yet; default 256.
    device : optional
        Where to run; default where the model is. A model elsewhere is copied there.
    activation_bytes : int
        Memory for the activations of the levels and examples evaluated together.
    seed : int
        Recorded in the certificate.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Certificate
        Nothing certifiable is an ordinary outcome: then `certificate.certified` is False.

    Raises
    ------
    ValueError, TypeError
        Before any work: for settings that contradict each other, data or outputs that do not fit,
        NaN weights, or too few examples to certify even zero losses.

    References
    ----------
    Alvarez, "Confident magnitude-based neural network pruning", arXiv 2408.04759.
    Angelopoulos et al., "Learn then Test", arXiv 2110.01052.

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
    loss = resolve_loss(loss)
    grid = DEFAULT_SPARSITIES if sparsities is None else check_sparsities(sparsities)
    _check_settings(alpha, delta, pvalue, procedure)
    check_data(data, batch_size)
    count = example_count(data)
    if count is not None:
        _check_enough(count, alpha, delta)
    levels = prune_levels(model, grid, scope=scope, criterion=criterion, parameters=parameters)
    pruning = _pruning(model, levels)
    if device is not None:
        model = _on_device(model, device)
    forward_pass = GridForward(
        model, levels, [loss], forward=forward, activation_bytes=activation_bytes
    )
    losses = _loss_matrix(forward_pass, model, data, batch_size, progress)
    notes = []
    if forward_pass.fallback is not None:
        notes.append(f"evaluated level by level: {forward_pass.fallback}")
    return _certify(
        losses.numpy(),
        grid,
        alpha,
        delta,
        pvalue,
        procedure,
        loss_name=loss.name,
        pruning=pruning,
        seed=seed,
        notes=tuple(notes),
    )


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
    >>> import torch
    >>> from confprune.calibration import plain_risk
    >>> model = torch.nn.Linear(4, 2)
    >>> plain_risk(model, model, torch.randn(10, 4), "disagreement", progress=False)
    (0.0, 10)
    """
    loss = resolve_loss(loss)
    total, n = 0.0, 0
    with evaluation_mode(model), evaluation_mode(pruned):
        for batch in _moved_batches(model, data, batch_size, progress, "verify"):
            values = plain_losses(model, pruned, batch, loss, forward=forward)
            total += float(values.double().sum())
            n += len(values)
    return total / n, n


def _loss_matrix(
    grid: GridForward, model: nn.Module, data: Any, batch_size: int | None, progress: bool
) -> Tensor:
    """The loss matrix, [n, K], checked batch by batch."""
    active = range(len(grid.levels))
    parts: list[Tensor] = []
    done = 0
    with evaluation_mode(model):
        for batch in _moved_batches(model, data, batch_size, progress, "calibrate"):
            values = grid.evaluate(batch, active)[0]
            _check_values(values, grid.losses[0], done, grid.levels.sparsities)
            parts.append(values.clamp_(0, 1))
            done += len(values)
    return torch.cat(parts)


def _moved_batches(
    model: nn.Module, data: Any, batch_size: int | None, progress: bool, title: str
) -> Iterator[Any]:
    """Batches on the model's device, with a progress bar that counts examples."""
    device = next(model.parameters()).device
    with tqdm(total=example_count(data), desc=title, unit="example", disable=not progress) as bar:
        for batch in batches(data, batch_size):
            yield move_batch(batch, device)
            bar.update(batch_length(batch))


def _check_values(values: Tensor, loss: Loss, first: int, sparsities: Sequence[float]) -> None:
    """Raise ValueError for the first loss that is NaN or outside [0, 1]."""
    wrong = ~((values >= -_ROUNDING) & (values <= 1 + _ROUNDING))
    if not wrong.any():
        return
    example, j = (int(index) for index in wrong.nonzero()[0])
    value = float(values[example, j])
    raise ValueError(
        f"loss {loss.name!r} is {value:g} for example {first + example} at level {j} (sparsity "
        f"{sparsities[j]:g}); losses must be in [0, 1]"
        + ("" if value == value else ": the network's outputs are NaN there, or the loss is")
    )


def _certify(
    losses: np.ndarray,
    grid: tuple[float, ...],
    alpha: float,
    delta: float,
    pvalue: str,
    procedure: str,
    *,
    loss_name: str,
    pruning: Pruning | None = None,
    seed: int | None = None,
    notes: tuple[str, ...] = (),
) -> Certificate:
    """Test the levels of a checked loss matrix [n, K]."""
    n = len(losses)
    _check_enough(n, alpha, delta)
    kind = resolve_pvalue(pvalue, losses_are_binary(losses))
    values = kind.from_losses(losses, alpha)
    return Certificate(
        sparsities=grid,
        alpha=alpha,
        delta=delta,
        n=n,
        loss=loss_name,
        pvalue=kind.name,
        procedure=procedure,
        risks=tuple(loss_sums(losses) / n),
        pvalues=tuple(values),
        bounds=tuple(upper_bound(losses, delta, kind.name)),
        rejected=tuple(resolve_procedure(procedure).test(values, delta)),
        pruning=pruning,
        seed=seed,
        notes=notes,
        versions=_versions(),
    )


def _check_settings(alpha: float, delta: float, pvalue: str, procedure: str) -> None:
    check_probability("alpha", alpha)
    check_probability("delta", delta)
    resolve_pvalue(pvalue, losses_are_binary=True)
    needs = resolve_procedure(procedure).needs
    if needs:
        raise ValueError(
            f"procedure {procedure!r} needs {', '.join(needs)}: call "
            f"confprune.risk.testing.{procedure} on the p-values"
        )


def _check_enough(n: int, alpha: float, delta: float) -> None:
    needed = required_n(alpha, delta)
    if n < needed:
        raise ValueError(
            f"{n} examples cannot certify even a zero loss at alpha={alpha:g}, delta={delta:g}; "
            f"at least {needed} are needed: give more examples, or raise alpha or delta"
        )


def _pruning(model: nn.Module, levels: PruneLevels) -> Pruning:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return Pruning(
        scope=levels.scope,
        criterion=levels.criterion,
        parameters=tuple(levels.levels),
        fingerprint=fingerprint({name: parameters[name] for name in levels.levels}),
        total=levels.total,
    )


def _on_device(model: nn.Module, device: torch.device | str) -> nn.Module:
    target = torch.device(device)
    if all(p.device == target for p in model.parameters()):
        return model
    return copy.deepcopy(model).to(target)


def _versions() -> dict[str, str]:
    return {
        "confprune": confprune.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
