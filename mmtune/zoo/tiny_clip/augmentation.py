"""Geometric and colour augmentation of whole batches on the device that holds them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def augment(
    pictures: Tensor, mirror: Tensor, size: int, generator: torch.Generator, strength: float = 1.0
) -> Tensor:
    """Move, turn, stretch and tint each picture on its own.

    Args:
        pictures: uint8.
        mirror: bool; False keeps left and right.
        size: edge of the result, in pixels.
        generator: on the pictures' device.
        strength: 0 leaves the pictures as they are (resized), 1 is the recipe's.

    Returns:
        float32 in [-1, 1] (mean and standard deviation 0.5), white outside of the drawing.

    Shape:
        pictures [b, 3, s, s]; mirror [b]; result [b, 3, size, size].
    """
    import torch
    from torch.nn import functional as F

    count, device = len(pictures), pictures.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(count, *shape, generator=generator, device=device)
        return (low + (high - low) * drawn) * strength

    angle = uniform(-1, 1) * math.radians(15)
    zoom, stretch = torch.exp(uniform(-0.35, 0.25)), torch.exp(uniform(-0.2, 0.2))
    shear = uniform(-0.15, 0.15)
    flip = (torch.rand(count, generator=generator, device=device) < 0.5) & mirror
    sign = 1.0 - 2.0 * flip.float() * (strength > 0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    across, down = 1 / (zoom * stretch), stretch / zoom
    rows = [
        torch.stack([sign * cos * across, (shear - sin) * down, uniform(-0.15, 0.15)], dim=1),
        torch.stack([sign * sin * across, cos * down, uniform(-0.15, 0.15)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 3, size, size], align_corners=False)
    ink = 1.0 - pictures.float() / 255.0  # white becomes 0, which is what lies outside
    moved = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    mixing = torch.eye(3, device=device) + uniform(-0.12, 0.12, 3, 3)
    mixing = mixing / mixing.sum(dim=2, keepdim=True).clamp_min(0.5)
    tinted = torch.einsum("bij,bjhw->bihw", mixing, 1.0 - moved)
    grey = tinted.mean(dim=1, keepdim=True)
    saturation = (1 + uniform(-0.5, 0.2))[:, None, None, None]
    contrast = (1 + uniform(-0.3, 0.1))[:, None, None, None]
    tinted = grey + saturation * (tinted - grey)
    tinted = 1.0 - contrast * (1.0 - tinted)
    return (_erase(tinted, generator, 0.25 * strength).clamp(0, 1) - 0.5) / 0.5


def _erase(pictures: Tensor, generator: torch.Generator, chance: float) -> Tensor:
    """White out one rectangle, of up to a third of each edge, of some pictures."""
    import torch

    count, _, height, width = pictures.shape
    drawn = torch.rand(count, 5, generator=generator, device=pictures.device)
    rows = torch.arange(height, device=pictures.device)[None, :, None]
    columns = torch.arange(width, device=pictures.device)[None, None, :]
    top, left = (drawn[:, 0] * height)[:, None, None], (drawn[:, 1] * width)[:, None, None]
    tall = (drawn[:, 2] * height / 3)[:, None, None]
    wide = (drawn[:, 3] * width / 3)[:, None, None]
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    inside &= (drawn[:, 4] < chance)[:, None, None]
    return torch.where(inside[:, None], torch.ones_like(pictures), pictures)


def mix(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blend each picture with another, or paste half of another over it (even chance).

    The result stands for no text: it is only shown to a teacher and its pupil.

    Shape:
        pictures [b, 3, s, s]; result the same.
    """
    import torch

    count, _, size, _ = pictures.shape
    device = pictures.device
    other = pictures[torch.randperm(count, generator=generator, device=device)]
    weight = torch.rand(count, 1, 1, 1, generator=generator, device=device)
    blended = weight * pictures + (1 - weight) * other
    columns = torch.arange(size, device=device)[None, None, None, :] / size
    pasted = torch.where(columns < weight, pictures, other)
    choose = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.5
    return torch.where(choose, blended, pasted)


def recolour(pictures: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Turn the colours of some pictures inside out: channels in another order, light for dark.

    Like mixtures, the result stands for no text.

    Args:
        pictures: in [-1, 1].
        share: of the pictures that are changed.
        generator: on the pictures' device.

    Shape:
        pictures [b, 3, s, s]; result the same.
    """
    import torch

    count, device = len(pictures), pictures.device
    order = torch.rand(count, 3, generator=generator, device=device).argsort(dim=1)
    changed = torch.gather(pictures, 1, order[:, :, None, None].expand_as(pictures))
    drawn = torch.rand(count, 2, 1, 1, 1, generator=generator, device=device)
    changed = torch.where(drawn[:, 0] < 0.3, -changed, changed)
    return torch.where(drawn[:, 1] < share, changed, pictures)
