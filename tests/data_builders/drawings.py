"""Pictures for tests, each of its own look."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from data_builders.pictures import MADE, Pictures
from data_builders.stages.base import Context
from editing.config import EditModelOptions


def drawing(number, size=64):
    """Coloured ellipses at random places."""
    draw = np.random.default_rng(number)
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = draw.integers(0, size * 3 // 4, 2).tolist()
        w, h = draw.integers(size // 8, size // 2, 2).tolist()
        pen.ellipse((x, y, x + w, y + h), fill=tuple(draw.integers(0, 220, 3).tolist()))
    return image


def context(tmp_path, **pictures):
    """A build's context with these pictures (or bytes) in its source: name -> picture."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        if isinstance(picture, bytes):
            (source / f"{name}.png").write_bytes(picture)
        else:
            picture.save(source / f"{name}.png")
    roots = Pictures({"source": source, MADE: tmp_path / "made"})
    return Context(0, EditModelOptions("zoo:tiny-llava"), roots, tmp_path)


def named(name):
    return f"source:{name}.png"
