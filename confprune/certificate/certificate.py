"""The certificate: what was tested, on what, and what may be claimed."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from confprune.certificate import file as certificate_file
from confprune.certificate.consistency import check_consistent, is_of
from confprune.certificate.deployed import check_deployed
from confprune.certificate.evidence import (
    Looks,
    Part,
    Pruning,
    closest,
    first_obstacle,
    plain_floats,
)
from confprune.certificate.pruning import check_same_weights, pruned_copy
from confprune.certificate.report import report
from confprune.certificate.verification import VerificationError, verify
from confprune.criteria import Statistics
from confprune.files import written_whole
from confprune.losses import LossLike
from confprune.risks import Accept, Groups
from confprune.sparse.modules import is_compressed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Certificate", "Looks", "Part", "Pruning", "VerificationError"]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A statement about pruned networks that holds with probability at least 1 - delta.

    With at least this probability over the calibration set, the expected loss on new data of the
    network pruned to `sparsity` is at most `alpha`; or what else `guarantee` says.
    ``print(certificate)`` is the report. If nothing could be certified, `certified` is False and
    `sparsity` is 0.

    Attributes
    ----------
    sparsities : tuple of float, length K
        The grid under test, strictly increasing.
    alpha : float
        The largest acceptable risk.
    delta : float or None
        The largest acceptable probability of a false claim; None where the guarantee is one in
        expectation, which has no such probability.
    n : int
        Number of calibration examples.
    loss, pvalue, procedure : str
        Names of the loss, the p-value and the testing procedure.
    risks : tuple of float, length K
        Mean loss of the examples at each level, NaN where it was not tested; of the monotonised
        loss for the guarantees "expectation" and "monotone".
    pvalues : tuple of float, length K
        p-value of the hypothesis that the level's risk exceeds alpha.
    bounds : tuple of float, length K
        Upper confidence bound at 1 - delta on the risk of each level alone; in expectation, the
        corrected mean loss that conformal risk control compares with alpha.
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
    delta: float | None
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
        for name in ("sparsities", "risks", "pvalues", "bounds", "acceptance"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, plain_floats(getattr(self, name)))
        object.__setattr__(self, "rejected", tuple(bool(value) for value in self.rejected))
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "n", int(self.n))
        object.__setattr__(self, "alpha", float(self.alpha))
        if self.delta is not None:
            unused = math.isnan(self.delta)
            object.__setattr__(self, "delta", None if unused else float(self.delta))
        if self.seed is not None:
            object.__setattr__(self, "seed", operator.index(self.seed))
        check_consistent(self)

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

    @property
    def tested(self) -> list[int]:
        """Indices of the levels that were tested; all but with several ways of pruning."""
        values = enumerate(zip(self.risks, self.pvalues, strict=True))
        return [j for j, pair in values if not all(map(math.isnan, pair))]

    @property
    def obstacle(self) -> int | None:
        """Index of the level that stopped the certificate: the first tested one beyond it."""
        return first_obstacle(self.tested, self.rejected)

    @property
    def binding(self) -> Part | None:
        """The part that stopped the next level, None where there is one risk on all examples."""
        at = self.obstacle if self.obstacle is not None else self.level
        order = [] if at is None else closest(self.parts, at)
        return next((self.parts[p] for p in order if is_of(self, self.parts[p])), None)

    def __repr__(self) -> str:
        outcome = f"sparsity={self.sparsity:g}" if self.certified else "nothing certified"
        what = f"loss={self.loss!r}, alpha={self.alpha:g}"
        if self.binding is not None:
            what = f"{len(self.parts)} risks, binding={self.binding.name!r}, alpha={self.alpha:g}"
        chance = "in expectation" if self.delta is None else f"delta={self.delta:g}"
        return (
            f"<Certificate: {outcome}, {what}, {chance}, n={self.n}, {len(self.sparsities)} levels>"
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
        with written_whole(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

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
        content = Path(path).read_bytes()
        try:
            return cls.from_json(content)
        except ValueError as problem:
            raise ValueError(f"{os.fspath(path)} is not a certificate: {problem}") from problem

    def to_json(self) -> str:
        """The certificate as JSON, as `save` writes it."""
        plain = self
        if self.pruning is not None:  # the statistics themselves stay in memory
            plain = dataclasses.replace(self, pruning=dataclasses.replace(self.pruning, kept={}))
        fields = dataclasses.asdict(plain)
        if self.pruning is not None:
            del fields["pruning"]["kept"]
        return certificate_file.to_text(fields, self._outcome())

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """The certificate of a text that `to_json` gave; ValueError if it is not one."""
        fields, outcome = certificate_file.from_text(text)
        certificate = cls(**fields)
        for name, value in certificate._outcome().items():
            if outcome[name] != value:
                raise ValueError(f"{name} is {outcome[name]}, but the levels say {value}")
        return certificate

    @property
    def statistics(self) -> Statistics:
        """What the scores were made from beside the weights; empty once read from a file.

        To be stored, with `torch.save`, for a `prune` in another process: a certificate's file
        holds their fingerprint only.
        """
        return {} if self.pruning is None else self.pruning.kept

    def prune(self, model: nn.Module, *, statistics: Statistics | None = None) -> nn.Module:
        """Prune a copy of the network to the certified sparsity.

        Parameters
        ----------
        model : Module
            The network that was calibrated; it is left as it is.
        statistics : mapping, optional
            `statistics` of the certificate that `calibrate` returned, if this one was read from a
            file and its criterion needs them.

        Returns
        -------
        Module
            A new, masked network. If nothing is certified, a plain copy, with a warning.

        Raises
        ------
        ValueError
            If the prunable weights, or the statistics, are not those of the certificate (the
            difference is named), or the certificate was made from a bare loss matrix and does not
            know how to prune.
        """
        pruning = self._pruning_for("prune")
        check_same_weights(pruning, model)
        if not self.certified:
            warnings.warn(
                "nothing was certified: the network is returned as an unpruned copy", stacklevel=2
            )
            return copy.deepcopy(model)
        return pruned_copy(pruning, model, self.sparsity, statistics)

    def verify(
        self,
        model: nn.Module,
        data: Any,
        *,
        loss: LossLike | Sequence[LossLike] | None = None,
        groups: Groups | None = None,
        accept: Accept | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        batch_size: int | None = None,
        statistics: Statistics | None = None,
        progress: bool = True,
        full: nn.Module | None = None,
    ) -> float:
        """Run the pruned network through the calibration data and compare the risks.

        After early looks on the examples that the certified level was tested on, and on no others.

        Parameters
        ----------
        model : Module
            The network that was calibrated, not pruned: its masked copy is run. Or the one that is
            deployed, compressed (`confprune.sparse.compress`, `load_sparse`) or with `full` given:
            it is run itself, after a look whether it can be the certified one.
        data : Dataset, DataLoader, tuple of tensors or iterable
            The calibration data, as given to `confprune.calibrate`.
        loss : str, Loss or callable, or several, optional
            Needed only for losses that were callables of your own.
        groups, accept, forward : optional
            As given to `confprune.calibrate`.
        batch_size : int, optional
            Examples per batch.
        statistics : mapping, optional
            As for `prune`.
        progress : bool
            Whether to show progress.
        full : Module, optional
            The network that was calibrated, where `model` is the deployed one. Then every weight is
            compared. Needed for losses that compare with the full network, which are all but those
            against labels, and for guarantees on the monotonised loss.

        Returns
        -------
        float
            The risk, computed again; with several, that of the part that binds.

        Raises
        ------
        VerificationError
            If a risk, an acceptance rate or a number of examples does not reproduce, or the risk
            does not show what the certificate promises, because its file was edited. Two examples,
            and a risk of 0.001 (0.01 for weights in 16 bits), may differ: near-ties fall either way
            in rounding.
        ValueError
            As for `prune`; if nothing was certified; if a loss, the groups, the acceptance rule or
            `full` is needed or is another one.
        """
        pruning = self._pruning_for("verify")
        deployed = full is not None or is_compressed(model)
        original = full if deployed else model
        if original is not None:
            pruned_alone = "; if it is pruned already, pass full=, the network that was calibrated"
            check_same_weights(pruning, original, "" if deployed else pruned_alone)

        def network(level: int) -> nn.Module:
            if deployed and level == self.level:
                return model
            if original is None:
                raise ValueError("a monotonised loss takes every level: pass full=")
            return pruned_copy(pruning, original, self.sparsities[level], statistics)

        if deployed and self.certified:
            pruned = None
            if full is not None:
                pruned = pruned_copy(pruning, full, self.sparsity, statistics)
            check_deployed(self, model, pruned)
        return verify(
            self,
            original,
            network,
            data,
            loss=loss,
            groups=groups,
            accept=accept,
            forward=forward,
            batch_size=batch_size,
            progress=progress,
        )

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        test_risks: Sequence[float] | None = None,
    ) -> Figure:
        """Plot risk against sparsity; see `confprune.certificate.plot.plot_certificate`."""
        from confprune.certificate.plot import plot_certificate

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
