"""Everything the recipe trains on: drawings and icons with their texts."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo.tiny_clip.captions import may_mirror, variants
from mmtune.zoo.tiny_clip.material import SIDE, held_out_names, split_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmtune.zoo.tiny_diffusion.recipe import DiffusionRecipe

TRAINED = ("clipart", "clipart-animals", "clipart-food")
# The coloured ones of tiny-clip's icon packages; silhouettes and outlines would teach other styles.
COLOURED = (
    "emojione",
    "flat-color-icons",
    "fluent-color",
    "fluent-emoji-flat",
    "noto",
    "twemoji",
)


@dataclass
class Drawn:
    """n pictures with v texts each: drawings, then icons.

    Attributes:
        pixels: uint8 [n, 3, s, s].
        mirror: bool [n], whether a mirrored picture is what its texts say.
        texts: n lists of v texts.
        clipart: how many of the n are drawings.
    """

    pixels: Tensor
    mirror: Tensor
    texts: list[list[str]]
    clipart: int


def padded(images: Iterable[bytes], side: int) -> Tensor:
    """Decode pictures and centre each on a white square, its proportions kept: [n, 3, s, s]."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch

    with ThreadPoolExecutor() as pool:  # decoding and resizing leave other threads free
        found = list(pool.map(lambda image: _square(image, side), images))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def _square(image: bytes, side: int) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        drawn = opened.convert("RGB")
    longest = max(drawn.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(drawn, ((longest - drawn.width) // 2, (longest - drawn.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


def drawings(name: str, split: str, limit: int = 0) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows of a split without their pictures, and the pictures; `limit` takes the first ones."""
    rows = split_table(name, split).slice(0, limit or None).to_pylist()
    return rows, padded((row.pop("image")["bytes"] for row in rows), SIDE)


def gather(recipe: DiffusionRecipe, icons: Path | None) -> Drawn:
    """Pictures and texts of the training splits, and of icons; none named like a held-out drawing.

    Args:
        recipe: the numbers.
        icons: folder with the icon packages; None trains without.
    """
    import torch

    from mmtune.zoo.tiny_clip.icons import read_icons

    draw, rows, pixels = random.Random(recipe.seed), [], []
    for name in TRAINED:
        some, pictures = drawings(name, "train", recipe.limit)
        rows += some
        pixels.append(pictures)
    texts = [variants(row, recipe.variants, draw) for row in rows]
    mirror = [may_mirror(row) for row in rows]
    if icons is not None:
        held = held_out_names()
        more = [row for row in read_icons(icons, SIDE) if row["package"] in COLOURED]
        more = [row for row in more if row["name"] not in held]
        more = more[: recipe.limit or None]
        pixels.append(padded((row["image"] for row in more), SIDE))
        texts += [[row["name"]] * recipe.variants for row in more]
        mirror += [may_mirror({"caption": row["name"]}) for row in more]
    return Drawn(torch.cat(pixels), torch.tensor(mirror), texts, len(rows))


def moved(
    pictures: Tensor, mirror: Tensor, size: int, generator: torch.Generator, strength: float
) -> Tensor:
    """Scale, stretch and move each picture a little, and mirror every other one that may be.

    Args:
        pictures: uint8.
        mirror: bool; False keeps left and right.
        size: edge of the result, in pixels.
        generator: on the pictures' device.
        strength: 0 leaves the pictures as they are (resized), 1 is the recipe's.

    Returns:
        float32 in [-1, 1], white outside of the drawing.

    Shape:
        pictures [b, 3, s, s]; mirror [b]; result [b, 3, size, size].
    """
    import torch
    from torch.nn import functional as F

    count, device = len(pictures), pictures.device

    def uniform(low: float, high: float) -> Tensor:
        drawn = torch.rand(count, generator=generator, device=device)
        return (low + (high - low) * drawn) * strength

    zoom, stretch = torch.exp(uniform(-0.2, 0.0)), torch.exp(uniform(-0.05, 0.05))
    across, down = 1 / (zoom * stretch), stretch / zoom
    flip = (torch.rand(count, generator=generator, device=device) < 0.5) & mirror
    across = torch.where(flip & (strength > 0), -across, across)
    none = torch.zeros_like(zoom)
    rows = [
        torch.stack([across, none, uniform(-0.06, 0.06)], dim=1),
        torch.stack([none, down, uniform(-0.06, 0.06)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 3, size, size], align_corners=False)
    ink = 1.0 - pictures.float() / 255.0  # white becomes 0, which is what lies outside
    found = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return 1.0 - 2.0 * found


def numbered(texts: Sequence[Sequence[str]]) -> tuple[list[str], list[list[int]]]:
    """The different texts, the empty one first, and the number of each text in its place."""
    numbers = {"": 0}
    places = [[numbers.setdefault(text, len(numbers)) for text in some] for some in texts]
    return list(numbers), places
