"""Image-text retrieval: contrastive training of a two-tower model, and recall both ways."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmtune.data.options import DataOptions
from mmtune.data.records import DataError, Problem, Record
from mmtune.data.texts import normalised, report_too_long
from mmtune.data.transforms import AugmentOptions, EvalTransform, TrainTransform
from mmtune.tasks.base import Evaluation, GalleryItem, Metric

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from mmtune.backbones.base import Loaded
    from mmtune.data.pairs import NoPairs, Pair, PairDataset

MAX_SCALE = 100.0  # CLIP's own limit on a trained temperature
DECODERS = 4  # threads; decoding and resizing leave Python's lock


@dataclass(frozen=True)
class RetrievalOptions:
    """Settings of the retrieval task.

    Attributes:
        loss: "clip" (softmax) or "sigmoid" (SigLIP's); "auto" takes sigmoid where the model has a
            logit bias.
        train_logit_scale: train the temperature (and bias) too. It is not part of an adapter file;
            rankings do not depend on it.
        sigmoid_bias: added to the logits of the sigmoid loss where the model has no bias.
        captions: "sampled" trains on one caption per image and epoch, in turns; "all" on all pairs.
        identical: "positive": equal captions (normalised text) match each other's images, in the
            loss and in evaluation, and so do captions of one image in the loss. "distinct": only
            the given pairs match, as in published results on COCO and Flickr30k.
        augment: random changes to training images; null trains on the evaluation transform.
        eval_batch_size: images or texts embedded at once.
        resamples: bootstrap draws behind the intervals.
    """

    loss: Literal["auto", "clip", "sigmoid"] = "auto"
    train_logit_scale: bool = False
    sigmoid_bias: float = -10.0
    captions: Literal["sampled", "all"] = "sampled"
    identical: Literal["positive", "distinct"] = "positive"
    augment: AugmentOptions | None = field(default_factory=AugmentOptions)
    eval_batch_size: Annotated[int, Field(ge=1)] = 128
    resamples: Annotated[int, Field(ge=100)] = 2000


class Gallery:
    """The images and captions of a split, and which of them match.

    Attributes:
        records: one per image.
        captions: of all images, in order.
        owner: index of the image that each caption belongs to.
        images_of: for each caption, the images that are right answers.
        captions_of: for each image, the captions that are right answers.
    """

    def __init__(self, records: Sequence[Record], identical: str) -> None:
        self.records = records
        self.captions = [c for r in records for c in r.captions]
        self.owner = [i for i, r in enumerate(records) for _ in r.captions]
        alike = identical == "positive"
        keys = [normalised(c) if alike else str(n) for n, c in enumerate(self.captions)]
        images: dict[str, set[int]] = {}
        texts: dict[str, set[int]] = {}
        for number, (key, image) in enumerate(zip(keys, self.owner, strict=True)):
            images.setdefault(key, set()).add(image)
            texts.setdefault(key, set()).add(number)
        self.images_of = [sorted(images[key]) for key in keys]
        found: list[set[int]] = [set() for _ in records]
        for key, image in zip(keys, self.owner, strict=True):
            found[image] |= texts[key]
        self.captions_of = [sorted(f) for f in found]


class RetrievalTask:
    """Find the image for a text and the text for an image.

    Args:
        options: see `RetrievalOptions`.
        data: train, val and test sources; every image is decoded once here, before training.
        loaded: the model with its tokenizer and image specification.
        seed: of augmentation and of the order in which captions take turns.
        progress: draw a progress bar while checking the data.

    Raises:
        DataError: bad records, with `on_error: raise`; or a source that cannot be read.
    """

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "image-text retrieval: CLIP or sigmoid loss; R@1/5/10 both ways"
    options: ClassVar[type] = RetrievalOptions

    def __init__(
        self,
        options: RetrievalOptions,
        data: DataOptions,
        loaded: Loaded,
        seed: int,
        progress: bool = True,
    ) -> None:
        from mmtune.data.checking import load_data

        self.settings, self.loaded, self.seed = options, loaded, seed
        first = os.environ.get("RANK", "0") == "0"
        self.splits = load_data(data, progress and first)
        self.data_files = [f for split in self.splits.values() for f in split.files]
        self.truncated = report_too_long(
            (c for s in self.splits.values() for r in s.records for c in r.captions),
            loaded.count_tokens,
            loaded.context_length,
        )
        self.eval_transform = EvalTransform(loaded.image)
        self._galleries: dict[str, Gallery] = {}
        self._pairs = self._train_pairs()
        self.train_dataset: Dataset = self._pairs

    def _train_pairs(self) -> PairDataset | NoPairs:
        from mmtune.data.pairs import NoPairs, PairDataset

        if "train" not in self.splits:
            return NoPairs()
        records = self._records("train")
        return PairDataset(records, self._train_pixels(), self.settings.captions, self.seed)

    def _train_pixels(self) -> Any:
        if self.settings.augment is None:
            return lambda image, epoch, index: self.eval_transform(image)
        return TrainTransform(self.loaded.image, self.settings.augment, self.seed)

    def _records(self, split: str) -> list[Record]:
        if split not in self.splits:
            have = ", ".join(self.splits) or "none"
            raise DataError([Problem("config", f"data.{split} is not set", f"there are: {have}")])
        return self.splits[split].records

    def gallery_of(self, split: str) -> Gallery:
        """The images and captions of a split, and which match."""
        if split not in self._galleries:
            self._galleries[split] = Gallery(self._records(split), self.settings.identical)
        return self._galleries[split]

    def set_epoch(self, epoch: int) -> None:
        """Choose the captions and augmentation of `epoch`."""
        self._pairs.epoch = epoch

    def collate(self, samples: Sequence[Pair]) -> dict[str, Tensor]:
        """Pairs -> {pixel_values [b, 3, s, s], input_ids [b, t], attention_mask?, groups [b, 2]}.

        A row of groups is (image, normalised text) as numbers: pairs that share one match.
        """
        import torch

        groups = torch.tensor([[s.image, s.text] for s in samples], dtype=torch.int64)
        return {
            "pixel_values": torch.stack([s.pixels for s in samples]),
            **self.loaded.tokenize([s.caption for s in samples]),
            "groups": groups,
        }

    def before_training(self, model: nn.Module) -> None:
        """Make the temperature trainable where `train_logit_scale` asks for it.

        Call it after the adapter was put on the model (PEFT freezes everything else) and before the
        optimiser is made.
        """
        if self.settings.train_logit_scale:
            for name, parameter in model.named_parameters():
                if name.rsplit(".", 1)[-1] in ("logit_scale", "logit_bias"):
                    parameter.requires_grad_(True)

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """The contrastive loss of this process's pairs against those of all processes.

        Raises:
            ValueError: train_logit_scale is set, but the model's temperature is frozen.
        """
        from mmtune.tasks.losses import clip_loss, sigmoid_loss

        batch = {**batch, "pixel_values": batch["pixel_values"].to(self._dtype())}
        groups = batch.pop("groups") if self.settings.identical == "positive" else None
        pairs = self.loaded.backbone.embed_pairs(model, batch)
        scale, bias = pairs.scale, pairs.bias
        if not self.settings.train_logit_scale:
            scale, bias = scale.detach(), None if bias is None else bias.detach()
        elif model.training and not scale.requires_grad:
            raise ValueError(
                "task.train_logit_scale is true, but the model's logit_scale is frozen: call "
                "task.before_training(model) before the optimiser is made"
            )
        else:
            scale = scale.clamp(max=MAX_SCALE)
        kind = self.settings.loss
        if kind == "clip" or (kind == "auto" and bias is None):
            return clip_loss(pairs.image, pairs.text, scale, groups), {}
        if bias is None:
            bias = scale.new_tensor(self.settings.sigmoid_bias)
        return sigmoid_loss(pairs.image, pairs.text, scale, bias, groups), {}

    def _dtype(self) -> Any:
        return next(p.dtype for p in self.loaded.model.parameters() if p.is_floating_point())

    def evaluate(self, model: nn.Module, split: str = "test", progress: bool = True) -> Evaluation:
        """Recall both ways over all images and captions of a split.

        Each image and each distinct caption is embedded once. Scores are cosines in float32, ranked
        on the model's device a chunk of queries at a time; ties count as `mmtune.metrics.recall`
        says.
        """
        import numpy as np
        import torch
        from tqdm.auto import tqdm

        from mmtune.metrics.recall import (
            RetrievalRanks,
            Scores,
            rank_queries,
            retrieval_metrics,
        )

        started = time.perf_counter()
        gallery = self.gallery_of(split)
        texts = list(dict.fromkeys(gallery.captions))
        number = {text: i for i, text in enumerate(texts)}
        total = 2 * len(gallery.records) + len(texts) + len(gallery.captions)
        with (
            torch.no_grad(),
            _evaluating(model),
            tqdm(total=total, desc=f"evaluate {split}", unit="item", disable=not progress) as bar,
        ):
            images = torch.cat(list(self._embed_images(model, gallery.records, bar)))
            distinct = torch.cat(list(self._embed_texts(model, texts, bar)))
            captions = distinct[[number[c] for c in gallery.captions]]
            txt2img = rank_queries(Scores(captions, images), gallery.images_of, progress=bar.update)
            img2txt = rank_queries(
                Scores(images, captions), gallery.captions_of, progress=bar.update
            )
        ranks = RetrievalRanks(txt2img, img2txt, np.asarray(gallery.owner))
        metrics = retrieval_metrics(ranks, self.settings.resamples)
        seconds = time.perf_counter() - started
        return Evaluation(metrics, "mean", {"split": split, "ranks": ranks}, seconds)

    def _embed_images(
        self, model: nn.Module, records: Sequence[Record], bar: Any
    ) -> Iterator[Tensor]:
        import torch

        from mmtune.data.images import load_image

        device, dtype = _device(model), self._dtype()
        with ThreadPoolExecutor(DECODERS) as pool:
            for chunk in _chunks(records, self.settings.eval_batch_size):
                pixels = pool.map(lambda r: self.eval_transform(load_image(r.image)), chunk)
                batch = torch.stack(list(pixels)).to(device, dtype)
                yield self.loaded.backbone.encode_image(model, batch).float()
                bar.update(len(chunk))

    def _embed_texts(self, model: nn.Module, texts: Sequence[str], bar: Any) -> Iterator[Tensor]:
        device = _device(model)
        for chunk in _chunks(texts, self.settings.eval_batch_size):
            tokens = {k: v.to(device) for k, v in self.loaded.tokenize(chunk).items()}
            yield self.loaded.backbone.encode_text(model, **tokens).float()
            bar.update(len(chunk))

    def compare(self, before: Evaluation, after: Evaluation) -> dict[str, Metric]:
        """The gain of every metric, with intervals from the same draws of images for both."""
        from mmtune.metrics.recall import paired_differences

        self._require_same_split(before, after)
        return paired_differences(
            before.details["ranks"], after.details["ranks"], self.settings.resamples
        )

    def gallery(self, before: Evaluation, after: Evaluation, limit: int = 12) -> list[GalleryItem]:
        """Queries whose first three answers changed: gains, then losses; see `changed_queries`."""
        from mmtune.tasks.retrieval_gallery import changed_queries

        self._require_same_split(before, after)
        split = self.gallery_of(before.details["split"])
        return changed_queries(split, before.details["ranks"], after.details["ranks"], limit)

    @staticmethod
    def _require_same_split(before: Evaluation, after: Evaluation) -> None:
        one, two = before.details.get("split"), after.details.get("split")
        if one is None or one != two:
            raise ValueError(
                f"expected two evaluations of one split, made in this process; got {one}, {two}"
            )


def _chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; after it every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
