"""Certificates built by hand, for the tests of what they say, keep and accept."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from confprune.certificate import Certificate, Part, Pruning
from confprune.certificate.evidence import binding_part
from confprune.certificate.fingerprint import fingerprint
from confprune.risk.pvalues import PVALUES


def certify(
    sums: list[float],
    n: int = 200,
    sparsities: list[float] | None = None,
    alpha: float = 0.1,
    delta: float = 0.1,
    pvalue: str = "convex",
    **fields,
) -> Certificate:
    """A certificate of given loss sums per level, by fixed-sequence testing."""
    pvalues = PVALUES[pvalue if pvalue != "clt" else "convex"].from_sums(sums, n, alpha)
    risks = np.array(sums) / n
    settings = {
        "sparsities": sparsities or [(j + 1) / (len(sums) + 1) for j in range(len(sums))],
        "loss": "disagreement",
        "procedure": "fixed_sequence",
        "bounds": np.minimum(risks + 0.05, 1),
        "rejected": np.logical_and.accumulate(pvalues <= delta),
    }
    return Certificate(
        alpha=alpha,
        delta=delta,
        n=n,
        pvalue=pvalue,
        risks=risks,
        pvalues=pvalues,
        **{**settings, **fields},
    )


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def pruning_of(model: nn.Module) -> Pruning:
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    total = sum(weight.numel() for weight in weights.values())
    return Pruning("global", "magnitude", tuple(weights), fingerprint(weights), total)


def part(
    sums: list[float],
    n: int,
    *,
    loss: str = "disagreement",
    group: str | None = None,
    alpha: float = 0.1,
    pvalue: str = "convex",
) -> Part:
    """One risk of given loss sums per level, of n examples that count."""
    risks = np.array(sums) / n
    return Part(
        loss=loss,
        pvalue=pvalue,
        alpha=alpha,
        group=group,
        counts=(n,) * len(sums),
        risks=risks,
        pvalues=PVALUES[pvalue].from_sums(sums, n, alpha),
        bounds=np.minimum(risks + 0.05, 1),
    )


def of_parts(*parts: Part, delta: float = 0.1, n: int | None = None, **fields) -> Certificate:
    """A certificate of several risks, by fixed-sequence testing."""
    pvalues = np.max([one.pvalues for one in parts], axis=0)
    rejected = np.logical_and.accumulate(pvalues <= delta)
    binding = parts[binding_part(parts, rejected)]
    levels = len(pvalues)
    grouped: dict[str | None, int] = {one.group: max(one.counts) for one in parts}
    settings = {
        "sparsities": [(j + 1) / (levels + 1) for j in range(levels)],
        "n": n or sum(grouped.values()),
        "procedure": "fixed_sequence",
        "rejected": rejected,
    }
    return Certificate(
        alpha=binding.alpha,
        delta=delta,
        loss=binding.loss,
        pvalue=binding.pvalue,
        risks=binding.risks,
        pvalues=pvalues,
        bounds=binding.bounds,
        parts=parts,
        **{**settings, **fields},
    )


def controlled(
    sums: list[float], guarantee: str, *, n: int = 200, alpha: float = 0.1, **fields
) -> Certificate:
    """A certificate in expectation, or of a monotonised risk, of given sums of its losses."""
    risks = np.array(sums) / n
    expectation = guarantee == "expectation"
    reached = (risks * n + 1) / (n + 1) if expectation else np.minimum(risks + 0.05, 1)
    unmeasured = np.full(len(sums), np.nan)
    return Certificate(
        sparsities=[(j + 1) / (len(sums) + 1) for j in range(len(sums))],
        alpha=alpha,
        delta=None if expectation else 0.1,
        n=n,
        loss="disagreement",
        pvalue="convex",
        procedure="fixed_sequence",
        risks=risks,
        pvalues=unmeasured,
        bounds=reached,
        rejected=np.logical_and.accumulate(reached <= alpha),
        guarantee=guarantee,
        **fields,
    )
