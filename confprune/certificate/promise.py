"""What a certificate promises, in words; the report and the plot open with it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from confprune.risk.procedures import PROCEDURES
from confprune.risk.pvalues import PVALUES

if TYPE_CHECKING:
    from confprune.certificate import Certificate
    from confprune.certificate.evidence import Part

_MEANING = {
    "disagreement": "disagreement with the full network",
    "error": "error rate",
    "harm": "rate of errors where the full network is right",
    "soft_disagreement": "soft disagreement with the full network",
    "dice": "Dice loss",
    "iou": "IoU loss",
    "false_negative_rate": "false negative rate",
    "pixel_disagreement": "share of wrong pixels",
    "token_disagreement": "share of tokens unlike the full network's",
    "losses": "loss",
    "cosine": "cosine loss against the full network's embeddings",
}


def title(certificate: Certificate) -> str:
    """Say in a line what is certified."""
    if not certificate.certified:
        return "Nothing is certified: the network stays as it is"
    kinds = {"expectation": " in expectation", "monotone": " for the monotonised loss"}
    sparsity = sparsity_text(certificate, certificate.sparsity)
    return f"Certified{kinds.get(certificate.guarantee, '')}: {sparsity} sparsity"


def promise(certificate: Certificate) -> str:
    """Say in a sentence or two what may be claimed.

    Parameters
    ----------
    certificate : Certificate

    Returns
    -------
    str

    Examples
    --------
    >>> import numpy as np, confprune
    >>> promise(confprune.calibrate_losses(np.zeros((99, 1)), [0.5], alpha=0.05, delta=0.1))
    'With probability at least 90 %, the network pruned to 50.0 % sparsity has, on new data, an expected loss of at most 0.05.'
    """  # noqa: E501
    claim = f"{_where(certificate)} {_claims(certificate)}"
    at_once = len(certificate.parts) > 1
    if certificate.certified:
        network = (
            f"the network pruned to {sparsity_text(certificate, certificate.sparsity)} sparsity has"
        )
        if certificate.delta is None:
            return (
                f"In expectation over the calibration data and new data, {network}{claim}. That is "
                "an average over calibration sets: it gives no probability for the one at hand."
            )
        start = "Asymptotically, with" if asymptotic(certificate) else "With"
        sentence = f"{start} probability at least {confidence(certificate)}, {network}{claim}."
        return sentence + (" All of this holds at once." if at_once else "")
    failed = f"No level of the grid could be shown to have{claim}"
    if certificate.delta is None:
        return f"{failed}, in expectation over the calibration data and new data."
    together = ", all at once" if at_once else ""
    return f"{failed}{together}, with probability at least {confidence(certificate)}."


def loss_text(certificate: Certificate) -> str:
    """Name what is bounded, as in "an expected ...": a certificate's own loss."""
    return _meaning(certificate, certificate.loss)


def sparsity_text(certificate: Certificate, sparsity: float) -> str:
    """Write a sparsity in percent, with the decimals that tell this grid's levels apart."""
    percents = [100 * value for value in certificate.sparsities]
    step = min((b - a for a, b in itertools.pairwise(percents)), default=100)
    decimals = 1
    while decimals < 6 and any(abs(round(p, decimals) - p) > 0.02 * step for p in percents):
        decimals += 1
    return f"{100 * sparsity:.{decimals}f} %"


def confidence(certificate: Certificate) -> str:
    """Write 1 - delta in percent."""
    assert certificate.delta is not None
    return f"{100 * (1 - certificate.delta):.6g} %"


def pvalue_names(certificate: Certificate) -> list[str]:
    """The p-values in use, each once."""
    return list(dict.fromkeys(part.pvalue for part in certificate.parts)) or [certificate.pvalue]


def asymptotic(certificate: Certificate) -> bool:
    """Whether the promise holds for large samples only."""
    kinds = [PVALUES.get(name) for name in pvalue_names(certificate)]
    return any(kind is not None and kind.asymptotic for kind in kinds)


def in_order(certificate: Certificate) -> bool:
    """Whether levels were tested one after the other, up to the first that failed."""
    procedure = PROCEDURES.get(certificate.procedure)
    return procedure is not None and procedure.chain


def part_text(certificate: Certificate, part: Part) -> str:
    """Name a part beside the others: the group alone where all are of one loss."""
    if part.group is not None and len({other.loss for other in certificate.parts}) == 1:
        return f"group {part.group}"
    return part.name


def counted(number: int, thing: str) -> str:
    """Write a number of things: 1 level, 2 levels."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def enumeration(texts: list[str]) -> str:
    """Write a list as a reader would: one, two and three."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _where(certificate: Certificate) -> str:
    """The examples that the promise is about."""
    if certificate.delta is None:
        return ""
    groups = {part.group for part in certificate.parts if part.group is not None}
    text = ", on new data"
    if groups:
        text += f" of each of the {len(groups)} groups"
    if certificate.accept is not None:
        text += f", among the predictions accepted ({certificate.accept})"
    return text + ","


def _claims(certificate: Certificate) -> str:
    """Each loss with its alpha."""
    bounded = [(part.loss, part.alpha) for part in certificate.parts]
    bounded = bounded or [(certificate.loss, certificate.alpha)]
    article = "a" if certificate.delta is None else "an expected"
    of_all = " (the largest at this and all denser levels)"
    if certificate.guarantee == "risk":
        of_all = ""
    return enumeration(
        [
            f"{article} {_meaning(certificate, loss)}{of_all} of at most {alpha:g}"
            for loss, alpha in dict.fromkeys(bounded)
        ]
    )


def _meaning(certificate: Certificate, loss: str) -> str:
    meaning = _MEANING.get(loss, f"loss {loss!r}")
    if certificate.guarantee == "risk":
        return meaning
    return f"monotonised {meaning}"
