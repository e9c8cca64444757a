"""The mean over seeds and how far it may be off: Student's t over a handful of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SeedMean:
    """A mean over n seeds; the 95 % interval is value -+ half (None for a single seed).

    It says how far another set of seeds may be off, not another set of queries.
    """

    value: float
    half: float | None
    n: int


def over_seeds(values: Sequence[float], level: float = 0.95) -> SeedMean:
    """The mean m of n values with its t-interval m -+ t s / sqrt(n), s with n - 1 below.

    Raises:
        ValueError: there is no value.
    """
    count = len(values)
    if count == 0:
        raise ValueError("expected the value of one seed at least, got none")
    mean = statistics.fmean(values)
    if count == 1:
        return SeedMean(mean, None, 1)
    spread = statistics.stdev(values, mean) / math.sqrt(count)
    return SeedMean(mean, t_quantile((1 + level) / 2, count - 1) * spread, count)


def t_quantile(probability: float, degrees: int) -> float:
    """The t below which Student's distribution holds `probability`, in (0.5, 1)."""
    low, high = 0.0, 1.0
    while _central(high, degrees) < 2 * probability - 1:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        if _central(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return high


def _central(t: float, degrees: int) -> float:
    """P(|T| < t) in closed form.

    Source:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 (odd) and 26.7.4 (even).
    """
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(odd + 1, degrees, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
