"""CIDEr, BLEU and ROUGE-L of captions, as the COCO caption evaluation counts them.

Scores depend on how captions are split into words; see `mmtune.metrics.caption_words`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmtune.metrics.intervals import drawn_sums
from mmtune.tasks.base import Metric

Words = Sequence[str]
ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # bigrams by which a caption may be longer or shorter, of CIDEr-D's penalty
BETA = 1.2  # weight of recall in ROUGE-L
TINY, SMALL = 1e-15, 1e-9  # where there is no n-gram, of the released code of BLEU


def ngrams(words: Words) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram occurs, for n = 1 to 4."""
    return [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for n in range(1, ORDERS + 1)
    ]


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """[q] CIDEr-D of each caption; the frequencies of n-grams are those of all references.

    Source: Vedantam et al., arXiv 1411.5726, section 5 (CIDEr-D), times 10 as in the released code,
    whose length penalty counts bigrams.
    """
    given = [ngrams(c) for c in captions]
    known = [[ngrams(r) for r in refs] for refs in references]
    documents = Counter(
        gram for refs in known for gram in {g for ref in refs for order in ref for g in order}
    )
    weight = {gram: math.log(len(known) / count) for gram, count in documents.items()}
    rare = math.log(len(known)) if known else 0.0

    def vectors(counts: list[Counter]) -> tuple[list[dict], list[float], int]:
        found = [{g: c * weight.get(g, rare) for g, c in order.items()} for order in counts]
        lengths = [math.sqrt(sum(v * v for v in vector.values())) for vector in found]
        return found, lengths, counts[1].total()

    scores = []
    for caption, refs in zip(given, known, strict=True):
        own, norms, length = vectors(caption)
        total = 0.0
        for ref in refs:
            theirs, ref_norms, ref_length = vectors(ref)
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * SIGMA**2))
            for x, y, a, b in zip(own, theirs, norms, ref_norms, strict=True):
                if a and b:
                    product = sum(min(v, y.get(g, 0.0)) * y.get(g, 0.0) for g, v in x.items())
                    total += penalty * product / (a * b)
        scores.append(10 * total / (ORDERS * len(refs)))
    return np.array(scores)


def bleu_counts(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """[q, 10]: right n-grams (n = 1 to 4), n-grams in all, words, and those of the references.

    Right ones are clipped to their most frequent use in one reference; the reference's length is
    the closest (between two, the shorter).
    """
    rows = []
    for words, refs in zip(captions, references, strict=True):
        known = [ngrams(r) for r in refs]
        right, every = [], []
        for order, own in enumerate(ngrams(words)):
            most: Counter[tuple[str, ...]] = Counter()
            for ref in known:
                most |= ref[order]
            right.append((own & most).total())
            every.append(own.total())
        closest = min((abs(len(r) - len(words)), len(r)) for r in refs)[1]
        rows.append([*right, *every, len(words), closest])
    return np.array(rows, dtype=np.float64)


def bleu(counts: np.ndarray) -> np.ndarray:
    """[b, 10] sums of `bleu_counts` -> [b, 4]: BLEU-1 to BLEU-4 in [0, 1].

    Source: Papineni et al., ACL 2002, over a whole corpus.
    """
    right, every = counts[:, :ORDERS], counts[:, ORDERS : 2 * ORDERS]
    precisions = (right + TINY) / (every + SMALL)
    means = np.exp(np.log(precisions).cumsum(1) / np.arange(1, ORDERS + 1))
    ratio = (counts[:, 8] + TINY) / (counts[:, 9] + SMALL)
    return means * np.exp(np.minimum(0.0, 1 - 1 / ratio))[:, None]


def rouge_l(words: Words, references: Sequence[Words]) -> float:
    """ROUGE-L in [0, 1]; precision and recall are each the best over the references.

    Source: Lin, ACL 2004, with beta = 1.2 as in the released code.
    """
    if not words:
        return 0.0
    common = [(_common(words, ref), len(ref)) for ref in references if ref]
    precision = max((c / len(words) for c, _ in common), default=0.0)
    recall = max((c / n for c, n in common), default=0.0)
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(one: Words, two: Words) -> int:
    """The length of the longest common subsequence."""
    above = [0] * (len(two) + 1)
    for word in one:
        row = [0]
        for j, other in enumerate(two):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]


class CaptionScores:
    """Scores of a split's captions, one for each image.

    Args:
        captions: q captions as words.
        references: those of each image, at least one.

    Raises:
        ValueError: no captions, or an image without references.
    """

    def __init__(self, captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
        if not captions:
            raise ValueError("there are no captions to score")
        empty = [i for i, refs in enumerate(references) if not refs]
        if empty:
            raise ValueError(f"every caption needs a reference; there are none for {empty[:5]}")
        self.cider = cider(captions, references)
        pairs = zip(captions, references, strict=True)
        self.rouge = np.array([rouge_l(c, refs) for c, refs in pairs])
        self.counts = bleu_counts(captions, references)

    def metrics(self, resamples: int, minus: CaptionScores | None = None) -> dict[str, Metric]:
        """All times 100, with bootstrap intervals over images, or the gain over `minus`.

        The frequencies of n-grams that CIDEr weighs with stay those of the whole split.

        Raises:
            ValueError: `minus` is of another number of images.
        """
        value, drawn = self._values(resamples)
        if minus is not None:
            if len(minus.cider) != len(self.cider):
                raise ValueError(
                    "the two evaluations are of different images; evaluate the same split"
                )
            other, other_drawn = minus._values(resamples)
            value, drawn = value - other, drawn - other_drawn
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        names = ("CIDEr", *(f"BLEU-{n}" for n in range(1, ORDERS + 1)), "ROUGE-L")
        return {
            name: Metric(float(v), float(a), float(b), len(self.cider))
            for name, v, a, b in zip(names, value, low, high, strict=True)
        }

    def _values(self, resamples: int) -> tuple[np.ndarray, np.ndarray]:
        """[6] and [resamples, 6]."""
        count = len(self.cider)
        both = np.concatenate([np.stack([self.cider, self.rouge], 1), self.counts], axis=1)
        drawn = drawn_sums(both, np.arange(count), resamples)
        every = np.concatenate([both.sum(0, keepdims=True), drawn])
        means = every[:, :2] / count
        found = np.concatenate([means[:, :1], bleu(every[:, 2:]), means[:, 1:]], axis=1)
        return 100 * found[0], 100 * found[1:]
