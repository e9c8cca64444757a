"""Bootstrap intervals of means, and of what else follows from sums over a split.

Items of one cluster (the questions about one image) are drawn together: they are not independent.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

from mmtune.tasks.base import Metric


def cluster_numbers(keys: Sequence[Hashable]) -> np.ndarray:
    """[q] numbers from 0; items of equal key share one."""
    found: dict[Hashable, int] = {}
    return np.array([found.setdefault(key, len(found)) for key in keys], dtype=np.int64)


def draws(clusters: int, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """[n] how often each of n clusters is drawn, in n draws with replacement; once a resample."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)


def drawn_sums(
    values: np.ndarray,
    clusters: np.ndarray,
    resamples: int,
    seed: int = 0,
    drawn: Iterable[np.ndarray] | None = None,
) -> np.ndarray:
    """[resamples, k]: the sum of each column over clusters drawn with replacement.

    Equal clusters and seeds give the same draws, whatever the values: so differences are paired.

    Args:
        values: [q, k].
        clusters: [q] as `cluster_numbers` gives them.
        resamples: number of draws.
        seed: of the draws.
        drawn: how often each cluster is drawn, once a resample, instead of `draws` from the seed.
    """
    count = int(clusters.max()) + 1
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, clusters, values)
    every = draws(count, resamples, seed) if drawn is None else drawn
    return np.stack([times @ sums for times in every])


def mean_metrics(
    names: Sequence[str],
    values: np.ndarray,
    clusters: np.ndarray,
    resamples: int,
    minus: np.ndarray | None = None,
) -> dict[str, Metric]:
    """The mean of each column with its 95 % interval.

    Args:
        names: of the columns.
        values: [q, m]; NaN where an item does not belong to a column.
        clusters: [q].
        resamples: bootstrap draws.
        minus: [q, m] of the same items, whose means are subtracted.
    """
    counts = ~np.isnan(values)
    given = values if minus is None else values - minus
    both = np.concatenate([np.where(counts, given, 0.0), counts], axis=1)
    drawn = drawn_sums(both, clusters, resamples)
    width = len(names)
    with np.errstate(invalid="ignore"):  # a draw may miss a rare column
        means = drawn[:, :width] / drawn[:, width:]
    value = both[:, :width].sum(0) / counts.sum(0)
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    return {
        name: Metric(float(v), float(a), float(b), int(n))
        for name, v, a, b, n in zip(names, value, low, high, counts.sum(0), strict=True)
    }
