"""The model card, written from what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.zoo.tiny_diffusion.recipe import DiffusionRecipe

_TEXT = Path(__file__).with_suffix(".md")


def card(report: Mapping[str, Any], table: str) -> str:
    """README.md of the model folder.

    Args:
        report: the content of metrics.json.
        table: its scores as markdown.
    """
    recipe, scores = report["recipe"], report["scores"]
    near = {
        f"{pictures}_{key}_{split.removeprefix('clipart-').replace('-', '_')}": value
        for split, found in scores["splits"].items()
        for pictures in ("drawn", "real")
        for key, value in found[pictures]["nearest"].items()
    }
    numbers = {
        **recipe,
        **report["training_pictures"],
        **near,
        "parameters": report["parameters"] / 1e6,
        "coder_parameters": report["coder_parameters"] / 1e6,
        "latent": recipe["size"] // 4,
        "command": _command(recipe),
        "table": table,
        "scored": scores,
    } | {key: report[key] for key in ("seconds", "device", "torch", "coder_psnr", "cpu_seconds")}
    return _TEXT.read_text(encoding="utf-8").format(**numbers)


def _command(recipe: Mapping[str, Any]) -> str:
    """The command line that has these numbers."""
    parts = ["python -m mmtune.zoo.train_tiny_diffusion --out DIR --icons DIR"]
    for field in dataclasses.fields(DiffusionRecipe):
        value = recipe[field.name]
        if field.name == "seed" or value != field.default:
            parts.append(f"--{field.name.replace('_', '-')} {value}")
    return " ".join(parts)
