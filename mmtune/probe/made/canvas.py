"""Figures on a square picture, and what a maker of items returns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.probe.items import Item

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

SIDE = 224  # pixels
COLOURS = {
    "red": (214, 39, 40),
    "blue": (31, 90, 200),
    "green": (34, 139, 34),
    "yellow": (240, 200, 20),
    "purple": (128, 50, 160),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star")


@dataclass(frozen=True)
class Made:
    """Items with the pictures that they name."""

    items: tuple[Item, ...]
    pictures: dict[str, Image]


def blank(colour: tuple[int, int, int] = (255, 255, 255)) -> Image:
    """An empty square."""
    from PIL import Image

    return Image.new("RGB", (SIDE, SIDE), colour)


def figure(draw: ImageDraw, shape: str, colour: str, x: float, y: float, r: float) -> None:
    """A shape around a middle, in pixels."""
    from math import cos, pi, sin

    fill = COLOURS[colour]
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    else:
        corners = {"triangle": 3, "star": 10}[shape]
        radii = [r if shape == "triangle" or i % 2 == 0 else r / 2.4 for i in range(corners)]
        turns = [2 * pi * i / corners - pi / 2 for i in range(corners)]
        points = zip(radii, turns, strict=True)
        draw.polygon([(x + q * cos(t), y + q * sin(t)) for q, t in points], fill=fill)


def polygon(draw: ImageDraw, sides: int, colour: str, x: float, y: float, r: float) -> None:
    """A regular polygon around a middle, in pixels."""
    draw.regular_polygon((x, y, r), sides, fill=COLOURS[colour])


def box_of(x: float, y: float, r: float) -> tuple[float, float, float, float]:
    """The box around a figure, as parts of the picture's sides."""
    left, top, right, bottom = (min(max(v / SIDE, 0.0), 1.0) for v in (x - r, y - r, x + r, y + r))
    return left, top, right, bottom


@cache
def fonts() -> dict[str, Path]:
    """Fonts by name: those that matplotlib brings."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono-Bold", "STIXGeneral", "cmr10")
    return {name: folder / f"{name}.ttf" for name in names}


def font(name: str, size: int) -> FreeTypeFont:
    """A font of `fonts` in pixels."""
    from PIL import ImageFont

    return ImageFont.truetype(str(fonts()[name]), size)


def two(rng: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two coloured shapes that differ in both."""
    (a, b), (c, d) = rng.sample(SHAPES, 2), rng.sample(sorted(COLOURS), 2)
    return (c, a), (d, b)
