"""Bootstrap over clusters: closed forms, pairing, columns that not all items have."""

from __future__ import annotations

import numpy as np
import pytest

from mmtune.metrics.intervals import cluster_numbers, drawn_sums, mean_metrics


def test_clusters_are_numbered_by_first_appearance():
    assert cluster_numbers(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


def test_a_draw_takes_whole_clusters():
    values = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    drawn = drawn_sums(values, np.array([0, 0, 1]), 500)
    assert {tuple(row) for row in drawn} == {(6, 60), (7, 70), (8, 80)}


def test_the_interval_of_a_mean_is_that_of_theory():
    rng = np.random.default_rng(3)
    values = rng.normal(50, 10, (400, 1))
    found = mean_metrics(["x"], values, np.arange(400), 4000)["x"]
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.08)
    assert found.value - found.low == pytest.approx(half, rel=0.08)
    # The same items in clusters of four alike: twice as wide.
    alike = np.repeat(values[:100], 4, axis=0)
    wide = mean_metrics(["x"], alike, np.arange(400) // 4, 4000)["x"]
    assert wide.high - wide.low == pytest.approx(3.92 * values[:100].std() / 10, rel=0.08)


def test_a_column_counts_its_own_items_only():
    values = np.array([[0.0, np.nan], [100.0, 100.0], [50.0, 20.0]])
    found = mean_metrics(["all", "some"], values, np.arange(3), 300)
    assert (found["all"].value, found["all"].n) == (50, 3)
    assert (found["some"].value, found["some"].n) == (60, 2)
    assert found["some"].low >= 20
    gain = mean_metrics(["all", "some"], values, np.arange(3), 300, minus=values - 5)
    assert {(m.value, m.low, m.high) for m in gain.values()} == {(5, 5, 5)}
