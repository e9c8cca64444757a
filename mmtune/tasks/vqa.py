"""Visual question answering: training on weighted answers; answers written or chosen."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmtune.batched import batched
from mmtune.data.options import Count, DataOptions
from mmtune.data.records import DataError, Problem, Question, listed
from mmtune.data.transforms import AugmentOptions
from mmtune.tasks.base import (
    Evaluation,
    GalleryItem,
    Metric,
    device_of,
    evaluating,
    on_device,
    require_same_split,
)
from mmtune.tasks.language import WritingTask, joint_mean, server_id, text_losses

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.base import Loaded
    from mmtune.data.questions import Asked, QuestionDataset
    from mmtune.tasks.answer_ranking import AnswerRanker
    from mmtune.tasks.vqa_scores import VqaScores

log = logging.getLogger(__name__)
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class VqaOptions:
    """Settings of the VQA task.

    Attributes:
        inference: "generate" writes an answer; "rank" chooses the most likely of a list.
        prompt: the question's template, with {question} in it (LLaVA: and <image>); null takes the
            model family's.
        answer_list: for "rank": a JSON list of answers, or a text file with one a line; null takes
            the training answers, the frequent ones first.
        candidates: for "rank": answers scored whole, after the first token has chosen them; null
            scores all.
        missing_answers: for "rank": what to do about questions of which the list holds no answer:
            "warn" names and counts them, "raise" stops before training.
        beams: for "generate".
        max_tokens: for "generate", the end token included.
        label_smoothing: of the training loss; BLIP's released code has 0.1.
        dataset_weights: factor on the answers of questions whose field `dataset` has this value;
            BLIP's released code has {vg: 0.2}.
        groups: fields of a question; each of their values gets a row of its own in the results.
        augment: random changes to training images; null trains on the evaluation transform.
        eval_batch_size: questions at once.
        resamples: bootstrap draws behind the intervals.
    """

    inference: Literal["generate", "rank"] = "generate"
    prompt: str | None = None
    answer_list: str | None = None
    candidates: Count | None = 128
    missing_answers: Literal["warn", "raise"] = "warn"
    beams: Count = 1
    max_tokens: Count = 10
    label_smoothing: Share = 0.0
    dataset_weights: dict[str, float] = field(default_factory=dict)
    groups: tuple[str, ...] = ("answer_type", "kind")
    augment: AugmentOptions | None = field(default_factory=AugmentOptions)
    eval_batch_size: Count = 32
    resamples: Annotated[int, Field(ge=100)] = 2000

    def __post_init__(self) -> None:
        if self.prompt is not None and "{question}" not in self.prompt:
            raise ValueError(f"prompt must hold {{question}}, got {self.prompt!r}")
        if self.answer_list is not None and self.inference != "rank":
            raise ValueError("answer_list is for inference: rank")


class VqaTask(WritingTask):
    """Answer questions about images.

    The loss of a batch of b questions is sum_q sum_j w_qj NLL(a_qj) / b over the distinct answers
    a_qj, w_qj the share of annotators who gave it, NLL summed over an answer's tokens. A question
    is read once, whatever the number of its answers.

    Args:
        options: see `VqaOptions`.
        data, loaded, seed, progress: see `MediaTask`; the model must write text.

    Raises:
        DataError: see `MediaTask`; or there is no list of answers to rank, or what it lacks with
            `missing_answers: raise`.
        ValueError: a model that does not write text.

    Source: BLIP, arXiv 2201.12086, section 4.3 (as ALBEF). The released code smooths labels by 0.1
    (`label_smoothing`) and gives answers of Visual Genome a weight of 0.2 (`dataset_weights`).
    """

    name: ClassVar[str] = "vqa"
    summary: ClassVar[str] = "visual question answering: weighted LM loss; VQA accuracy"
    options: ClassVar[type] = VqaOptions
    kind: ClassVar[type[Question]] = Question
    template: ClassVar[str] = "question"
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "exact match")  # the first ranks runs

    def __init__(
        self,
        options: Any,
        data: DataOptions,
        loaded: Loaded,
        seed: int,
        progress: bool = True,
    ) -> None:
        super().__init__(options, data, loaded, seed, progress)
        self._ranker: AnswerRanker | None = None
        if options.inference == "rank":
            self._ranker = self._make_ranker()
            self._report_missing(self._ranker.answers)

    @classmethod
    def reads(cls, options: Any, split: str) -> tuple[str, ...]:
        """Ranking by the training answers reads them for an evaluation too."""
        ranked = options.inference == "rank" and options.answer_list is None
        return tuple(dict.fromkeys([split, *(["train"] if ranked else [])]))

    def _texts(self, record: Question) -> Sequence[str]:
        return (record.question,)

    def _dataset(self, records: Sequence[Question]) -> QuestionDataset:
        from mmtune.data.questions import QuestionDataset

        return QuestionDataset(records, self.train_pixels)

    def prompts(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """{input_ids [b, t], attention_mask [b, t]} of questions in their template."""
        texts = [self.prompt.replace("{question}", q.question) for q in questions]
        return self.writer.prompts(self.loaded.tokenizer, texts, self.loaded.context_length)

    def collate(self, samples: Sequence[Asked]) -> dict[str, Tensor]:
        """B questions with n distinct answers -> the batch of `Generative.target_logits`.

        And weights [n], of the answers.
        """
        import torch

        from mmtune.data.questions import weighted

        questions = [s.question for s in samples]
        factors = (self._factor(q) for q in questions)
        answers = [weighted(q.answers, f) for q, f in zip(questions, factors, strict=True)]
        owner = [i for i, own in enumerate(answers) for _ in own]
        return {
            "pixel_values": torch.stack([s.pixels for s in samples]),
            **self.prompts(questions),
            **self._targets([a for own in answers for a in own]),
            "owner": torch.tensor(owner),
            "weights": torch.tensor([w for own in answers for w in own.values()]),
        }

    def _factor(self, question: Question) -> float:
        return self.settings.dataset_weights.get(str(question.fields.get("dataset")), 1.0)

    def _targets(self, answers: Sequence[str]) -> dict[str, Tensor]:
        limit, after = self.loaded.context_length, self.prompt
        return self.writer.targets(self.loaded.tokenizer, answers, limit, after)

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted loss over the questions of all processes."""
        logits = self.writer.target_logits(model, self._in_dtype(batch))
        smoothing = self.settings.label_smoothing
        losses = text_losses(logits, batch["target_ids"], batch["target_mask"], smoothing)
        return joint_mean((batch["weights"].to(losses) * losses).sum(), len(batch["input_ids"])), {}

    def evaluate(self, model: nn.Module, split: str = "test", progress: bool = True) -> Evaluation:
        """Answer every question of a split, and score those whose answers are known.

        The details hold `predictions`, [{question_id, answer}] as VQA servers take them.
        """
        from tqdm.auto import tqdm

        from mmtune.tasks.vqa_scores import VqaScores

        started = time.perf_counter()
        questions = self._records(split)
        bar = tqdm(
            total=len(questions), desc=f"evaluate {split}", unit="question", disable=not progress
        )
        with evaluating(model), bar:
            given = [a for some in self._answers(model, questions, bar) for a in some]
        scores = VqaScores.of(questions, given, self.settings.groups, self.measures)
        predictions = [
            {"question_id": server_id(q.id), "answer": answer}
            for q, answer in zip(questions, given, strict=True)
        ]
        details = {"split": split, "scores": scores, "predictions": predictions}
        metrics = scores.metrics(self.settings.resamples)
        return Evaluation(metrics, self.measures[0], details, time.perf_counter() - started)

    def _answers(
        self, model: nn.Module, questions: Sequence[Question], bar: Any
    ) -> Iterator[list[str]]:
        some = batched(questions, self.settings.eval_batch_size)
        for chunk, pixels in zip(some, self._pixels(model, questions), strict=True):
            prompts = on_device(self.prompts(chunk), device_of(model))
            yield self._written(model, {"pixel_values": pixels, **prompts})
            bar.update(len(chunk))

    def _written(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[str]:
        from mmtune.backbones.generation import Decoding, texts_of

        if self._ranker is not None:
            return self._ranker.best(model, batch)
        decoding = Decoding(beams=self.settings.beams, max_tokens=self.settings.max_tokens)
        ids = self.writer.generate(model, batch, decoding)
        return texts_of(self.loaded.tokenizer, ids, self.writer.ends)

    def _make_ranker(self) -> AnswerRanker:
        from mmtune.tasks.answer_ranking import AnswerRanker

        path = self.settings.answer_list
        if path is not None:
            answers = read_answers(path)
        else:
            train = self.splits.get("train")
            if train is None:
                text = "inference: rank needs task.answer_list, or data.train for its answers"
                raise DataError([Problem("config", "no answer list", text)])
            counts = Counter(a for q in train.records for a in q.answers)
            answers = [a for a, _ in counts.most_common()]
        return AnswerRanker(
            self.writer,
            self.loaded.tokenizer,
            answers,
            self.settings.candidates,
            self.loaded.context_length,
            self.prompt,
        )

    def _report_missing(self, answers: Sequence[str]) -> None:
        """Name and count the questions that no answer of the list can be right for."""
        from mmtune.metrics.vqa import processed

        known = {processed(a) for a in answers}
        lost = {
            split: [
                Problem(
                    q.where, "answer not in the list", f"{q.question!r}: {sorted(set(q.answers))}"
                )
                for q in self._records(split)
                if q.answers and known.isdisjoint(map(processed, q.answers))
            ]
            for split in self.splits
            if split != "train"
        }
        every = [problem for own in lost.values() for problem in own]
        if every and self.settings.missing_answers == "raise":
            raise DataError(every, "Add them to the list, or set task.missing_answers: warn.")
        for split, own in lost.items():
            if own:
                log.warning(
                    "%s: the answer list (%d) lacks every answer to %d of %d questions, which "
                    "count as wrong: %s",
                    split,
                    len(known),
                    len(own),
                    sum(bool(q.answers) for q in self._records(split)),
                    listed(own),
                )

    def compare(self, before: Evaluation, after: Evaluation) -> dict[str, Metric]:
        """The gain of every metric, with intervals from the same draws of images for both."""
        require_same_split(before, after)
        scores: VqaScores = after.details["scores"]
        return scores.metrics(self.settings.resamples, minus=before.details["scores"])

    def gallery(self, before: Evaluation, after: Evaluation, limit: int = 12) -> list[GalleryItem]:
        """Questions whose score changed: gains, then losses, each of a different image."""
        from mmtune.tasks.vqa_scores import changed_answers

        require_same_split(before, after)
        return changed_answers(before.details["scores"], after.details["scores"], limit)


def read_answers(path: str) -> list[str]:
    """The distinct answers of a JSON list, or of a text file with one a line, in their order.

    Raises:
        DataError: missing, not a list of texts, or empty.
    """
    from mmtune.data.readers.json_files import load_json, read_text, wrong_shape

    if Path(path).suffix == ".json":
        found = load_json(path)
        if not isinstance(found, list) or not all(isinstance(a, str) for a in found):
            raise wrong_shape(path, "a list of answers", found)
    else:
        found = read_text(path).splitlines()
    answers = list(dict.fromkeys(a.strip() for a in found if a.strip()))
    if not answers:
        raise DataError([Problem(path, "no answers in the list")])
    return answers
