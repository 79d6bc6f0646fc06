"""Multiple testing: which levels may be rejected, that is certified, together.

Each procedure takes one p-value per level and controls the family-wise error rate: with
probability 1 - delta no true hypothesis is rejected, however the p-values depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from confprune.risk.binomial_tail import binomial_deviance
from confprune.risk.inputs import (
    FloatArray,
    IntArray,
    check_losses,
    check_probability,
    check_pvalues,
    loss_sums,
)

BoolArray = NDArray[np.bool_]


def fixed_sequence(
    pvalues: ArrayLike, delta: float, *, starts: Sequence[int] | None = None
) -> BoolArray:
    """Test the levels in order, each at delta; stop at the first that is not rejected.

    With several `starts`, delta is divided equally over the distinct starting points and a chain of
    tests runs from each. A chain that reaches the next start with everything rejected hands
    its share over (the fallback procedure), so at least as much is rejected as by separate chains.

    Parameters
    ----------
    pvalues : array_like [K]
        p-values in the order of testing: from dense to sparse.
    delta : float
        Family-wise error rate, in (0, 1).
    starts : sequence of int, optional
        Levels at which chains start. Default: the first level only.

    Returns
    -------
    ndarray of bool [K]
        Which levels are rejected.

    Raises
    ------
    ValueError
        If a p-value is NaN or outside of [0, 1], delta is out of range, or a start is no level.

    References
    ----------
    Learn-then-Test, arXiv 2110.01052, Section 2.2 and Algorithm 1; B. Wiens, "A fixed sequence
    Bonferroni procedure", Pharmaceutical Statistics 2 (2003), for the fallback.

    Examples
    --------
    >>> fixed_sequence([0.01, 0.03, 0.2, 0.01], delta=0.1)
    array([ True,  True, False, False])
    >>> fixed_sequence([0.01, 0.03, 0.2, 0.01], delta=0.1, starts=[0, 3])
    array([ True,  True, False,  True])
    """
    values = check_pvalues(pvalues)
    delta = check_probability("delta", delta)
    if starts is None:
        return np.logical_and.accumulate(values <= delta)
    distinct = sorted({int(start) for start in starts})
    if not distinct or distinct[0] < 0 or distinct[-1] >= len(values):
        raise ValueError(
            f"starts must name levels between 0 and {len(values) - 1}, got {list(starts)}"
        )
    rejected = np.zeros(len(values), dtype=bool)
    shares = 0  # Counted in whole shares, so that all of them together make exactly delta.
    for level, pvalue in enumerate(values):
        shares += level in distinct
        rejected[level] = shares > 0 and pvalue <= delta * (shares / len(distinct))
        if not rejected[level]:
            shares = 0
    return rejected


def bonferroni(pvalues: ArrayLike, delta: float) -> BoolArray:
    """Test every level at delta / K.

    Parameters
    ----------
    pvalues : array_like [K]
        p-values, in any order.
    delta : float
        Family-wise error rate, in (0, 1).

    Returns
    -------
    ndarray of bool [K]

    Examples
    --------
    >>> bonferroni([0.01, 0.03, 0.2, 0.01], delta=0.1)
    array([ True, False, False,  True])
    """
    values = check_pvalues(pvalues)
    delta = check_probability("delta", delta)
    return values <= delta / max(len(values), 1)


def holm(pvalues: ArrayLike, delta: float) -> BoolArray:
    """Test the smallest p-value at delta / K, the next at delta / (K - 1), until one fails.

    Parameters
    ----------
    pvalues : array_like [K]
        p-values, in any order.
    delta : float
        Family-wise error rate, in (0, 1).

    Returns
    -------
    ndarray of bool [K]

    References
    ----------
    S. Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.2, 0.01], delta=0.1)
    array([ True,  True, False,  True])
    """
    values = check_pvalues(pvalues)
    delta = check_probability("delta", delta)
    order = np.argsort(values, kind="stable")
    thresholds = delta / np.arange(len(values), 0, -1)
    rejected = np.zeros(len(values), dtype=bool)
    rejected[order] = np.logical_and.accumulate(values[order] <= thresholds)
    return rejected


def graphical(
    pvalues: ArrayLike, delta: float, *, weights: ArrayLike, transitions: ArrayLike
) -> BoolArray:
    """Sequential graphical testing: a rejected level hands its share of delta to its neighbours.

    Parameters
    ----------
    pvalues : array_like [K]
        p-values of the nodes.
    delta : float
        Family-wise error rate, in (0, 1).
    weights : array_like [K]
        Initial shares of delta: non-negative, with sum at most 1.
    transitions : array_like [K, K]
        ``transitions[i, j]`` is the part of i's share that j receives when i is rejected:
        non-negative, zero diagonal, each row summing to at most 1.

    Returns
    -------
    ndarray of bool [K]

    Raises
    ------
    ValueError
        If the graph is not as above.

    References
    ----------
    F. Bretz, W. Maurer, W. Brannath, M. Posch, "A graphical approach to sequentially rejective
    multiple test procedures", Statistics in Medicine 28 (2009), Algorithm 1 and Theorem 1;
    Learn-then-Test, arXiv 2110.01052, Section 2.2.

    Examples
    --------
    >>> graphical([0.01, 0.08], delta=0.1, weights=[0.5, 0.5], transitions=[[0, 1], [1, 0]])
    array([ True,  True])
    """
    values = check_pvalues(pvalues)
    delta = check_probability("delta", delta)
    share, graph = _check_graph(weights, transitions, len(values))
    rejected = np.zeros(len(values), dtype=bool)
    while True:
        candidates = np.flatnonzero(~rejected & (share > 0.0) & (values <= delta * share))
        if candidates.size == 0:
            return rejected
        node = candidates[0]  # The result does not depend on which one is taken.
        rejected[node] = True
        share = share + share[node] * graph[node]
        share[node] = 0.0
        graph = _without_node(graph, node)


def _check_graph(
    weights: ArrayLike, transitions: ArrayLike, levels: int
) -> tuple[FloatArray, FloatArray]:
    share = np.array(weights, dtype=np.float64)
    graph = np.array(transitions, dtype=np.float64)
    rounding = 1.0 + 1e-12 * levels
    if share.shape != (levels,) or not (share >= 0).all() or not share.sum() <= rounding:
        raise ValueError(
            f"weights must be {levels} non-negative numbers with sum at most 1, "
            f"got shape {share.shape} with sum {share.sum()}; divide them by their sum"
        )
    if graph.shape != (levels, levels) or not (graph >= 0).all() or graph.diagonal().any():
        raise ValueError(
            f"transitions must be a non-negative [{levels}, {levels}] matrix with zero diagonal, "
            f"got shape {graph.shape}; entry [i, j] is what j receives from i"
        )
    if not (graph.sum(axis=1) <= rounding).all():
        row = int(np.argmax(graph.sum(axis=1)))
        raise ValueError(
            f"each row of transitions must sum to at most 1, row {row} sums to {graph[row].sum()}; "
            "divide it by its sum"
        )
    return share, graph


def _without_node(graph: FloatArray, node: np.intp) -> FloatArray:
    """Rewire the graph around a rejected node."""
    into, out = graph[:, node], graph[node]
    loop = into * out  # What would come back to j by way of the node.
    rewired = graph + np.outer(into, out)
    with np.errstate(divide="ignore", invalid="ignore"):
        rewired = np.where(loop[:, None] < 1.0, rewired / (1.0 - loop[:, None]), 0.0)
    np.fill_diagonal(rewired, 0.0)
    rewired[:, node] = 0.0
    rewired[node] = 0.0
    return rewired


def split_fixed_sequence(pvalues: ArrayLike, delta: float, *, order: ArrayLike) -> BoolArray:
    """Fixed-sequence testing along an order learned from other data.

    Parameters
    ----------
    pvalues : array_like [C]
        p-values of the candidates, from examples that had no part in `order`.
    delta : float
        Family-wise error rate, in (0, 1).
    order : array_like of int
        Candidates in the order of testing, each at most once; those left out are not tested.

    Returns
    -------
    ndarray of bool [C]

    Raises
    ------
    ValueError
        If `order` names a candidate twice or one that does not exist.

    References
    ----------
    Learn-then-Test, arXiv 2110.01052, Section 2.2 ("split fixed sequence testing");
    Pareto Testing, arXiv 2210.07913, Algorithm 1.

    Examples
    --------
    >>> split_fixed_sequence([0.02, 0.5, 0.01], delta=0.1, order=[2, 0, 1])
    array([ True, False,  True])
    """
    values = check_pvalues(pvalues)
    sequence = np.asarray(order, dtype=np.int64)
    known = (sequence >= 0) & (sequence < len(values))
    if not known.all() or len(np.unique(sequence)) != len(sequence):
        raise ValueError(
            f"order must name candidates between 0 and {len(values) - 1}, each at most once, "
            f"got {sequence.tolist()}"
        )
    rejected = np.zeros(len(values), dtype=bool)
    rejected[sequence] = fixed_sequence(values[sequence], delta)
    return rejected


def pareto_order(
    losses: Sequence[ArrayLike], alpha: Sequence[float], sparsities: ArrayLike
) -> IntArray:
    """The order in which to test candidates, learned from the ordering part of the data.

    Any finite set will do: sparsities x criteria x scopes. Only candidates on the Pareto front are
    worth a test: those for which no other is both safer (on this part of the data) and sparser.
    They are ordered from safest to sparsest.

    Parameters
    ----------
    losses : sequence of array_like [m, C]
        For each risk, the losses of the C candidates on the ordering part of the data.
    alpha : sequence of float
        For each risk, the value allowed.
    sparsities : array_like [C]
        Sparsity of each candidate: what is to be gained by certifying it.

    Returns
    -------
    ndarray of int
        Candidates in the order of testing; sparsity increases along it, so the best certified
        candidate is the last rejected one. Dominated candidates are left out.

    Notes
    -----
    Safety is measured by ``n h(mean, alpha)`` with its sign, the logarithm of Hoeffding's p-value
    continued beyond alpha; with several risks the worst counts. Equally safe candidates are kept,
    the densest first: no loss seen on a small part does not mean no risk.

    References
    ----------
    B. Laufer-Goldshtein et al., "Efficiently controlling multiple risks with Pareto Testing",
    arXiv 2210.07913, Algorithm 1.

    Examples
    --------
    >>> losses = np.zeros((100, 3))
    >>> losses[:4, 1] = losses[:2, 2] = 1.0
    >>> pareto_order([losses], alpha=[0.1], sparsities=[0.2, 0.5, 0.6])
    array([0, 2])
    """
    gains = np.asarray(sparsities, dtype=np.float64)
    if len(losses) != len(alpha) or len(alpha) == 0:
        raise ValueError(f"one alpha per risk is needed, got {len(alpha)} for {len(losses)} risks")
    evidence = np.max(
        [_signed_deviance(part, value) for part, value in zip(losses, alpha, strict=True)], axis=0
    )
    if gains.shape != evidence.shape:
        raise ValueError(
            f"sparsities must have one entry per candidate, got shape {gains.shape} "
            f"for {len(evidence)} candidates"
        )
    front: list[int] = []
    for candidate in np.lexsort((gains, evidence)):
        if not front or gains[candidate] > gains[front[-1]]:
            front.append(int(candidate))
    return np.array(front, dtype=np.int64)


def _signed_deviance(losses: ArrayLike, alpha: float) -> FloatArray:
    alpha = check_probability("alpha", alpha)
    matrix = check_losses(losses)
    sums = loss_sums(matrix)
    return np.sign(sums - len(matrix) * alpha) * binomial_deviance(sums, len(matrix), alpha)
