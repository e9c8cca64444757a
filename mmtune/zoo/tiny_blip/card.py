"""The model card, written from what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.zoo.tiny_blip.questions import kinds_of
from mmtune.zoo.tiny_blip.recipe import BlipRecipe

_TEXT = Path(__file__).with_suffix(".md")


def card(report: Mapping[str, Any], tables: str) -> str:
    """README.md of the model folder.

    Args:
        report: the content of metrics.json.
        tables: its scores as markdown.
    """
    recipe = report["recipe"]
    kinds = ", ".join(f"`{kind}`" for kind in kinds_of(recipe["vqa_kinds"])) or "(none)"
    told = ', and the shape and colour of a picture as its caption ("blue triangle")'
    numbers = {
        **recipe,
        "parameters": report["parameters"] / 1e6,
        "clipart": report["training_pairs"]["clipart"],
        "icons": report["training_pairs"]["icons"],
        "training_questions": report["training_questions"],
        "vqa_kinds": kinds,
        "shape_captions": told if recipe["shape_captions"] else "",
        "start": f"The vision tower begins as {recipe['start']}'s. " if recipe["start"] else "",
        "command": _command(recipe),
        "seconds": report["seconds"],
        "torch": report["torch"],
        "tables": tables,
    }
    return _TEXT.read_text(encoding="utf-8").format(**numbers)


def _command(recipe: Mapping[str, Any]) -> str:
    """The command line that has these numbers."""
    parts = ["python -m mmtune.zoo.train_tiny_blip --out DIR --teachers DIR --icons DIR"]
    for field in dataclasses.fields(BlipRecipe):
        value = recipe[field.name]
        if field.name == "seed" or value != field.default:
            parts.append(f"--{field.name.replace('_', '-')} {value if value != '' else repr('')}")
    return " ".join(parts)
