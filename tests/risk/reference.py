"""Slow, obvious versions of the statistics, to 60 digits where it matters."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
from scipy import stats

mpmath.mp.dps = 60


def binomial_cdf(k: int, n: int, alpha: float) -> mpmath.mpf:
    """P(B <= k), summed from the largest term down."""
    return _tail(k, n, alpha)[0]


def hinge(a: int, n: int, alpha: float) -> mpmath.mpf:
    """E(a - B)^+."""
    return _tail(a, n, alpha)[1]


def _tail(k: int, n: int, alpha: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """P(B <= k) and E(k - B)^+, summed term by term."""
    k = min(k, n)
    a = mpmath.mpf(alpha)
    term = mpmath.exp(
        mpmath.loggamma(n + 1)
        - mpmath.loggamma(k + 1)
        - mpmath.loggamma(n - k + 1)
        + k * mpmath.log(a)
        + (n - k) * mpmath.log1p(-a)
    )
    total, moment = mpmath.mpf(0), mpmath.mpf(0)
    odds = (1 - a) / a
    for i in range(k, -1, -1):
        total += term
        moment += term * (k - i)
        if i < n * a and term * n < total * mpmath.mpf(10) ** -30:
            break
        term *= mpmath.mpf(i) / (n - i + 1) * odds
    return total, moment


def hoeffding(total: float, n: int, alpha: float) -> mpmath.mpf:
    """exp(-n h(mean, alpha)), or 1 from the mean on."""
    s, a = mpmath.mpf(total), mpmath.mpf(alpha)
    if s >= n * a:
        return mpmath.mpf(1)
    mean = s / n
    h = (1 - mean) * mpmath.log((1 - mean) / (1 - a)) if mean < 1 else mpmath.mpf(0)
    if mean > 0:
        h += mean * mpmath.log(mean / a)
    return mpmath.exp(-n * h)


def bentkus(total: float, n: int, alpha: float) -> mpmath.mpf:
    """min(1, e F(ceil(S)))."""
    return min(mpmath.mpf(1), mpmath.e * binomial_cdf(int(np.ceil(total)), n, alpha))


def convex(total: float, n: int, alpha: float) -> mpmath.mpf:
    """The minimum over every integer a in (S, n], one after the other."""
    best = mpmath.mpf(1)
    for a in range(int(np.floor(total)) + 1, n + 1):
        best = min(best, hinge(a, n, alpha) / (a - mpmath.mpf(total)))
    return best


def betting(losses: np.ndarray, alpha: float, counted: np.ndarray | None = None) -> float:
    """One level, one example at a time."""
    n = len(losses)
    wealth = peak = 1.0
    seen: list[float] = []
    squares = 0.0
    for i, loss in enumerate(losses):
        if counted is not None and not counted[i]:
            continue
        planned = n * (len(seen) + 1) / (i + 1)
        variance = (0.25 + squares) / (1 + len(seen))
        stake = min(np.sqrt(2 * np.log(10) / (planned * variance)), 0.9 / (1 - alpha))
        wealth *= 1 - stake * (loss - alpha)
        peak = max(peak, wealth)
        seen.append(float(loss))
        squares += (loss - (0.5 + sum(seen)) / (1 + len(seen))) ** 2
    return float(1 / peak)


def closed_test(
    pvalues: np.ndarray, delta: float, weights: np.ndarray, transitions: np.ndarray
) -> np.ndarray:
    """The graphical procedure as what it abbreviates: a closed test of all intersections.

    Level j is rejected if every set of levels that contains j is rejected by a weighted
    Bonferroni test, whose weights are what the graph leaves when all others are taken out.
    """
    levels = len(pvalues)
    rejected = np.ones(levels, dtype=bool)
    for size in range(1, levels + 1):
        for members in itertools.combinations(range(levels), size):
            share, graph = weights.copy(), transitions.copy()
            for node in set(range(levels)) - set(members):
                share, graph = _remove(share, graph, node)
            if not any(share[j] > 0 and pvalues[j] <= delta * share[j] for j in members):
                rejected[list(members)] = False
    return rejected


def _remove(share: np.ndarray, graph: np.ndarray, node: int) -> tuple[np.ndarray, np.ndarray]:
    levels = len(share)
    new_share, new_graph = share.copy(), np.zeros_like(graph)
    for j in range(levels):
        if j == node:
            new_share[j] = 0.0
            continue
        new_share[j] = share[j] + share[node] * graph[node, j]
        for k in range(levels):
            back = graph[j, node] * graph[node, j]
            if k not in (j, node) and back < 1:
                new_graph[j, k] = (graph[j, k] + graph[j, node] * graph[node, k]) / (1 - back)
    return new_share, new_graph


def error_spending(counts, allowed, alpha, risk=None):
    """Critical numbers of errors at each look, and the probability of ever being rejected.

    The law of the number of errors of a level not rejected so far, in full. With `risk`, the
    probability is that for a level of this risk, at boundaries for `alpha`.
    """
    law, actual = np.ones(1), np.ones(1)
    risk = alpha if risk is None else risk
    spent = rejected = 0.0
    critical = []
    previous = 0
    for count, limit in zip(counts, allowed, strict=True):
        more = count - previous
        previous = count
        law = np.convolve(law, stats.binom.pmf(np.arange(more + 1), more, alpha))
        actual = np.convolve(actual, stats.binom.pmf(np.arange(more + 1), more, risk))
        boundary = -np.inf
        for errors in range(count + 1):
            if spent + law[errors] > limit:
                break
            boundary = errors
            spent += law[errors]
            rejected += actual[errors]
            law[errors] = actual[errors] = 0.0
        critical.append(boundary)
    return critical, rejected
