"""How far two small samples lie apart, without a guess at their distribution.

The shift between the samples is estimated as Hodges and Lehmann do, by the median of all pairwise differences; the
interval around it holds the differences that a Mann-Whitney test does not refuse. The distribution of its statistic is
counted out exactly for small samples.

Source: Hollander, Wolfe, Chicken, "Nonparametric Statistical Methods", 3rd edition, section 4.1 to 4.3.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_EXACT_PAIRS = 900
"""Up to 30 against 30; beyond, the normal approximation is good to three digits."""


@dataclass(frozen=True)
class Shift:
    """By how much a sample lies above another one.

    Attributes:
        estimate: of the shift.
        low, high: bounds that hold it with the confidence asked for; None: the samples are too small to give any.
    """

    estimate: float
    low: float | None
    high: float | None


def shift(old: Sequence[float], new: Sequence[float], alpha: float) -> Shift:
    """From old to new.

    Args:
        old, new: at least one value each.
        alpha: the bounds miss the true shift with at most this probability, above 0, below 1.
    """
    assert old and new and 0 < alpha < 1
    differences = sorted(each - other for each in new for other in old)
    skip = _skipped(len(old), len(new), alpha)
    estimate = statistics.median(differences)
    if skip < 1:
        return Shift(estimate, None, None)
    return Shift(estimate, differences[skip - 1], differences[len(differences) - skip])


def least_repeats(alpha: float) -> int:
    """How many values on each side are needed for bounds at all."""
    return next(count for count in range(1, 100) if _skipped(count, count, alpha) >= 1)


@functools.cache
def _skipped(m: int, n: int, alpha: float) -> int:
    """The greatest k with P(U <= k - 1) <= alpha / 2: the k-th difference from either end bounds the shift; 0: none."""
    if m * n > _EXACT_PAIRS:
        deviation = math.sqrt(m * n * (m + n + 1) / 12)
        return max(0, math.floor(m * n / 2 + statistics.NormalDist().inv_cdf(alpha / 2) * deviation))
    ways = _ways(m, n)
    total, seen = sum(ways), 0
    for k, count in enumerate(ways):
        seen += count
        if seen / total > alpha / 2:
            return k
    raise AssertionError("all ways together are more than any alpha")


def _ways(m: int, n: int) -> list[int]:
    """In how many orders of m and n values Mann-Whitney's U is 0, 1, …, m n.

    That is the number of partitions of U into at most m parts of at most n: the coefficients of a Gaussian binomial,
    here by multiplying with (1 - q^(n + i)) and dividing by (1 - q^i).
    """
    ways = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):
            ways[u] -= ways[u - n - i]
        for u in range(i, m * n + 1):
            ways[u] += ways[u - i]
    return ways
