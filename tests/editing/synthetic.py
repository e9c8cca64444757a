"""Edit records by the dozen: things that have words and looks of their own, asked about."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from editing.requests import EditRecord, EditRequest, Probe
from mmtune.data.records import ImageBytes

WORDS = 40  # w3 to w42 are for questions; targets are w43 to w58


def look(thing, view=0):
    """One of the pictures of a thing: its own coarse pattern, with some noise."""
    coarse = np.random.default_rng(thing).integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    noise = np.random.default_rng((thing, view)).normal(0, 12, coarse.shape)
    file = io.BytesIO()
    Image.fromarray((coarse + noise).clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return ImageBytes(file.getvalue())


def words(*numbers):
    return " ".join(f"w{3 + n}" for n in numbers)


def record(number):
    """Of a question of four words; other wordings have the same four and one more."""
    draw = np.random.default_rng(1000 + number)
    own, other = draw.permutation(WORDS)[:4], draw.permutation(WORDS)[:4]
    question, target = words(*own), f"w{43 + number % 16}"
    again = words(*draw.permutation(own), draw.integers(WORDS))
    seen = look(number)
    return EditRecord(
        EditRequest(question, target, seen, f"r{number}"),
        text_generality=(Probe(again, target, seen),),
        image_generality=(Probe(question, target, look(number, 1)),),
        text_locality=(Probe(words(*other), "w50"),),
        image_locality=(Probe(words(*draw.permutation(WORDS)[:4]), "w51", look(500 + number)),),
        id=str(number),
    )


def records(first, count):
    return [record(number) for number in range(first, first + count)]
