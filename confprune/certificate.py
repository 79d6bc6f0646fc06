"""The certificate: what was tested, on what, and what may be claimed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from confprune import certificate_file
from confprune.evidence import Looks, Part, Pruning
from confprune.fingerprint import difference, fingerprint
from confprune.levels import prune_levels
from confprune.losses import BUILT_IN, Loss, LossLike, resolve_loss
from confprune.report import report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class VerificationError(ValueError):
    """The pruned network's risk is not the one that the certificate states."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A statement about pruned networks that holds with probability at least 1 - delta.

    With at least this probability over the calibration set, the expected loss on new data of the
    network pruned to `sparsity` is at most `alpha`. ``print(certificate)`` is the report. If
    nothing could be certified, `certified` is False and `sparsity` is 0.

    Attributes
    ----------
    sparsities : tuple of float, length K
        The grid under test, strictly increasing.
    alpha, delta : float
        The largest acceptable risk, and the largest acceptable probability of a false claim.
    n : int
        Number of calibration examples.
    loss, pvalue, procedure : str
        Names of the loss, the p-value and the testing procedure.
    risks : tuple of float, length K
        Mean loss of the examples at each level.
    pvalues : tuple of float, length K
        p-value of the hypothesis that the level's risk exceeds alpha.
    bounds : tuple of float, length K
        Upper confidence bound at 1 - delta on the risk of each level alone.
    rejected : tuple of bool, length K
        Whether the hypothesis was rejected: the level is certified.
    pruning : Pruning or None
        How to prune; None if made from a bare loss matrix.
    seed : int or None
        What the order of the examples was drawn with.
    notes : tuple of str
        What a reader should know about the run.
    versions : dict of str to str
        Versions of the packages that made it.
    guarantee : {"risk", "expectation", "monotone"}
        What is promised: the risk at 1 - delta by testing, the expected risk (conformal risk
        control), or the monotonised risk at 1 - delta (upper confidence bounds).
    parts : tuple of Part
        Each risk and group, where there are several. `loss`, `alpha`, `n`, `risks` and `bounds`
        are then those of the part that binds: the one with the largest p-value at the first level
        that is not certified. `pvalues` are the largest of all parts.
    looks : Looks or None
        Early looks, if there were any.
    accept : str or None
        Which predictions count; None for all.
    acceptance : tuple of float, length K, or None
        Share of the examples seen that were accepted at each level.

    References
    ----------
    Angelopoulos et al., "Learn then Test: calibrating predictive algorithms to achieve risk
    control", arXiv 2110.01052. Alvarez, "Confident magnitude-based neural network pruning",
    arXiv 2408.04759.

    Examples
    --------
    >>> import numpy as np, confprune
    >>> losses = np.zeros((500, 3))
    >>> losses[:10, 1] = losses[:100, 2] = 1
    >>> certificate = confprune.calibrate_losses(losses, [0.3, 0.6, 0.9], alpha=0.05, delta=0.1)
    >>> certificate.certified, certificate.sparsity, certificate.risk
    (True, 0.6, 0.02)
    """

    sparsities: tuple[float, ...]
    alpha: float
    delta: float
    n: int
    loss: str
    pvalue: str
    procedure: str
    risks: tuple[float, ...]
    pvalues: tuple[float, ...]
    bounds: tuple[float, ...]
    rejected: tuple[bool, ...]
    pruning: Pruning | None = None
    seed: int | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    guarantee: str = "risk"
    parts: tuple[Part, ...] = ()
    looks: Looks | None = None
    accept: str | None = None
    acceptance: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        # Plain Python values, whatever array library the caller's came from: they go into JSON.
        for name in ("sparsities", "risks", "pvalues", "bounds"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        object.__setattr__(self, "rejected", tuple(bool(value) for value in self.rejected))
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "n", int(self.n))
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "delta", float(self.delta))
        _check_consistent(self)

    @property
    def certified(self) -> bool:
        """Whether any level is certified."""
        return any(self.rejected)

    @property
    def level(self) -> int | None:
        """Index of the sparsest certified level, None if there is none."""
        return max((j for j, rejected in enumerate(self.rejected) if rejected), default=None)

    @property
    def sparsity(self) -> float:
        """The largest certified sparsity, 0 if nothing is certified."""
        return 0.0 if self.level is None else self.sparsities[self.level]

    @property
    def risk(self) -> float | None:
        """Mean loss of the calibration examples at the certified level, None without one."""
        return None if self.level is None else self.risks[self.level]

    @property
    def bound(self) -> float | None:
        """Upper confidence bound on the risk at the certified level, None without one."""
        return None if self.level is None else self.bounds[self.level]

    def __repr__(self) -> str:
        outcome = f"sparsity={self.sparsity:g}" if self.certified else "nothing certified"
        return (
            f"<Certificate: {outcome}, loss={self.loss!r}, alpha={self.alpha:g}, "
            f"delta={self.delta:g}, n={self.n}, {len(self.sparsities)} levels>"
        )

    def __str__(self) -> str:
        return report(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the certificate as JSON; a crash leaves an older file as it was.

        Parameters
        ----------
        path : path
            The file to write, in a folder that exists.

        Examples
        --------
        >>> import tempfile, numpy as np, confprune
        >>> certificate = confprune.calibrate_losses(np.zeros((99, 1)), [0.5], 0.05, 0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     certificate.save(f"{folder}/certificate.json")
        ...     confprune.Certificate.load(f"{folder}/certificate.json") == certificate
        True
        """
        certificate_file.write(path, dataclasses.asdict(self), self._outcome())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Read a certificate that `save` wrote.

        Parameters
        ----------
        path : path
            The file to read.

        Returns
        -------
        Certificate
            Equal to the saved one, floats to the last bit.

        Raises
        ------
        ValueError
            If the file is not JSON, not a certificate of a known schema, or inconsistent; the
            message names the file and what is wrong.
        OSError
            If the file cannot be read.
        """
        try:
            fields, outcome = certificate_file.read(path)
            pruning = fields.pop("pruning")
            certificate = cls(pruning=None if pruning is None else Pruning(**pruning), **fields)
            for name, value in certificate._outcome().items():
                if outcome[name] != value:
                    raise ValueError(f"{name} is {outcome[name]}, but the levels say {value}")
        except ValueError as problem:
            raise ValueError(f"{os.fspath(path)} is not a certificate: {problem}") from problem
        return certificate

    def prune(self, model: nn.Module) -> nn.Module:
        """Prune a copy of the network to the certified sparsity.

        Parameters
        ----------
        model : Module
            The network that was calibrated; it is left as it is.

        Returns
        -------
        Module
            A new, masked network. If nothing is certified, a plain copy, with a warning.

        Raises
        ------
        ValueError
            If the prunable weights are not those of the certificate (the difference is named),
            or the certificate was made from a bare loss matrix and does not know how to prune.
        """
        pruning = self._pruning_for("prune")
        self._check_same_weights(model)
        if not self.certified:
            warnings.warn(
                "nothing was certified: the network is returned as an unpruned copy", stacklevel=2
            )
            return copy.deepcopy(model)
        levels = prune_levels(
            model,
            [self.sparsity],
            scope=pruning.scope,
            criterion=pruning.criterion,
            parameters=list(pruning.parameters),
        )
        return levels.prune(model, 0)

    def verify(
        self,
        model: nn.Module,
        data: Any,
        *,
        loss: LossLike | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> float:
        """Prune, run the plain masked network through the calibration data, compare the risk.

        Parameters
        ----------
        model : Module
            The network that was calibrated, not pruned.
        data : Dataset, DataLoader, tuple of tensors or iterable
            The calibration data, as given to `confprune.calibrate`.
        loss : str, Loss or callable, optional
            Needed only if the loss was a callable of your own.
        forward : callable, optional
            ``(model, batch) -> outputs``, as given to `confprune.calibrate`.
        batch_size : int, optional
            Examples per batch.
        progress : bool
            Whether to show progress.

        Returns
        -------
        float
            The risk, computed again.

        Raises
        ------
        VerificationError
            If the risk or the number of examples does not reproduce. Two examples, and a risk of
            0.001 (0.01 for weights in 16 bits), may differ: near-ties fall either way in rounding.
        ValueError
            As for `prune`; if nothing was certified; if the loss is needed or is another one.
        """
        from confprune.calibration import plain_risk

        pruning = self._pruning_for("verify")
        if self.risk is None:
            raise ValueError("nothing was certified: there is no risk to verify")
        used = self._loss_to_verify(loss)
        pruned = self.prune(model)
        risk, n = plain_risk(
            model, pruned, data, used, forward=forward, batch_size=batch_size, progress=progress
        )
        if n != self.n:
            raise VerificationError(
                f"the certificate rests on {self.n} examples, the data has {n}: "
                "give the data that was calibrated on"
            )
        dtypes = {entry["dtype"] for entry in pruning.fingerprint.values()}
        tolerance = (1e-3 if dtypes <= {"float32", "float64"} else 1e-2) + 2 / n
        # Not `>`, which a NaN would pass.
        if not abs(risk - self.risk) <= tolerance:
            raise VerificationError(
                f"the certificate states a risk of {self.risk:.6g} at {self.sparsity:g} sparsity, "
                f"the pruned network has {risk:.6g} on this data (tolerance {tolerance:.2g})"
            )
        return risk

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        test_risks: Sequence[float] | None = None,
    ) -> Figure:
        """Plot risk against sparsity; see `confprune.plot.plot_certificate`."""
        from confprune.plot import plot_certificate

        return plot_certificate(self, path, test_risks=test_risks)

    def _outcome(self) -> dict[str, Any]:
        return {"certified": self.certified, "level": self.level, "sparsity": self.sparsity}

    def _pruning_for(self, verb: str) -> Pruning:
        if self.pruning is None:
            raise ValueError(
                f"cannot {verb}: this certificate was made from a loss matrix and does not know "
                "the network. With the levels that the matrix came from: "
                f"confprune.prune_levels(model, [{self.sparsity!r}]).prune(model, 0)"
            )
        return self.pruning

    def _check_same_weights(self, model: nn.Module) -> None:
        pruning = self._pruning_for("prune")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = {name: parameters[name] for name in pruning.parameters if name in parameters}
        differs = difference(pruning.fingerprint, fingerprint(found))
        if differs is not None:
            raise ValueError(f"the certificate is for another network: {differs}")

    def _loss_to_verify(self, loss: LossLike | None) -> Loss:
        if loss is None:
            if self.loss not in BUILT_IN:
                raise ValueError(f"the loss {self.loss!r} is not built in: pass it as loss=")
            return BUILT_IN[self.loss]
        resolved = resolve_loss(loss)
        if resolved.name != self.loss:
            raise ValueError(
                f"the certificate is about the loss {self.loss!r}, not {resolved.name!r}"
            )
        return resolved


def _check_consistent(certificate: Certificate) -> None:
    """Refuse contradictory fields, naming the first."""
    levels = len(certificate.sparsities)
    if levels == 0:
        raise ValueError("sparsities is empty")
    for name in ("risks", "pvalues", "bounds", "rejected"):
        values = getattr(certificate, name)
        if len(values) != levels:
            raise ValueError(f"{name} has {len(values)} values for {levels} sparsities")
        # NaN stands for a value that was not measured.
        outside = [value for value in values if not (0 <= value <= 1 or math.isnan(value))]
        if outside:
            raise ValueError(f"{name} has the value {outside[0]}, outside [0, 1]")
    grid = certificate.sparsities
    increasing = all(a < b for a, b in itertools.pairwise(grid))
    if not (increasing and grid[0] >= 0 and grid[-1] < 1):
        raise ValueError("sparsities must be strictly increasing, in [0, 1)")
    for name in ("alpha", "delta"):
        if not 0 < getattr(certificate, name) < 1:
            raise ValueError(f"{name} is {getattr(certificate, name)}, outside (0, 1)")
    if certificate.n < 1:
        raise ValueError(f"n is {certificate.n}, fewer than one example")
