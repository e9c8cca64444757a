"""From records to a table: means, bootstrap intervals over images, paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from editing.metrics.definitions import Definition
from mmtune.metrics.intervals import drawn_sums
from mmtune.tasks.base import Metric

RESAMPLES, SEED = 1000, 31000
LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Score:
    """What one record gives for one definition.

    Attributes:
        total: summed over the record's answer tokens, or over its answers.
        n: how many these are, at least 1.
    """

    total: float
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"a score is over at least one token, got n = {self.n}; use None")

    @property
    def value(self) -> float:
        """The record's mean."""
        return self.total / self.n


def joined_score(scores: Sequence[Score | None]) -> Score | None:
    """One score of a record's several probes: over all their tokens; None where there is none."""
    found = [s for s in scores if s is not None]
    return Score(sum(s.total for s in found), sum(s.n for s in found)) if found else None


@dataclass(frozen=True)
class Summary:
    """A definition over all records; intervals are 95 % bootstrap ones.

    Attributes:
        definition: what the numbers are.
        n: records with a score; those without are left out.
        missing: records without.
        images: clusters that the bootstrap draws; equal to n where records were drawn alone.
        macro: mean over records of the record's mean.
        micro: mean over tokens.
        exact: share of records that have every token right; None for what is no share.
        std_error: of macro as if records were independent; None for a single record.
        groups: macro within each group, in order of appearance.
        group_macro: mean of these; None without groups.
    """

    definition: Definition
    n: int
    missing: int
    images: int
    macro: Metric
    micro: Metric
    exact: Metric | None
    std_error: float | None
    groups: dict[str, float]
    group_macro: float | None


@dataclass(frozen=True)
class Difference:
    """First minus second on the records that both have.

    Attributes:
        macro: mean difference of the records' means, with its 95 % interval.
        not_above_zero: share of resamples whose mean is at most zero.
    """

    macro: Metric
    not_above_zero: float


def macro(scores: Sequence[Score | None]) -> float:
    """Mean over records of total / n; NaN where there is none."""
    values = [s.value for s in scores if s is not None]
    return statistics.fmean(values) if values else float("nan")


def micro(scores: Sequence[Score | None]) -> float:
    """Sum of totals over sum of n; NaN where there is none."""
    joint = joined_score(scores)
    return joint.value if joint else float("nan")


def exact(scores: Sequence[Score | None]) -> float:
    """Share of records with total = n; NaN where there is none."""
    values = [float(s.total == s.n) for s in scores if s is not None]
    return statistics.fmean(values) if values else float("nan")


def summarize(
    definition: Definition,
    scores: Sequence[Score | None],
    images: Sequence[str] | None,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Summary:
    """Average one definition over records.

    The bootstrap draws images with replacement, each with all of its records: records about one
    image are not independent. Each summary has draws of its own from `seed`.

    Args:
        definition: of the scores.
        scores: one a record; None where it has none.
        images: the image that each record edits; None draws records alone, which is right only
            where no two share an image.
        groups: kinds of records (hops, data sets) with means of their own.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: no record has a score, or lengths differ.
    """
    kept, clusters = _kept([s is not None for s in scores], images)
    found = [s for s in scores if s is not None]
    values = np.array([s.value for s in found])
    right = [float(s.total == s.n) for s in found]
    totals, counts = np.array([(s.total, s.n) for s in found], dtype=np.float64).T
    columns = np.stack([values, np.ones(len(found)), totals, counts, right], axis=1)
    drawn = _drawn(columns, clusters, resamples, seed)
    every = np.concatenate([columns.sum(0, keepdims=True), drawn])

    def metric(above: int, below: int) -> Metric:
        means = every[:, above] / every[:, below]
        return _metric(means[0], means[1:], len(found))

    names = [] if groups is None else [_at(groups, i, scores) for i in kept]
    means = {g: _mean_where(values, [n == g for n in names]) for g in dict.fromkeys(names)}
    return Summary(
        definition=definition,
        n=len(found),
        missing=len(scores) - len(found),
        images=int(clusters.max()) + 1,
        macro=metric(0, 1),
        micro=metric(2, 3),
        exact=metric(4, 1) if definition.unit == "share" else None,
        std_error=float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None,
        groups=means,
        group_macro=statistics.fmean(means.values()) if means else None,
    )


def paired(
    first: Sequence[Score | None],
    second: Sequence[Score | None],
    images: Sequence[str] | None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Difference:
    """The difference of two methods (or of after and before) on the same records.

    Args:
        first: one a record.
        second: of the same records, in the same order.
        images: as in `summarize`.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: no record has both scores, or lengths differ.
    """
    pairs = list(zip(first, second, strict=True))
    _, clusters = _kept([a is not None and b is not None for a, b in pairs], images)
    gains = [a.value - b.value for a, b in pairs if a is not None and b is not None]
    columns = np.stack([gains, np.ones(len(gains))], axis=1)
    drawn = _drawn(columns, clusters, resamples, seed)
    means = drawn[:, 0] / drawn[:, 1]
    metric = _metric(float(np.mean(gains)), means, len(gains))
    return Difference(metric, float(np.mean(means <= 0)))


def overall(values: Sequence[float]) -> tuple[float, float]:
    """Arithmetic and harmonic mean of a method's metrics; the latter is 0 if any is."""
    return statistics.fmean(values), statistics.harmonic_mean(values)


def _kept(there: Sequence[bool], images: Sequence[str] | None) -> tuple[list[int], np.ndarray]:
    """Indices of the records that count, and their cluster numbers in order of the names."""
    kept = [i for i, is_there in enumerate(there) if is_there]
    if not kept:
        raise ValueError(f"none of {len(there)} records has a score to average")
    if images is None:
        return kept, np.arange(len(kept))
    chosen = [_at(images, i, there) for i in kept]
    numbers = {name: number for number, name in enumerate(sorted(set(chosen)))}
    return kept, np.array([numbers[name] for name in chosen])


def _at(names: Sequence[str], index: int, records: Sequence) -> str:
    if len(names) != len(records):
        raise ValueError(f"expected a name for each of {len(records)} records, got {len(names)}")
    return names[index]


def _drawn(columns: np.ndarray, clusters: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[resamples, k] sums; the draws are those of the golden numbers."""
    drawn = _draws(int(clusters.max()) + 1, resamples, seed)
    return drawn_sums(columns, clusters, resamples, drawn=drawn)


@lru_cache(maxsize=2)  # a table averages the same clusters over and over
def _draws(count: int, resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    """How often each of `count` clusters is drawn, once a resample."""
    state = np.random.RandomState(seed)  # its stream never changes between numpy's versions
    return tuple(
        np.bincount(state.randint(0, count, size=count), minlength=count).astype(np.float64)
        for _ in range(resamples)
    )


def _mean_where(values: np.ndarray, where: Sequence[bool]) -> float:
    return float(values[np.array(where)].mean())


def _metric(value: float, drawn: np.ndarray, n: int) -> Metric:
    low, high = np.quantile(drawn, LEVELS)
    return Metric(float(value), float(low), float(high), n)
