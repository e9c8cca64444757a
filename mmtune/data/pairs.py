"""Image-caption pairs to train on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch.utils.data import Dataset

from mmtune.data.records import DataError, MediaRef, Problem, Record
from mmtune.data.texts import normalised

if TYPE_CHECKING:
    from torch import Tensor

Captions = Literal["sampled", "all"]


@dataclass(frozen=True)
class Pair:
    """One training pair.

    Attributes:
        pixels: [3, s, s], or [f, 3, s, s] of a video.
        caption: the text.
        image: number of the image in the data set.
        text: number of the normalised text in the data set; equal texts share it.
    """

    pixels: Tensor
    caption: str
    image: int
    text: int


class NoSamples(Dataset):
    """What a run without training data has: asking for its length says so."""

    epoch = 0

    def __len__(self) -> int:
        raise DataError([Problem("config", "data.train is not set", "training needs it")])


class PairDataset(Dataset):
    """Pairs whose caption and augmentation depend on (seed, epoch, index) only.

    Args:
        records: images with captions.
        load: (image or video, epoch, index) -> model input, [3, s, s] or [f, 3, s, s].
        captions: "sampled": one pair per image and epoch; an image's captions take turns, starting
            at a random one. "all": every caption is a pair of its own.
        seed: decides where the turns start.
    """

    def __init__(
        self,
        records: Sequence[Record],
        load: Callable[[MediaRef, int, int], Tensor],
        captions: Captions = "sampled",
        seed: int = 0,
    ) -> None:
        self.records, self.load, self.seed = records, load, seed
        self.epoch = 0
        self.texts: dict[str, int] = {}
        for record in records:
            for caption in record.captions:
                self.texts.setdefault(normalised(caption), len(self.texts))
        # (image, caption), or (image, None) where the epoch chooses the caption.
        self.index: list[tuple[int, int | None]] = [
            (i, c)
            for i, record in enumerate(records)
            for c in (range(len(record.captions)) if captions == "all" else (None,))
        ]

    def __len__(self) -> int:
        return len(self.index)

    def caption(self, index: int) -> str:
        """The caption of sample `index` in the present epoch."""
        image, chosen = self.index[index]
        captions = self.records[image].captions
        if chosen is None:
            start = random.Random(f"caption {self.seed} {image}").randrange(len(captions))
            chosen = (start + self.epoch) % len(captions)
        return captions[chosen]

    def __getitem__(self, index: int) -> Pair:
        image = self.index[index][0]
        caption = self.caption(index)
        pixels = self.load(self.records[image].image, self.epoch, index)
        return Pair(pixels, caption, image, self.texts[normalised(caption)])
