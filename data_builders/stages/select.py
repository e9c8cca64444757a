"""What the model gets wrong: questions answered wrongly, and images described wrongly."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from data_builders.samples import Outcome, Rejected, Sample
from data_builders.stages.asking import ask, open_model
from data_builders.stages.base import O, Stage
from editing.ranges import Count
from mmtune.data.texts import normalised
from mmtune.metrics.caption_words import caption_words
from mmtune.metrics.captions import rouge_l
from mmtune.metrics.vqa import accuracy, processed

if TYPE_CHECKING:
    from data_builders.stages.asking import Answer

RIGHT, NOTHING = "the model is right", "nothing to edit"
NO_AGREEMENT, LONG, YES_NO = "annotators do not agree", "target too long", "yes or no"
UNANSWERED = "no answers"
UnitShare = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class QuestionOptions:
    """When a question is one that the model gets wrong, and what it is to answer.

    Attributes:
        threshold: the official VQA accuracy below which an answer is wrong. One of ten annotators
            who says the same gives 0.3, so 0.3 takes what nobody said.
        min_agreement: least share of the annotators who gave the target, which is the answer that
            most of them gave; there is none where two were given as often.
        max_words: of a target.
        yes_no: take questions whose target is yes or no.
        batch_size: questions asked at once.
    """

    threshold: UnitShare = 0.3
    min_agreement: UnitShare = 0.5
    max_words: Count = 5
    yes_no: bool = True
    batch_size: Count = 16


class _Selecting(Stage[O]):
    """Aims at what the data say, asks the model, and keeps what it gets wrong."""

    slot: ClassVar[str] = "select"
    answer: Answer

    def open(self) -> None:
        self.answer = open_model(self.context).answer

    def run(self, samples: Sequence[Sample]) -> list[Outcome]:
        outcomes = [self._aimed(sample) for sample in samples]
        left = [outcome for outcome in outcomes if isinstance(outcome, Sample)]
        settings: Any = self.settings
        questions = [sample.question for sample in left]
        said = ask(self.answer, left, questions, self.context.pictures, settings.batch_size)
        after = dict(zip((sample.id for sample in left), said, strict=True))
        return [
            self._after(outcome, after[outcome.id]) if isinstance(outcome, Sample) else outcome
            for outcome in outcomes
        ]

    def _after(self, sample: Sample, said: str | Rejected) -> Outcome:
        return said if isinstance(said, Rejected) else self._judged(sample, said)

    @abstractmethod
    def _aimed(self, sample: Sample) -> Outcome:
        """With its target, before anything is asked."""

    @abstractmethod
    def _judged(self, sample: Sample, said: str) -> Outcome:
        """With what the model says, where that is wrong."""


class Questions(_Selecting[QuestionOptions]):
    """E-VQA: the question stays, the annotators' agreed answer is the target."""

    name: ClassVar[str] = "questions"
    options: ClassVar[type] = QuestionOptions

    def _aimed(self, sample: Sample) -> Outcome:
        own = self.settings
        if not sample.answers:
            return Rejected(sample.id, UNANSWERED)
        target = agreed(sample.answers, own.min_agreement)
        if target is None:
            said = ", ".join(f"{n} {a}" for a, n in Counter(sample.answers).most_common(3))
            return Rejected(sample.id, NO_AGREEMENT, said)
        if len(target.split()) > own.max_words:
            return Rejected(sample.id, LONG, f"{target!r:.80}, over {own.max_words} words")
        if not own.yes_no and processed(target) in ("yes", "no"):
            return Rejected(sample.id, YES_NO)
        return sample.with_(target=target)

    def _judged(self, sample: Sample, said: str) -> Outcome:
        score = accuracy(said, sample.answers)
        if score >= self.settings.threshold:
            return Rejected(sample.id, RIGHT, f"{said!r:.80} has VQA accuracy {score:.2f}")
        return _wrong(sample, said, "vqa_accuracy", score)


@dataclass(frozen=True)
class CaptionOptions:
    """When a caption is one that the model gets wrong, and what it is to say.

    Attributes:
        score: of the model's caption against all captions of the image, in [0, 1]: "rouge-l", the
            longest common subsequence of words, or "word-f1", words in any order, of the closest
            caption. Neither depends on other images, as CIDEr does.
        threshold: the score below which a caption is wrong.
        max_words: of a target, which is the caption that agrees best with the others.
        batch_size: images described at once.
    """

    score: Literal["rouge-l", "word-f1"] = "rouge-l"
    threshold: UnitShare = 0.3
    max_words: Count = 25
    batch_size: Count = 16


class Captions(_Selecting[CaptionOptions]):
    """E-IC: the sample's question is the prompt, the annotators' best caption is the target."""

    name: ClassVar[str] = "captions"
    options: ClassVar[type] = CaptionOptions

    def _aimed(self, sample: Sample) -> Outcome:
        if not any(map(caption_words, sample.answers)):
            return Rejected(sample.id, UNANSWERED)
        target = most_alike(sample.answers, self.settings.max_words)
        if target is None:
            text = f"all {len(sample.answers)} captions are over {self.settings.max_words} words"
            return Rejected(sample.id, LONG, text)
        return sample.with_(target=target)

    def _judged(self, sample: Sample, said: str) -> Outcome:
        words, others = caption_words(said), [caption_words(a) for a in sample.answers]
        measure = {"rouge-l": rouge_l, "word-f1": closest}[self.settings.score]
        score = measure(words, others)
        if score >= self.settings.threshold:
            text = f"{said!r:.80} has {self.settings.score} {score:.2f}"
            return Rejected(sample.id, RIGHT, text)
        return _wrong(sample, said, self.settings.score, score)


def agreed(answers: Sequence[str], least: float) -> str | None:
    """The answer that most annotators gave, in the spelling that most of them used.

    Args:
        answers: one of each annotator.
        least: share of them that must have given it.

    Returns:
        None where fewer agree, or two answers were given as often.
    """
    said = [processed(answer) for answer in answers]
    (best, count), *others = Counter(said).most_common(2) or [("", 0)]
    if not best or count < least * len(said) or any(n == count for _, n in others):
        return None
    return Counter(a for a, s in zip(answers, said, strict=True) if s == best).most_common(1)[0][0]


def most_alike(captions: Sequence[str], most: int) -> str | None:
    """The caption of at most `most` words that has most words in common with the others.

    By the mean word F1; of equal ones the first. None where all are longer.
    """
    words = [caption_words(caption) for caption in captions]
    fit = [i for i, own in enumerate(words) if own and len(captions[i].split()) <= most]

    def likeness(i: int) -> float:
        return sum(word_f1(words[i], other) for j, other in enumerate(words) if j != i)

    return captions[max(fit, key=likeness)] if fit else None


def closest(words: Sequence[str], others: Sequence[Sequence[str]]) -> float:
    """The best word F1 with any of the others."""
    return max(word_f1(words, other) for other in others)


def word_f1(one: Sequence[str], two: Sequence[str]) -> float:
    """The harmonic mean of the shares of words that both have: 2 common / (both), in [0, 1]."""
    common = (Counter(one) & Counter(two)).total()
    return 2 * common / (len(one) + len(two)) if common else 0.0


def _wrong(sample: Sample, said: str, measure: str, score: float) -> Outcome:
    """The sample with what the model says, unless that is the target."""
    same = processed(said) == processed(sample.target)
    if same or normalised(said) == normalised(sample.target):
        return Rejected(sample.id, NOTHING, f"the model says {said!r:.80}, which is the target")
    kept = sample.fields | {measure: round(score, 4)}
    return sample.with_(prediction=said, fields=kept)


STAGES = (Questions, Captions)
