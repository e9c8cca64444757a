"""Pixels to model input: open_clip's own evaluation transform, and deterministic augmentation."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torchvision.transforms import InterpolationMode

    from mmtune.backbones.base import ImageSpec

ATTEMPTS = 10  # at a crop that fits, before the largest one is taken
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class AugmentOptions:
    """Random changes to training images.

    Attributes:
        scale: smallest and largest share of the area that a crop keeps, in (0, 1].
        ratio: smallest and largest width / height of a crop.
        flip: probability of mirroring left and right; captions that say "left" become wrong.
        brightness, contrast, saturation: factors are drawn from [1 - value, 1 + value].
    """

    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: Share = 0.0
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be [low, high] with 0 < low <= high <= 1: {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be [low, high] with 0 < low <= high: {self.ratio}")


class EvalTransform:
    """The deterministic transform: resize, centre crop (or squash), normalise.

    Equals open_clip's evaluation preprocessing of an RGB image.
    """

    def __init__(self, spec: ImageSpec) -> None:
        if spec.resize not in ("shortest", "squash"):
            raise ValueError(f"resize must be shortest or squash, got {spec.resize!r}")
        self.spec = spec
        self.mode = _interpolation(spec.interpolation)

    def __call__(self, image: Image) -> Tensor:
        """RGB image -> [3, size, size]."""
        F = _functional()
        size = self.spec.size
        if self.spec.resize == "squash":
            image = F.resize(image, [size, size], interpolation=self.mode)
        else:
            image = F.resize(image, [size], interpolation=self.mode)
            image = F.center_crop(image, [size, size])
        return _normalised(image, self.spec)


class TrainTransform:
    """Random resized crop, flip and colour jitter; depends on (seed, epoch, index) only."""

    def __init__(self, spec: ImageSpec, options: AugmentOptions, seed: int) -> None:
        self.spec, self.options, self.seed = spec, options, seed
        self.mode = _interpolation(spec.interpolation)

    def __call__(self, image: Image, epoch: int, index: int) -> Tensor:
        """RGB image -> [3, size, size]."""
        F = _functional()
        # A text seed is hashed by SHA-512: the same numbers in every process and Python version.
        rng = random.Random(f"augment {self.seed} {epoch} {index}")
        top, left, height, width = self._crop(image.width, image.height, rng)
        size = [self.spec.size, self.spec.size]
        image = F.resized_crop(image, top, left, height, width, size, interpolation=self.mode)
        if rng.random() < self.options.flip:
            image = F.horizontal_flip(image)
        changes = [
            (F.adjust_brightness, self.options.brightness),
            (F.adjust_contrast, self.options.contrast),
            (F.adjust_saturation, self.options.saturation),
        ]
        rng.shuffle(changes)
        for change, strength in changes:
            if strength:
                image = change(image, rng.uniform(1 - strength, 1 + strength))
        return _normalised(image, self.spec)

    def _crop(self, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop, in pixels."""
        low, high = map(math.log, self.options.ratio)
        for _ in range(ATTEMPTS):
            area = width * height * rng.uniform(*self.options.scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        w = max(1, min(width, round(height * self.options.ratio[1])))
        h = max(1, min(height, round(width / self.options.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w


def _functional() -> Any:
    """Torchvision's functions; its annotations know tensors only, PIL images are documented."""
    from torchvision.transforms.v2 import functional

    return functional


def _interpolation(name: str) -> InterpolationMode:
    from torchvision.transforms import InterpolationMode

    known = {mode.value: mode for mode in InterpolationMode}
    if name not in known:
        raise ValueError(f"no interpolation {name!r}; there are {', '.join(known)}")
    return known[name]


def _normalised(image: Image, spec: ImageSpec) -> Tensor:
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    return (pixels.to(torch.float32).div(255) - mean) / std
