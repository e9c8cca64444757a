"""The model card, written from what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.zoo.tiny_llava.recipe import LlavaRecipe

_TEXT = Path(__file__).with_suffix(".md")


def card(report: Mapping[str, Any], table: str) -> str:
    """README.md of the model folder.

    Args:
        report: the content of metrics.json.
        table: its scores as markdown.
    """
    recipe = report["recipe"]
    numbers = {
        **recipe,
        **report["training_pictures"],
        "shapes": report["training_pictures"]["easy-vqa"],
        "parameters": report["parameters"] / 1e6,
        "trained": report["trained_parameters"] / 1e6,
        "command": _command(recipe),
        "mean": report["scores"]["mean of kinds"],
        "table": table,
    } | {key: report[key] for key in ("seconds", "device", "torch", "kept_tokens")}
    return _TEXT.read_text(encoding="utf-8").format(**numbers)


def _command(recipe: Mapping[str, Any]) -> str:
    """The command line that has these numbers."""
    parts = ["python -m mmtune.zoo.train_tiny_llava --out DIR --icons DIR"]
    for field in dataclasses.fields(LlavaRecipe):
        value = recipe[field.name]
        if field.name == "seed" or value != field.default:
            parts.append(f"--{field.name.replace('_', '-')} {value}")
    return " ".join(parts)
