"""Visual question answering: training on weighted answers; answers written or chosen."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmtune.data.options import DataOptions
from mmtune.data.records import LISTED, DataError, Problem, Question
from mmtune.data.texts import report_too_long
from mmtune.data.transforms import AugmentOptions, EvalTransform, TrainTransform
from mmtune.tasks.base import (
    Evaluation,
    GalleryItem,
    Metric,
    Task,
    chunks,
    device_of,
    dtype_of,
    evaluating,
    first_process,
    require_same_split,
)
from mmtune.tasks.language import filled, joint_mean, on_device, text_losses, writer_of
from mmtune.tasks.pairs import DECODERS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from mmtune.backbones.base import Loaded
    from mmtune.data.pairs import NoPairs
    from mmtune.data.questions import Asked, QuestionDataset
    from mmtune.tasks.answer_ranking import AnswerRanker
    from mmtune.tasks.vqa_scores import VqaScores

log = logging.getLogger(__name__)
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


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
            "warn" names and counts them, "raise" stops.
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


class VqaTask(Task):
    """Answer questions about images.

    The loss of a batch of b questions is sum_q sum_j w_qj NLL(a_qj) / b over the distinct answers
    a_qj, w_qj the share of annotators who gave it, NLL summed over an answer's tokens. A question
    is read once, whatever the number of its answers.

    Args:
        options: see `VqaOptions`.
        data: train, val and test sources; every image is decoded once here, before training.
        loaded: a model that writes text, with its tokenizer and image specification.
        seed: of augmentation.
        progress: draw a progress bar while checking the data.

    Raises:
        DataError: bad records, or training questions without answers, with `on_error: raise`.
        ValueError: a model that does not write text.

    Source: BLIP, arXiv 2201.12086, section 4.3 (as ALBEF). The released code smooths labels by 0.1
    (`label_smoothing`) and gives answers of Visual Genome a weight of 0.2 (`dataset_weights`).
    """

    name: ClassVar[str] = "vqa"
    summary: ClassVar[str] = "visual question answering: weighted LM loss; VQA accuracy"
    options: ClassVar[type] = VqaOptions
    videos: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "exact match")  # the first ranks runs

    def __init__(
        self,
        options: Any,
        data: DataOptions,
        loaded: Loaded,
        seed: int,
        progress: bool = True,
    ) -> None:
        from mmtune.data.checking import load_data
        from mmtune.data.questions import answered

        self.backbone = writer_of(loaded, self.name)
        self.settings, self.loaded, self.seed = options, loaded, seed
        self.template = options.prompt or self.backbone.templates["question"]
        show = progress and first_process()
        found = load_data(data, show, kind=Question, videos=self.videos)
        self.splits = answered(found, data.on_error)
        self.data_files = [f for split in self.splits.values() for f in split.files]
        self.truncated = report_too_long(
            (q.question for s in self.splits.values() for q in s.records),
            loaded.count_tokens,
            loaded.context_length,
        )
        self.eval_transform = EvalTransform(loaded.image)
        self._questions = self._train_questions()
        self.train_dataset: Dataset = self._questions
        self._ranker: AnswerRanker | None = None
        if options.inference == "rank":
            self._ranker = self._make_ranker()

    @classmethod
    def reads(cls, options: Any, split: str) -> tuple[str, ...]:
        """Ranking by the training answers reads them for an evaluation too."""
        ranked = options.inference == "rank" and options.answer_list is None
        return tuple(dict.fromkeys([split, *(["train"] if ranked else [])]))

    def _train_questions(self) -> QuestionDataset | NoPairs:
        from mmtune.data.pairs import NoPairs
        from mmtune.data.questions import QuestionDataset

        if "train" not in self.splits:
            return NoPairs()
        return QuestionDataset(self._records("train"), self._training_pixels())

    def _training_pixels(self) -> Any:
        """(question, epoch, index) -> [3, s, s]."""
        from mmtune.data.images import load_image

        if self.settings.augment is None:
            return lambda question, epoch, index: self.pixels(question)
        transform = TrainTransform(self.loaded.image, self.settings.augment, self.seed)
        return lambda question, epoch, index: transform(load_image(question.image), epoch, index)

    def pixels(self, question: Question) -> Tensor:
        """[3, s, s] of the question's image, as evaluation sees it."""
        from mmtune.data.images import load_image

        return self.eval_transform(load_image(question.image))

    def picture(self, question: Question) -> Any:
        """What a report shows of the question's image."""
        from mmtune.data.images import load_image

        return load_image(question.image)

    def _records(self, split: str) -> list[Question]:
        if split not in self.splits:
            have = ", ".join(self.splits) or "none"
            raise DataError([Problem("config", f"data.{split} is not set", f"there are: {have}")])
        return self.splits[split].records

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of `epoch`."""
        self._questions.epoch = epoch

    def prompts(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """{input_ids [b, t], attention_mask [b, t]} of questions in their template."""
        texts = [filled(self.template, question=q.question) for q in questions]
        return self.backbone.prompts(self.loaded.tokenizer, texts, self.loaded.context_length)

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
        limit, after = self.loaded.context_length, self.template
        return self.backbone.targets(self.loaded.tokenizer, answers, limit, after)

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted loss over the questions of all processes."""
        pixels = batch["pixel_values"].to(dtype_of(self.loaded.model))
        logits = self.backbone.target_logits(model, {**batch, "pixel_values": pixels})
        smoothing = self.settings.label_smoothing
        losses = text_losses(logits, batch["target_ids"], batch["target_mask"], smoothing)
        return joint_mean((batch["weights"].to(losses) * losses).sum(), len(pixels)), {}

    def evaluate(self, model: nn.Module, split: str = "test", progress: bool = True) -> Evaluation:
        """Answer every question of a split, and score those whose answers are known.

        The details hold `predictions`, [{question_id, answer}] as VQA servers take them.
        """
        from tqdm.auto import tqdm

        from mmtune.tasks.vqa_scores import VqaScores

        started = time.perf_counter()
        questions = self._records(split)
        if self._ranker is not None:
            self._report_missing(split, questions)
        bar = tqdm(
            total=len(questions), desc=f"evaluate {split}", unit="question", disable=not progress
        )
        with evaluating(model), bar:
            given = [a for some in self._answers(model, questions, bar) for a in some]
        scores = VqaScores.of(questions, given, self.settings.groups, self.measures)
        predictions = [
            {"question_id": int(q.id) if q.id.isdecimal() else q.id, "answer": answer}
            for q, answer in zip(questions, given, strict=True)
        ]
        details = {"split": split, "scores": scores, "predictions": predictions}
        metrics = scores.metrics(self.settings.resamples)
        return Evaluation(metrics, self.measures[0], details, time.perf_counter() - started)

    def _answers(
        self, model: nn.Module, questions: Sequence[Question], bar: Any
    ) -> Iterator[list[str]]:
        import torch

        device, dtype = device_of(model), dtype_of(self.loaded.model)
        with ThreadPoolExecutor(DECODERS) as pool:
            for chunk in chunks(questions, self.settings.eval_batch_size):
                pixels = torch.stack(list(pool.map(self.pixels, chunk))).to(dtype)
                batch = on_device({"pixel_values": pixels, **self.prompts(chunk)}, device)
                yield self._written(model, batch)
                bar.update(len(chunk))

    def _written(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[str]:
        from mmtune.backbones.generation import Decoding, texts_of

        if self._ranker is not None:
            return self._ranker.best(model, batch)
        decoding = Decoding(beams=self.settings.beams, max_tokens=self.settings.max_tokens)
        ids = self.backbone.generate(model, batch, decoding)
        return texts_of(self.loaded.tokenizer, ids, self.backbone.ends)

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
            self.backbone,
            self.loaded.tokenizer,
            answers,
            self.settings.candidates,
            self.loaded.context_length,
            self.template,
        )

    def _report_missing(self, split: str, questions: Sequence[Question]) -> None:
        """Name and count the questions that no answer of the list can be right for."""
        from mmtune.metrics.vqa import processed

        known = {processed(a) for a in self._ranker.answers}  # type: ignore[union-attr]
        asked = [q for q in questions if q.answers]
        lost = [
            Problem(q.where, "answer not in the list", f"{q.question!r}: {sorted(set(q.answers))}")
            for q in asked
            if known.isdisjoint(map(processed, q.answers))
        ]
        if lost and self.settings.missing_answers == "raise":
            raise DataError(lost, "Add them to the list, or set task.missing_answers: warn.")
        if lost:
            shown = "; ".join(map(str, lost[:LISTED]))
            log.warning(
                "%s: the answer list (%d) lacks every answer to %d of %d questions, which count as "
                "wrong: %s",
                split,
                len(known),
                len(lost),
                len(asked),
                shown,
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
        return changed_answers(
            before.details["scores"], after.details["scores"], self.picture, limit
        )


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
