"""Drawn shapes with questions and captions, and tiny BLIPs that know their words."""

from __future__ import annotations

import json

from PIL import Image, ImageDraw

from mmtune.backbones.base import ImageSpec
from mmtune.backbones.loading import hf_loaded
from mmtune.conformance.backbones import build
from mmtune.data import DataOptions, SourceOptions
from tests.backbones.writers import word_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "grey": (128,) * 3}
SHAPES = ("circle", "square")
TEXT = (
    "what colour is it shape yes no a large small picture of the circle square red green blue grey"
)
WORDS = list(dict.fromkeys(TEXT.split()))
SPECIAL = {"<pad>": 0, "<s>": 1, "<2>": 2, "</s>": 59}


def loaded(kind="vqa", seed=0):
    """A tiny BLIP with random weights, as `mmtune.backbones.load` would give it."""
    tokenizer = word_tokenizer("<s> $A </s>", SPECIAL, WORDS)
    spec = ImageSpec(32, (0.5,) * 3, (0.5,) * 3)
    return hf_loaded(build(f"blip-{kind}", seed), tokenizer, spec, f"tiny-{kind}")


def draw(path, shape, rgb, large):
    image = Image.new("RGB", (32, 32), (250, 250, 250))
    box = (3, 3, 28, 28) if large else (9, 9, 22, 22)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=rgb)
    image.save(path)


def pictures(folder):
    """16 pictures: (name, shape, colour, size)."""
    found = []
    for shape in SHAPES:
        for colour, rgb in COLOURS.items():
            for size in ("large", "small"):
                name = f"{size}-{colour}-{shape}.png"
                draw(folder / name, shape, rgb, size == "large")
                found.append((name, shape, colour, size))
    return found


def question_data(folder, on_error="raise", **roles):
    """Three questions about each picture, one answered differently by some annotators."""
    entries = []
    for name, shape, colour, size in pictures(folder):
        for text, answer, kind in (
            ("what colour is it", colour, "colour"),
            ("what shape", [shape] * 8 + [size] * 2, "shape"),
            ("is it red", "yes" if colour == "red" else "no", "yes/no"),
        ):
            entry = {"image": name, "question": text, "answer": answer, "kind": kind}
            entries.append(entry | {"question_id": len(entries)})
    return _data(folder, "blip_vqa", entries, on_error)


def caption_data(folder):
    entries = [
        {"image": name, "caption": [f"a {size} {colour} {shape}", f"the {colour} {shape}"]}
        for name, shape, colour, size in pictures(folder)
    ]
    return _data(folder, "blip", entries)


def _data(folder, form, entries, on_error="raise"):
    path = folder / f"{form}.json"
    path.write_text(json.dumps(entries))
    source = SourceOptions(form, str(path))
    return DataOptions(train=source, val=source, test=source, on_error=on_error)
