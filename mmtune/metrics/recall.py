"""Retrieval metrics: ranks, recall at k, and bootstrap intervals over queries.

R@k is a hit rate: the share of queries with at least one right answer among the first k. Ties are
broken at random, and the expected value is reported: with g wrong answers scored above the best
right one, and t wrong and p right ones scored equal to it, the chance of a hit within k is
1 - C(t, m) / C(t + p, m) with m = k - g. A model that gives every pair the same score therefore
gets chance level, neither 100 % nor 0 %. Only exactly equal float32 scores are ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmtune.metrics.intervals import draws
from mmtune.tasks.base import Metric

if TYPE_CHECKING:
    from torch import Tensor

KS = (1, 5, 10)
DIRECTIONS = ("txt2img", "img2txt")
RESAMPLES = 2000
CHUNK = 1024  # queries scored at once


@dataclass(frozen=True)
class QueryRanks:
    """Where the right answers of q queries came.

    Attributes:
        above: [q] wrong answers scored above the best right one.
        tied_wrong: [q] wrong answers with exactly its score.
        tied_right: [q] right answers with that score, itself included: at least 1.
        top: [q, n] indices of the best n answers.
    """

    above: np.ndarray
    tied_wrong: np.ndarray
    tied_right: np.ndarray
    top: np.ndarray

    def hits(self, k: int) -> np.ndarray:
        """[q] chance in [0, 1] that a right answer is among the first k."""
        slots = k - self.above
        missed = np.ones(len(slots))
        for drawn in range(k):
            # The next slot holds one of the tied wrong answers, given that all before it did.
            wrong = np.maximum(self.tied_wrong - drawn, 0)
            left = np.maximum(self.tied_wrong + self.tied_right - drawn, 1)
            missed = np.where(drawn < slots, missed * wrong / left, missed)
        return np.where(slots > 0, 1 - missed, 0.0)

    def ranks(self) -> np.ndarray:
        """[q] expected rank of the first right answer; 1 is best."""
        return self.above + 1 + self.tied_wrong / (self.tied_right + 1)


@dataclass(frozen=True)
class RetrievalRanks:
    """Both directions of a set of n images with c captions.

    Attributes:
        txt2img: of c queries, one per caption.
        img2txt: of n queries, one per image.
        owner: [c] index of the image that a caption belongs to.
    """

    txt2img: QueryRanks
    img2txt: QueryRanks
    owner: np.ndarray


def rank_queries(
    scores: Any,
    right: Sequence[Sequence[int]],
    top: int = 10,
    chunk: int = CHUNK,
    progress: Callable[[int], Any] | None = None,
) -> QueryRanks:
    """Rank the answers to every query, `chunk` queries at a time.

    Args:
        scores: [q, a], higher is better; an array or tensor, or a `Scores` whose rows are
            computed when they are asked for.
        right: indices of the right answers of each query, at least one each.
        top: how many best answers to keep.
        chunk: queries at a time.
        progress: called with the number of queries done in each chunk.

    Raises:
        ValueError: a query without a right answer, shapes that differ, or scores that are not
            finite.
    """
    import torch

    count, answers = scores.shape
    if len(right) != count or count == 0:
        raise ValueError(f"{count} rows of scores, but right answers for {len(right)} queries")
    empty = [i for i, r in enumerate(right) if len(r) == 0]
    if empty:
        raise ValueError(f"{len(empty)} queries have no right answer; the first is {empty[0]}")
    parts: list[list[Tensor]] = []
    for start in range(0, count, chunk):
        rows = torch.as_tensor(scores[start : start + chunk])
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"scores of queries {start}..{start + len(rows) - 1} are not finite")
        index, real = _padded(right[start : start + chunk], rows.device)
        own = rows.gather(1, index).masked_fill(~real, -torch.inf)
        best = own.max(1, keepdim=True).values
        tied_right = (own == best).sum(1)
        tied = (rows == best).sum(1) - tied_right
        found = rows.topk(min(top, answers), dim=1).indices
        parts.append([(rows > best).sum(1), tied, tied_right, found])
        if progress is not None:
            progress(len(rows))
    return QueryRanks(*(torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True)))


class Scores:
    """Cosine scores between q queries and a answers, computed row by row in float32.

    Args:
        queries: [q, e], L2-normalised.
        answers: [a, e], L2-normalised, on the same device.
    """

    def __init__(self, queries: Tensor, answers: Tensor) -> None:
        self.queries, self.answers = queries.float(), answers.float()
        self.shape = (len(queries), len(answers))

    def __getitem__(self, rows: slice) -> Tensor:
        return self.queries[rows] @ self.answers.T


def _padded(right: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Ragged indices as [q, m], and [q, m] saying which of them are real."""
    import torch

    width = max(len(r) for r in right)
    index = torch.zeros(len(right), width, dtype=torch.int64)
    real = torch.zeros(len(right), width, dtype=torch.bool)
    for i, r in enumerate(right):
        index[i, : len(r)] = torch.as_tensor(r)
        real[i, : len(r)] = True
    return index.to(device), real.to(device)


def captions_by_image(owner: Sequence[int] | np.ndarray, images: int) -> list[list[int]]:
    """The captions of each image, from the image of each caption."""
    found: list[list[int]] = [[] for _ in range(images)]
    for caption, image in enumerate(owner):
        found[int(image)].append(caption)
    return found


def retrieval_metrics(
    ranks: RetrievalRanks, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Metric]:
    """R@1, 5, 10 both ways in percent, means, sum (RSum, up to 600), and median ranks.

    The 95 % intervals are percentiles of a bootstrap over images, each drawn with all its captions:
    captions of one image are not independent. The same draw serves both directions. Where every
    query hits (or none does), the interval has no width; it says nothing about rarer cases.

    Returns:
        "txt2img R@1", ..., "img2txt R@10", "mean R@1" (of both ways), "mean" (of
        all six), "RSum", "txt2img MdR", "img2txt MdR".
    """
    sums, counts = _per_image(ranks)
    weights = _weights(len(counts), resamples, seed)
    value = _combined(sums.sum(0, keepdims=True), counts.sum(0, keepdims=True))[0]
    drawn = _combined(weights @ sums, weights @ counts)
    return _with_intervals(value, drawn, ranks) | _medians(weights, ranks)


def paired_differences(
    before: RetrievalRanks,
    after: RetrievalRanks,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Metric]:
    """Subtract before from after for every metric, with intervals from the same draws for both.

    Raises:
        ValueError: the two are not of the same queries.
    """
    same = len(before.img2txt.above) == len(after.img2txt.above)
    if not same or not np.array_equal(before.owner, after.owner):
        raise ValueError("the two evaluations are of different queries; evaluate the same split")
    one, counts = _per_image(before)
    two, _ = _per_image(after)
    weights = _weights(len(counts), resamples, seed)
    total = counts.sum(0, keepdims=True)
    value = _combined(two.sum(0, keepdims=True), total) - _combined(
        one.sum(0, keepdims=True), total
    )
    drawn_counts = weights @ counts
    drawn = _combined(weights @ two, drawn_counts) - _combined(weights @ one, drawn_counts)
    return _with_intervals(value[0], drawn, after) | _medians(weights, after, before)


def _per_image(ranks: RetrievalRanks) -> tuple[np.ndarray, np.ndarray]:
    """[n, 6] hits summed over an image's queries, and [n, 6] how many queries they are of."""
    images = len(ranks.img2txt.above)
    columns = []
    for k in KS:
        columns.append(np.bincount(ranks.owner, ranks.txt2img.hits(k), images))
    columns += [ranks.img2txt.hits(k) for k in KS]
    captions = np.bincount(ranks.owner, minlength=images)
    counts = np.stack([captions] * len(KS) + [np.ones(images)] * len(KS), 1)
    return np.stack(columns, 1), counts.astype(np.float64)


def _weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """[resamples, n] how often each image is drawn."""
    return np.stack([times.astype(np.float32) for times in draws(images, resamples, seed)])


def _combined(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[b, 6] sums and counts -> [b, 9]: six recalls in percent, mean R@1, their mean, their sum."""
    recall = 100 * sums / counts
    both = recall.reshape(len(recall), 2, -1).mean(1)
    total = recall.sum(1, keepdims=True)
    return np.concatenate([recall, both[:, :1], both.mean(1, keepdims=True), total], 1)


def _with_intervals(
    value: np.ndarray, drawn: np.ndarray, ranks: RetrievalRanks
) -> dict[str, Metric]:
    names = [f"{d} R@{k}" for d in DIRECTIONS for k in KS]
    names += ["mean R@1", "mean", "RSum"]
    images, captions = len(ranks.img2txt.above), len(ranks.owner)
    numbers = [captions] * len(KS) + [images] * len(KS) + [captions + images] * 3
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {
        name: Metric(float(v), float(a), float(b), n)
        for name, v, a, b, n in zip(names, value, low, high, numbers, strict=True)
    }


def _medians(
    weights: np.ndarray, ranks: RetrievalRanks, minus: RetrievalRanks | None = None
) -> dict[str, Metric]:
    """The median ranks both ways, or how far they are above those of `minus`."""
    metrics = {}
    for direction in DIRECTIONS:
        value, drawn, count = 0.0, np.zeros(len(weights)), 0
        for sign, of in ((1, ranks), (-1, minus)):
            if of is not None:
                r = getattr(of, direction).ranks()
                image = of.owner if direction == "txt2img" else np.arange(len(r))
                value += sign * float(np.median(r))
                drawn += sign * _weighted_medians(r, image, weights)
                count = len(r)
        low, high = np.quantile(drawn, [0.025, 0.975])
        metrics[f"{direction} MdR"] = Metric(value, float(low), float(high), count)
    return metrics


def _weighted_medians(values: np.ndarray, image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[b] median of the values drawn with each row of weights (the lower one where two meet)."""
    order = np.argsort(values, kind="stable")
    values, image = values[order], image[order]
    found = np.empty(len(weights))
    for i, row in enumerate(weights):
        passed = np.cumsum(row[image])
        found[i] = values[np.searchsorted(passed, passed[-1] / 2)]
    return found
