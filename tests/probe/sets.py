"""Small sets of items with pictures, and clients that answer what they are told."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from mmtune.probe.clients import Client, Reply, Sent
from mmtune.probe.items import Item, ItemSet, Region, write_items


def item(name, answer="yes", image="a.png", category="things", **fields):
    return Item(name, (image,) if image else (), f"Question {name}?", answer, category, **fields)


def item_set(folder, items):
    for number, name in enumerate(sorted({n for one in items for n in one.images})):
        picture = Image.new("RGB", (40, 30), (20 * number % 256, 100, 50))
        picture.save(folder / name)
    return ItemSet("small", tuple(items), folder)


def written(folder, items):
    write_items(folder / "small.jsonl", item_set(folder, items).items)
    return folder / "small.jsonl"


WHOLE = Region((0.25, 0.25, 0.75, 0.75), "it")


class Told(Client):
    """Answers by a function of the request."""

    def __init__(self, answer: Callable[[Sent], str], batch: int = 2) -> None:
        self.name, self.batch, self.answer, self.asked = "told", batch, answer, []

    def ask(self, sent):
        self.asked += sent
        return [Reply(self.answer(one)) for one in sent]
