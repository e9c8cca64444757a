"""Four ways to ask the same question, after the survey that compares models by them."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mmtune.data.images import load_image
from mmtune.probe.clients import Example, Sent
from mmtune.probe.items import Item, ItemSet, Region

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Mark = Literal["box", "circle", "arrow", "number"]
MARKS: tuple[Mark, ...] = ("box", "circle", "arrow", "number")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOUR = (230, 20, 40)
SHORT, LONG = 16, 160  # tokens of an answer, and of one that reasons first
ENDS = {
    "choice": "Answer with the letter of the right choice.",
    "yes-no": "Answer yes or no.",
    "text": "Answer with the text alone, exactly as it stands in the image.",
    "words": "Answer in one word or a short phrase.",
}
REASON = "Think step by step, then give the answer in a last line that begins with 'Answer:'."
POINTERS = {
    "box": "Look at what is inside the red box.",
    "circle": "Look at what is inside the red circle.",
    "arrow": "Look at what the red arrow points at.",
    "number": "Look at what is marked by red numbers.",
}


@dataclass(frozen=True)
class StyleOptions:
    """How the styles ask.

    Attributes:
        marks: what visual referring draws; an item gets one of them, always the same.
        examples: questions shown before the asked one by the few-shot style.
        seed: of what is drawn.
    """

    marks: tuple[Mark, ...] = MARKS
    examples: int = 3
    seed: int = 0


Maker = Callable[[Item, ItemSet, StyleOptions], Sent | None]


def question_text(item: Item) -> str:
    """The question with its choices, each with a letter."""
    lines = [item.question]
    lines += [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(item.choices)]
    return "\n".join(lines)


def answer_text(item: Item) -> str:
    """The right answer as a model is to write it: of choices, the letter."""
    return LETTERS[item.choices.index(item.answer)] if item.choices else item.answer


def simple(item: Item, items: ItemSet, options: StyleOptions) -> Sent:
    """The question, and how it is to be answered."""
    return Sent(
        f"{question_text(item)}\n{ENDS[item.kind]}", _pictures(item, items), most=_most(item)
    )


def reasoning(item: Item, items: ItemSet, options: StyleOptions) -> Sent:
    """Chain of thought: the answer comes last, behind "Answer:"."""
    return Sent(f"{question_text(item)}\n{REASON}", _pictures(item, items), most=LONG + _most(item))


def referring(item: Item, items: ItemSet, options: StyleOptions) -> Sent | None:
    """Visual referring: a box, circle, arrow or number is drawn on the image; None: no region."""
    if not item.regions:
        return None
    rng = random.Random(f"{options.seed} {item.id}")
    mark = rng.choice(options.marks)
    text = f"{POINTERS[mark]} {question_text(item)}\n{ENDS[item.kind]}"
    return Sent(text, _pictures(item, items, mark), most=_most(item))


def few_shot(item: Item, items: ItemSet, options: StyleOptions) -> Sent | None:
    """In-context examples, never the item itself, its image or its pair; None: there are none."""
    chosen = exemplars(item, items, options)
    if not chosen:
        return None
    asked = simple(item, items, options)
    shown = tuple(
        Example(f"{question_text(one)}\n{ENDS[one.kind]}", answer_text(one), _pictures(one, items))
        for one in chosen
    )
    return Sent(asked.text, asked.images, shown, asked.most)


STYLES: Mapping[str, Maker] = {
    "simple": simple,
    "referring": referring,
    "reasoning": reasoning,
    "few-shot": few_shot,
}


def exemplars(item: Item, items: ItemSet, options: StyleOptions) -> list[Item]:
    """Items that may be shown before this one: of its pool and kind, in an order of its own.

    Pictures are compared by their bytes, so that a copy under another name does not slip in.
    """
    pool = [
        one
        for one in items.items
        if one.id != item.id
        and one.kind == item.kind
        and (item.pair_id == "" or one.pair_id != item.pair_id)
        and _pool(one) == _pool(item)
    ]
    random.Random(f"{options.seed} {item.id} examples").shuffle(pool)
    own = {_bytes(item, items, n) for n in range(len(item.images))}
    found: list[Item] = []
    for one in pool:
        if len(found) == options.examples:
            break
        if not own & {_bytes(one, items, n) for n in range(len(one.images))}:
            found.append(one)
    return found


def drawn_on(picture: Image, regions: Sequence[Region], mark: Mark) -> Image:
    """A copy of a picture on which regions are marked in red.

    Args:
        picture: RGB.
        regions: of this picture.
        mark: box, circle, arrow (from the side with more room to the region's middle), or number
            (1, 2, … at the upper left of each).
    """
    from PIL import ImageDraw as drawing
    from PIL import ImageFont

    shown = picture.copy()
    draw = drawing.Draw(shown)
    width, height = shown.size
    line = max(2, round(min(width, height) / 80))
    for number, region in enumerate(regions, 1):
        x0, y0, x1, y1 = (
            round(v * (side - 1)) for v, side in zip(region.box, (width, height) * 2, strict=True)
        )
        if mark == "box":
            draw.rectangle((x0, y0, x1, y1), outline=COLOUR, width=line)
        elif mark == "circle":
            draw.ellipse((x0, y0, x1, y1), outline=COLOUR, width=line)
        elif mark == "arrow":
            _arrow(draw, (x0 + x1) / 2, (y0 + y1) / 2, width, height, line)
        else:
            size = max(10, min(width, height) // 8)
            font = ImageFont.load_default(size)
            draw.text((x0, y0), str(number), fill=COLOUR, font=font, stroke_width=1)
    return shown


def _arrow(draw: ImageDraw, x: float, y: float, width: int, height: int, line: int) -> None:
    length = min(width, height) / 4
    side = -1 if x > width / 2 else 1
    start = (x + side * length, y)
    draw.line((*start, x, y), fill=COLOUR, width=line)
    head = max(4, 3 * line)
    tip = [(x, y), (x + side * head, y - head / 2), (x + side * head, y + head / 2)]
    draw.polygon(tip, fill=COLOUR)


def _pictures(item: Item, items: ItemSet, mark: Mark | None = None) -> tuple[bytes, ...]:
    found = []
    for number in range(len(item.images)):
        picture = load_image(items.picture(item, number))
        if mark is not None:
            regions = [region for region in item.regions if region.image == number]
            picture = drawn_on(picture, regions, mark)
        file = io.BytesIO()
        picture.save(file, format="PNG")
        found.append(file.getvalue())
    return tuple(found)


def _bytes(item: Item, items: ItemSet, number: int) -> bytes:
    return items.picture(item, number).read()


def _pool(item: Item) -> str:
    return item.exemplar_pool or item.category


def _most(item: Item) -> int:
    return max(SHORT, 2 * len(item.answer))
