"""Intervals over seeds, against a numerical integral of Student's density and printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmtune.metrics.seeds import over_seeds, t_quantile


def area_below(t, degrees, points=400_001):
    """P(T < t) by Simpson's rule over the density."""
    x = np.linspace(0, t, points)
    log = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    density = math.exp(log) / math.sqrt(degrees * math.pi)
    y = density * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    weights = np.full(points, 2.0)
    weights[1::2], weights[0], weights[-1] = 4, 1, 1
    return 0.5 + float(weights @ y) * (t / (points - 1)) / 3


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 30, 101])
@pytest.mark.parametrize("probability", [0.6, 0.95, 0.975, 0.995])
def test_quantile_holds_its_probability(degrees, probability):
    t = t_quantile(probability, degrees)
    assert area_below(t, degrees) == pytest.approx(probability, abs=1e-9)


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_quantiles_of_printed_tables(degrees, t):
    assert t_quantile(0.975, degrees) == pytest.approx(t, abs=5e-5)


def test_interval_over_three_seeds_by_hand():
    found = over_seeds([30.0, 33.0, 36.0])
    assert (found.value, found.n) == (33.0, 3)
    t = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))  # the quantile of two degrees, in closed form
    assert found.half == pytest.approx(t * 3 / math.sqrt(3), rel=1e-12)


def test_one_seed_has_no_interval_and_none_is_refused():
    one = over_seeds([7.0])
    assert (one.value, one.half, one.n) == (7.0, None, 1)
    with pytest.raises(ValueError, match="got none"):
        over_seeds([])
