"""Questions to train on, their weighted answers, and questions that have none."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from mmtune.data.checking import ADVICE, Checked
from mmtune.data.options import OnError
from mmtune.data.records import LISTED, DataError, Problem, Question

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
REASON = "question without answers"


@dataclass(frozen=True)
class Asked:
    """One training sample: a question, and the pixels that it is about."""

    pixels: Tensor
    question: Question


class QuestionDataset(Dataset):
    """Questions whose augmentation depends on (seed, epoch, index) only.

    Args:
        questions: with answers.
        pixels: (question, epoch, index) -> what the model sees.
    """

    def __init__(
        self, questions: Sequence[Question], pixels: Callable[[Question, int, int], Tensor]
    ) -> None:
        self.questions, self.pixels = questions, pixels
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Asked:
        question = self.questions[index]
        return Asked(self.pixels(question, self.epoch, index), question)


def weighted(answers: Sequence[str], scale: float = 1.0) -> dict[str, float]:
    """Each distinct answer -> scale * the share of annotators who gave it, in order of mention."""
    return {a: scale * count / len(answers) for a, count in Counter(answers).items()}


def answered(splits: Mapping[str, Checked], on_error: OnError) -> dict[str, Checked]:
    """The splits, of which train and val hold no question without an answer.

    A test split may have hidden answers: it is predicted, and what is answered in it is scored.

    Raises:
        DataError: there are such questions and on_error is "raise"; or a split holds no others.
    """
    bad = {
        role: [Problem(q.where, REASON, repr(q.question)) for q in split.records if not q.answers]
        for role, split in splits.items()
        if role != "test"
    }
    problems = [p for own in bad.values() for p in own]
    if problems and on_error == "raise":
        raise DataError(problems, ADVICE)
    return {
        role: _without(split, bad[role], role) if bad.get(role) else split
        for role, split in splits.items()
    }


def _without(split: Checked, bad: Sequence[Problem], role: str) -> Checked:
    shown = "; ".join(str(p) for p in bad[:LISTED])
    log.warning("%s: left out %d of %d questions: %s", role, len(bad), len(split.records), shown)
    left: list[Any] = [q for q in split.records if q.answers]
    if not left:
        raise DataError([*bad, Problem(role, "no usable record", "all were left out")])
    return replace(split, records=left, skipped=split.skipped | {REASON: len(bad)})
