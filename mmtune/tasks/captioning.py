"""Captioning: training on captions word by word; CIDEr, BLEU and ROUGE-L of written ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mmtune.data.options import Count
from mmtune.data.transforms import AugmentOptions
from mmtune.tasks.base import (
    Evaluation,
    GalleryItem,
    Metric,
    Shown,
    device_of,
    evaluating,
    on_device,
    places_for_gains,
    require_same_split,
)
from mmtune.tasks.language import WritingTask, joint_mean, server_id, text_losses
from mmtune.tasks.media import CaptionedTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.data.pairs import Pair
    from mmtune.data.records import Record
    from mmtune.metrics.captions import CaptionScores


@dataclass(frozen=True)
class CaptioningOptions:
    """Settings of the captioning task.

    Attributes:
        prompt: what every caption goes on from, no part of the loss or of what is scored (LLaVA:
            with <image>); "" for none, null for the model family's.
        captions: "sampled" trains on one caption per image and epoch, in turns; "all" on all pairs.
        beams: of beam search.
        min_tokens, max_tokens: new tokens, the end token included. BLIP's lengths of 5 to 20 count
            the begin token and the three of its prompt: they are 1 to 16 here.
        label_smoothing: of the training loss; BLIP's released code has 0.1.
        augment: random changes to training images; null trains on the evaluation transform.
        eval_batch_size: images at once.
        resamples: bootstrap draws behind the intervals.
    """

    prompt: str | None = None
    captions: Literal["sampled", "all"] = "sampled"
    beams: Count = 3
    min_tokens: Annotated[int, Field(ge=0)] = 1
    max_tokens: Count = 16
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment: AugmentOptions | None = field(default_factory=AugmentOptions)
    eval_batch_size: Count = 32
    resamples: Annotated[int, Field(ge=100)] = 2000

    def __post_init__(self) -> None:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must not be above max_tokens, got {self.min_tokens} and "
                f"{self.max_tokens}"
            )


class CaptioningTask(WritingTask, CaptionedTask):
    """Describe images.

    The loss is the negative log-likelihood of the captions' tokens (end tokens included), averaged
    over all of the batch. Arguments as `MediaTask`; `loaded` must write text.

    Source: BLIP, arXiv 2201.12086, section 4.2. The released code smooths labels by 0.1
    (`label_smoothing`).
    """

    name: ClassVar[str] = "captioning"
    summary: ClassVar[str] = "captions: LM loss; CIDEr, BLEU, ROUGE-L of what is written"
    options: ClassVar[type] = CaptioningOptions
    template: ClassVar[str] = "caption"

    def prompts(self, count: int) -> dict[str, Tensor]:
        """{input_ids [count, t], attention_mask [count, t]}."""
        tokenizer, limit = self.loaded.tokenizer, self.loaded.context_length
        return self.writer.prompts(tokenizer, [self.prompt] * count, limit)

    def collate(self, samples: Sequence[Pair]) -> dict[str, Tensor]:
        """Pairs -> the batch of `Generative.target_logits`, a caption for each image."""
        import torch

        tokenizer, captions = self.loaded.tokenizer, [s.caption for s in samples]
        prompts = self.prompts(len(samples))
        room = max(self.loaded.context_length - prompts["input_ids"].shape[1], 1)
        return {
            "pixel_values": torch.stack([s.pixels for s in samples]),
            **prompts,
            **self.writer.targets(tokenizer, captions, room, self.prompt),
            "owner": torch.arange(len(samples)),
        }

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of a token over the captions of all processes."""
        logits = self.writer.target_logits(model, self._in_dtype(batch))
        mask, smoothing = batch["target_mask"], self.settings.label_smoothing
        losses = text_losses(logits, batch["target_ids"], mask, smoothing)
        return joint_mean(losses.sum(), mask.sum()), {}

    def evaluate(self, model: nn.Module, split: str = "test", progress: bool = True) -> Evaluation:
        """Write a caption for every image of a split, and score it against the image's own.

        The details hold `predictions`, [{image_id, caption}] as the COCO evaluation takes them.
        """
        from tqdm.auto import tqdm

        from mmtune.metrics.caption_words import caption_words
        from mmtune.metrics.captions import CaptionScores

        started = time.perf_counter()
        records = self._records(split)
        bar = tqdm(total=len(records), desc=f"evaluate {split}", unit="image", disable=not progress)
        with evaluating(model), bar:
            captions = [c for some in self._captions(model, records, bar) for c in some]
        references = [[caption_words(c) for c in r.captions] for r in records]
        scores = CaptionScores([caption_words(c) for c in captions], references)
        predictions = [
            {"image_id": server_id(r.id), "caption": c}
            for r, c in zip(records, captions, strict=True)
        ]
        details = {"split": split, "scores": scores, "predictions": predictions}
        metrics = scores.metrics(self.settings.resamples)
        return Evaluation(metrics, "CIDEr", details, time.perf_counter() - started)

    def _captions(
        self, model: nn.Module, records: Sequence[Record], bar: Any
    ) -> Iterator[list[str]]:
        from mmtune.backbones.generation import Decoding, texts_of

        options = self.settings
        decoding = Decoding(options.beams, options.min_tokens, options.max_tokens)
        for pixels in self._pixels(model, records):
            prompts = on_device(self.prompts(len(pixels)), device_of(model))
            ids = self.writer.generate(model, {"pixel_values": pixels, **prompts}, decoding)
            yield texts_of(self.loaded.tokenizer, ids, self.writer.ends)
            bar.update(len(pixels))

    def compare(self, before: Evaluation, after: Evaluation) -> dict[str, Metric]:
        """The gain of every metric, with intervals from the same draws of images for both."""
        require_same_split(before, after)
        scores: CaptionScores = after.details["scores"]
        return scores.metrics(self.settings.resamples, minus=before.details["scores"])

    def gallery(self, before: Evaluation, after: Evaluation, limit: int = 12) -> list[GalleryItem]:
        """Images whose caption's CIDEr changed most: gains, then losses."""
        require_same_split(before, after)
        moved = after.details["scores"].cider - before.details["scores"].cider
        order = [int(i) for i in np.argsort(-np.abs(moved), kind="stable")]
        gains, losses = ([i for i in order if sign * moved[i] > 0] for sign in (1, -1))
        chosen = gains[: places_for_gains(limit, len(losses))]
        chosen += losses[: limit - len(chosen)]
        split = before.details["split"]
        return [self._item(self._records(split)[i], i, before, after) for i in chosen]

    def _item(self, record: Record, i: int, before: Evaluation, after: Evaluation) -> GalleryItem:
        from mmtune.data.video import picture

        both = (before.details, after.details)
        scores = [100 * float(d["scores"].cider[i]) for d in both]
        cells = [[Shown(text=d["predictions"][i]["caption"] or "(nothing)")] for d in both]
        query = Shown(image=picture(record.image), text=record.captions[0])
        return GalleryItem(f"CIDEr {scores[0]:.0f} → {scores[1]:.0f}", query, *cells)
