"""What retrieval tasks share: galleries of a split, and recall both ways."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mmtune.batched import batched
from mmtune.data.options import Count
from mmtune.data.records import Record
from mmtune.data.texts import normalised
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
from mmtune.tasks.media import CaptionedTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.data.pairs import Pair
    from mmtune.metrics.recall import RetrievalRanks


@dataclass(frozen=True)
class PairOptions:
    """Settings of every retrieval task.

    Attributes:
        captions: "sampled" trains on one caption per image and epoch, in turns; "all" on all pairs.
        identical: "positive": equal captions (normalised text) match each other's images, in the
            loss and in evaluation, and so do captions of one image in the loss. "distinct": only
            the given pairs match, as in published results on COCO and Flickr30k.
        augment: random changes to training images; null trains on the evaluation transform.
        eval_batch_size: images or texts embedded at once.
        resamples: bootstrap draws behind the intervals.
    """

    captions: Literal["sampled", "all"] = "sampled"
    identical: Literal["positive", "distinct"] = "positive"
    augment: AugmentOptions | None = field(default_factory=AugmentOptions)
    eval_batch_size: Count = 128
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


@dataclass(frozen=True)
class Embedded:
    """The features of a gallery, each image and each distinct caption once.

    Attributes:
        images: [n, e], L2-normalised, in float32.
        texts: [m, e], as images, of the distinct captions in order of their first place.
        distinct: the distinct captions.
        text_of: [c], for each caption of the gallery, which of them it is.
    """

    images: Tensor
    texts: Tensor
    distinct: list[str]
    text_of: list[int]


class PairTask(CaptionedTask):
    """A task on images with captions, evaluated by recall both ways.

    Options are `PairOptions`; arguments as `MediaTask`.
    """

    @cached_property
    def _galleries(self) -> dict[str, Gallery]:
        return {}

    def gallery_of(self, split: str) -> Gallery:
        """The images and captions of a split, and which match."""
        if split not in self._galleries:
            self._galleries[split] = Gallery(self._records(split), self.settings.identical)
        return self._galleries[split]

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

    def evaluate(self, model: nn.Module, split: str = "test", progress: bool = True) -> Evaluation:
        """Recall both ways over all images and captions of a split.

        Each image and each distinct caption is embedded once. Scores are cosines in float32, ranked
        on the model's device a chunk of queries at a time; ties count as `mmtune.metrics.recall`
        says. What ranks checkpoints is the mean recall of the last ranking.
        """
        from tqdm.auto import tqdm

        from mmtune.metrics.recall import retrieval_metrics

        started = time.perf_counter()
        gallery = self.gallery_of(split)
        with (
            evaluating(model),
            tqdm(total=0, desc=f"evaluate {split}", unit="item", disable=not progress) as bar,
        ):
            embedded = self._embed(model, gallery, bar)
            ranks = self._rank(model, gallery, embedded, bar)
        metrics = {
            f"{name}{label}": metric
            for label, of in ranks.items()
            for name, metric in retrieval_metrics(of, self.settings.resamples).items()
        }
        seconds = time.perf_counter() - started
        primary = f"mean{next(reversed(ranks))}"
        return Evaluation(metrics, primary, {"split": split, "ranks": ranks}, seconds)

    def _embed(self, model: nn.Module, gallery: Gallery, bar: Any) -> Embedded:
        import torch

        distinct = list(dict.fromkeys(gallery.captions))
        number = {text: i for i, text in enumerate(distinct)}
        bar.total += 2 * len(gallery.records) + len(distinct) + len(gallery.captions)
        images = torch.cat(list(self._embed_images(model, gallery.records, bar)))
        texts = torch.cat(list(self._embed_texts(model, distinct, bar)))
        return Embedded(images, texts, distinct, [number[c] for c in gallery.captions])

    def _rank(
        self, model: nn.Module, gallery: Gallery, embedded: Embedded, bar: Any
    ) -> dict[str, RetrievalRanks]:
        """What is appended to the names of metrics -> the ranks that they are of."""
        import numpy as np

        from mmtune.metrics.recall import RetrievalRanks, Scores, rank_queries

        images, captions = embedded.images, embedded.texts[embedded.text_of]
        txt2img = rank_queries(Scores(captions, images), gallery.images_of, progress=bar.update)
        img2txt = rank_queries(Scores(images, captions), gallery.captions_of, progress=bar.update)
        return {"": RetrievalRanks(txt2img, img2txt, np.asarray(gallery.owner))}

    def _embed_images(
        self, model: nn.Module, records: Sequence[Record], bar: Any
    ) -> Iterator[Tensor]:
        for batch in self._pixels(model, records):
            yield self._image_features(model, batch).float()
            bar.update(len(batch))

    def _image_features(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """What `_pixels` gives -> [b, e], L2-normalised."""
        return self.loaded.backbone.encode_image(model, pixels)

    def _embed_texts(self, model: nn.Module, texts: Sequence[str], bar: Any) -> Iterator[Tensor]:
        device = device_of(model)
        for chunk in batched(texts, self.settings.eval_batch_size):
            tokens = on_device(self.loaded.tokenize(chunk), device)
            yield self.loaded.backbone.encode_text(model, **tokens).float()
            bar.update(len(chunk))

    def compare(self, before: Evaluation, after: Evaluation) -> dict[str, Metric]:
        """The gain of every metric, with intervals from the same draws of images for both."""
        from mmtune.metrics.recall import paired_differences

        require_same_split(before, after)
        one, two = before.details["ranks"], after.details["ranks"]
        return {
            f"{name}{label}": metric
            for label in one
            for name, metric in paired_differences(
                one[label], two[label], self.settings.resamples
            ).items()
        }

    def gallery(self, before: Evaluation, after: Evaluation, limit: int = 12) -> list[GalleryItem]:
        """Queries whose first three answers changed: gains, then losses; see `changed_queries`."""
        from mmtune.tasks.retrieval_gallery import changed_queries

        require_same_split(before, after)
        split = self.gallery_of(before.details["split"])
        ranks = [next(reversed(e.details["ranks"].values())) for e in (before, after)]
        return changed_queries(split, ranks[0], ranks[1], limit)
