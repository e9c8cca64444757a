"""Scores of given answers, and which of them changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmtune.data.video import picture
from mmtune.metrics.intervals import cluster_numbers, mean_metrics
from mmtune.metrics.vqa import accuracy, exact_match
from mmtune.tasks.base import GalleryItem, Metric, Shown, places_for_gains

if TYPE_CHECKING:
    from mmtune.data.records import Question

MEASURES = {"accuracy": accuracy, "exact match": exact_match}


@dataclass(frozen=True)
class VqaScores:
    """The scored questions of a split; those with hidden answers are not among them.

    Attributes:
        questions: q of them.
        given: the answer to each.
        names: of m metrics.
        values: [q, m] percent; NaN where a question is not of a metric's kind.
        image: [q] number of the image; its questions are drawn together.
    """

    questions: list[Question]
    given: list[str]
    names: list[str]
    values: np.ndarray
    image: np.ndarray

    @classmethod
    def of(
        cls,
        questions: Sequence[Question],
        given: Sequence[str],
        groups: Sequence[str],
        measures: Sequence[str] = tuple(MEASURES),
    ) -> VqaScores:
        """Score answers by some of `MEASURES`; the values of the fields `groups` by the first."""
        known = [(q, a) for q, a in zip(questions, given, strict=True) if q.answers]
        asked, answers = [q for q, _ in known], [a for _, a in known]
        columns = {
            name: np.array([100 * MEASURES[name](a, q.answers) for q, a in known])
            for name in measures
        }
        first = columns[measures[0]]
        for name in groups:
            kinds = [q.fields.get(name) for q in asked]
            different = sorted({str(k) for k in kinds if k is not None})
            for kind in different:
                own = np.array([str(k) == kind for k in kinds])
                columns[f"{measures[0]} ({kind})"] = np.where(own, first, np.nan)
        values = np.stack(list(columns.values()), axis=1)
        image = cluster_numbers([q.image for q in asked])
        return cls(asked, answers, list(columns), values, image)

    def metrics(self, resamples: int, minus: VqaScores | None = None) -> dict[str, Metric]:
        """Means in percent with intervals, or by how much they are above those of `minus`.

        Raises:
            ValueError: `minus` is of other questions.
        """
        if not self.questions:
            return {}
        if minus is not None and [q.id for q in minus.questions] != [q.id for q in self.questions]:
            raise ValueError(
                "the two evaluations are of different questions; evaluate the same split"
            )
        other = None if minus is None else minus.values
        return mean_metrics(self.names, self.values, self.image, resamples, other)


def changed_answers(before: VqaScores, after: VqaScores, limit: int) -> list[GalleryItem]:
    """Questions whose score changed: gains, then losses, the largest changes first.

    Each takes half of the places, and more where the other has too few; an image and a question
    (its text) are shown once while there are others.
    """
    moved = after.values[:, 0] - before.values[:, 0]
    order = np.argsort(-np.abs(moved), kind="stable")
    gains = _varied([int(i) for i in order if moved[i] > 0], after)
    losses = _varied([int(i) for i in order if moved[i] < 0], after)
    chosen = gains[: places_for_gains(limit, len(losses))]
    chosen += losses[: limit - len(chosen)]
    return [_item(i, before, after) for i in chosen]


def _varied(indices: list[int], scores: VqaScores) -> list[int]:
    """The same, those first whose image and text did not come before."""
    images, texts = set(), set()
    fresh, rest = [], []
    for i in indices:
        image, text = int(scores.image[i]), scores.questions[i].question
        (rest if image in images or text in texts else fresh).append(i)
        images.add(image)
        texts.add(text)
    return fresh + rest


def _item(i: int, before: VqaScores, after: VqaScores) -> GalleryItem:
    question = after.questions[i]
    old, new = before.values[i, 0], after.values[i, 0]
    truth = ", ".join(dict.fromkeys(question.answers))
    query = Shown(image=picture(question.image), text=f"{question.question} ({truth})")
    cells = [
        [Shown(text=scores.given[i] or "(nothing)", correct=bool(scores.values[i, 0] >= 50))]
        for scores in (before, after)
    ]
    return GalleryItem(f"{after.names[0]} {old:.0f} → {new:.0f}", query, *cells)
