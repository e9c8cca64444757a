"""Questions to train on, and their weighted answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from mmtune.data.records import MediaRef, Question

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """One training sample: a question, and the pixels that it is about."""

    pixels: Tensor
    question: Question


class QuestionDataset(Dataset):
    """Questions whose augmentation depends on (seed, epoch, index) only.

    Args:
        questions: with answers.
        load: (image or video, epoch, index) -> model input, [3, s, s] or [f, 3, s, s].
    """

    def __init__(
        self, questions: Sequence[Question], load: Callable[[MediaRef, int, int], Tensor]
    ) -> None:
        self.questions, self.load = questions, load
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Asked:
        question = self.questions[index]
        return Asked(self.load(question.image, self.epoch, index), question)


def weighted(answers: Sequence[str], scale: float = 1.0) -> dict[str, float]:
    """Each distinct answer -> scale * the share of annotators who gave it, in order of mention."""
    return {a: scale * count / len(answers) for a, count in Counter(answers).items()}
