"""Text in images: words and numbers in several fonts, clean and under noise."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from mmtune.backbones.architectures import WORDS
from mmtune.probe.items import Item, Region
from mmtune.probe.made.canvas import SIDE, Made, blank, font, fonts

if TYPE_CHECKING:
    from PIL.Image import Image

QUESTION = "What text is written in the image?"


def strings(rng: random.Random, each: int) -> Made:
    """A word, a number or both in one line; every second one under noise."""
    items, pictures = [], {}
    long = [word for word in WORDS if 4 <= len(word) <= 7]
    for number in range(each):
        text = (
            rng.choice(long).upper(),
            str(rng.randrange(100, 10_000)),
            f"{rng.choice(long).capitalize()} {rng.randrange(10, 100)}",
        )[number % 3]
        noisy = number % 2 == 1
        picture, box = _written(text, rng.choice(sorted(fonts())), rng, noisy)
        name = f"images/text-{number}.png"
        pictures[name] = picture
        items.append(
            Item(
                id=f"text-{number}", images=(name,), question=QUESTION, answer=text,
                category="text in images", subcategory="noisy" if noisy else "clean",
                regions=(Region(box, "text"),), fields={"exact_text": True},
            )
        )  # fmt: skip
    return Made(tuple(items), pictures)


def _written(
    text: str, name: str, rng: random.Random, noisy: bool
) -> tuple[Image, tuple[float, float, float, float]]:
    import numpy as np
    from PIL import Image, ImageDraw

    picture = blank()
    draw = ImageDraw.Draw(picture)
    size = 64
    while draw.textlength(text, font(name, size)) > 0.85 * SIDE:
        size -= 2
    own = font(name, size)
    left, top, right, bottom = draw.textbbox((0, 0), text, own)
    x = rng.uniform(0.04, 0.96) * (SIDE - (right - left)) - left
    y = rng.uniform(0.1, 0.9) * (SIDE - (bottom - top)) - top
    draw.text((x, y), text, fill=(20, 20, 20), font=own)
    if noisy:
        drawn = np.random.default_rng(rng.randrange(2**32))
        pixels = np.asarray(picture).astype(np.float64) + drawn.normal(0, 60, (SIDE, SIDE, 3))
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    box = draw.textbbox((x, y), text, own)
    edges = [min(max(v / SIDE, 0.0), 1.0) for v in box]
    return picture, (edges[0], edges[1], edges[2], edges[3])
