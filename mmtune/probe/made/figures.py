"""Abstract figures: bars of a chart, polygons and their corners, numbers of things."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from mmtune.probe.items import Item, Region
from mmtune.probe.made.canvas import COLOURS, SIDE, Made, blank, box_of, figure, font, polygon

if TYPE_CHECKING:
    from PIL.Image import Image

POLYGONS = {3: "triangle", 4: "square", 5: "pentagon", 6: "hexagon"}


def charts(rng: random.Random, each: int) -> Made:
    """Bars with letters below them: which is the highest, which the lowest."""
    items, pictures = [], {}
    for number in range(each):
        heights = rng.sample(range(2, 11), 4)
        wanted = ("highest", "lowest")[number % 2]
        name = f"images/chart-{number}.png"
        pictures[name], boxes = _bars(heights, rng.choice(sorted(COLOURS)))
        best = heights.index(max(heights) if wanted == "highest" else min(heights))
        choices = ("P", "Q", "R", "S")
        items.append(
            Item(
                id=f"chart-{number}", images=(name,), question=f"Which bar is the {wanted}?",
                answer=f"bar {choices[best]}", choices=tuple(f"bar {c}" for c in choices),
                category="abstract figures", subcategory="charts",
                regions=tuple(
                    Region(box, f"bar {c}") for box, c in zip(boxes, choices, strict=True)
                ),
            )
        )  # fmt: skip
    return Made(tuple(items), pictures)


def geometry(rng: random.Random, each: int) -> Made:
    """A polygon to be named, or shapes of one colour to be counted."""
    from PIL import ImageDraw

    items, pictures = [], {}
    for number in range(each):
        picture, name = blank(), f"images/figure-{number}.png"
        draw = ImageDraw.Draw(picture)
        colour = rng.choice(sorted(COLOURS))
        if number % 2 == 0:
            sides = rng.choice(sorted(POLYGONS))
            polygon(draw, sides, colour, SIDE / 2, SIDE / 2, SIDE * 0.36)
            regions = (Region(box_of(SIDE / 2, SIDE / 2, SIDE * 0.4), POLYGONS[sides]),)
            question, answer, choices = (
                "Which figure is this?",
                POLYGONS[sides],
                (*POLYGONS.values(),),
            )
            kind = "polygons"
        else:
            count = rng.randrange(1, 7)
            cells = rng.sample([(i, j) for i in range(3) for j in range(3)], count)
            middles = [((i + 0.5) * SIDE / 3, (j + 0.5) * SIDE / 3) for i, j in cells]
            for x, y in middles:
                figure(draw, "circle", colour, x, y, SIDE * 0.1)
            regions = tuple(Region(box_of(x, y, SIDE * 0.12), "circle") for x, y in middles)
            question, answer = "How many circles are there?", str(count)
            choices, kind = tuple(map(str, range(1, 7))), "counting"
        pictures[name] = picture
        items.append(
            Item(
                id=f"figure-{number}", images=(name,), question=question, answer=answer,
                choices=choices, category="abstract figures", subcategory=kind, regions=regions,
            )
        )  # fmt: skip
    return Made(tuple(items), pictures)


def _bars(heights: list[int], colour: str) -> tuple[Image, list[tuple[float, float, float, float]]]:
    from PIL import ImageDraw

    picture, boxes = blank(), []
    draw = ImageDraw.Draw(picture)
    ground, wide, own = SIDE * 0.86, SIDE * 0.13, font("DejaVuSans", 22)
    for number, height in enumerate(heights):
        x = SIDE * (0.12 + 0.21 * number)
        top = ground - SIDE * 0.075 * height
        draw.rectangle((x, top, x + wide, ground), fill=COLOURS[colour])
        draw.text(
            (x + wide / 2, ground + 4), "PQRS"[number], fill=(20, 20, 20), font=own, anchor="ma"
        )
        edges = [v / SIDE for v in (x - 3, top - 3, x + wide + 3, ground + 3)]
        boxes.append((edges[0], edges[1], edges[2], edges[3]))
    draw.line((SIDE * 0.08, ground, SIDE * 0.95, ground), fill=(20, 20, 20), width=2)
    return picture, boxes
