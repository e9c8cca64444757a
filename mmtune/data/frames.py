"""Videos to model input: which frames, and the one transform that all frames of a video get."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mmtune.data.images import load_image
from mmtune.data.options import Count
from mmtune.data.records import MediaRef, VideoFile
from mmtune.data.transforms import EvalTransform, TrainTransform
from mmtune.data.video import load_frames

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mmtune.backbones.base import ImageSpec
    from mmtune.data.transforms import AugmentOptions


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a video a task looks at.

    Attributes:
        frames: how many in training.
        eval_frames: how many in evaluation: the middles of as many equal segments, never random.
        sampling: in training, a "random" time in each segment, or its middle ("uniform").
    """

    frames: Count = 8
    eval_frames: Count = 8
    sampling: Literal["random", "uniform"] = "random"


class FrameInputs:
    """Frames as [f, 3, s, s]; what is random follows from (seed, epoch, index).

    All frames of a video get the same crop, flip and colours.

    Args:
        options: which frames.
        spec: pixels to input.
        augment: random changes in training; None for none.
        seed: of frames and augmentation.
    """

    def __init__(
        self, options: FrameOptions, spec: ImageSpec, augment: AugmentOptions | None, seed: int
    ) -> None:
        self.options, self.seed = options, seed
        self.plain = EvalTransform(spec)
        self.augmented = None if augment is None else TrainTransform(spec, augment, seed)

    def training(self, ref: MediaRef, epoch: int, index: int) -> Tensor:
        """[frames, 3, s, s]."""
        import torch

        rng = None
        if self.options.sampling == "random":
            rng = random.Random(f"frames {self.seed} {epoch} {index}")
        frames = self._load(ref, self.options.frames, rng)
        if self.augmented is None:
            return torch.stack([self.plain(frame) for frame in frames])
        return torch.stack([self.augmented(frame, epoch, index) for frame in frames])

    def evaluation(self, ref: MediaRef) -> Tensor:
        """[eval_frames, 3, s, s]."""
        import torch

        frames = self._load(ref, self.options.eval_frames)
        return torch.stack([self.plain(frame) for frame in frames])

    @staticmethod
    def _load(ref: MediaRef, count: int, rng: random.Random | None = None) -> list[Image]:
        """Frames of a video; an image is a video that stands still."""
        if isinstance(ref, VideoFile):
            return load_frames(ref, count, rng)
        return [load_image(ref)] * count
