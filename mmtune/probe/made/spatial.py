"""Where things are: each question comes with its flip, whose answer is the other one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from mmtune.probe.items import Item, Region
from mmtune.probe.made.canvas import SIDE, Made, blank, box_of, figure, two

if TYPE_CHECKING:
    from PIL.Image import Image

PLACES = {
    "left-right": ("to the left of", "to the right of"),
    "above-below": ("above", "below"),
}


def relations(rng: random.Random, each: int) -> Made:
    """Two figures; "Is A to the left of B?", and the same where they changed places."""
    items, pictures = [], {}
    for number in range(each):
        kind = ("left-right", "above-below")[number % 2]
        first, second = two(rng)
        word = PLACES[kind][rng.randrange(2)]
        named = [f"the {colour} {shape}" for colour, shape in (first, second)]
        question = f"Is {named[0]} {word} {named[1]}?"
        pair = f"spatial-{number}"
        true_first = word in ("to the left of", "above")
        for side, places in (("a", _places(kind)), ("b", _places(kind)[::-1])):
            picture, regions = _picture((first, second), places)
            name = f"images/{pair}{side}.png"
            pictures[name] = picture
            answer = "yes" if (side == "a") == true_first else "no"
            items.append(
                Item(
                    id=f"{pair}{side}", images=(name,), question=question, answer=answer,
                    category="relative position", subcategory=kind, regions=regions,
                    pair_id=pair, relation="flip",
                )
            )  # fmt: skip
    return Made(tuple(items), pictures)


def _places(kind: str) -> list[tuple[float, float]]:
    near, far, middle = SIDE * 0.27, SIDE * 0.73, SIDE / 2
    return (
        [(near, middle), (far, middle)] if kind == "left-right" else [(middle, near), (middle, far)]
    )


def _picture(
    figures: tuple[tuple[str, str], ...], places: list[tuple[float, float]]
) -> tuple[Image, tuple[Region, ...]]:
    from PIL import ImageDraw

    picture, regions, size = blank(), [], SIDE * 0.17
    draw = ImageDraw.Draw(picture)
    for (colour, shape), (x, y) in zip(figures, places, strict=True):
        figure(draw, shape, colour, x, y, size)
        regions.append(Region(box_of(x, y, 1.2 * size), f"{colour} {shape}"))
    return picture, tuple(regions)
