"""Score a model folder of the `tiny-clip` layout on every held-out split.

    python -m mmtune.zoo.score_tiny_clip --model mmtune/zoo/models/tiny-clip

Writes `scores` of the folder's metrics.json, and logs them as the table of the model card.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.zoo.loading import CONFIG, hf_model
from mmtune.zoo.tiny_clip import material
from mmtune.zoo.tiny_clip.export import score_pupil, write_json

log = logging.getLogger(__name__)

EVALUATED = (
    ("clipart", "val"),
    ("clipart", "test"),
    ("clipart", "test-text"),
    ("clipart-animals", "test"),
    ("clipart-food", "test"),
)


def load(folder: Path) -> Any:
    """The folder's weights as a CLIPModel in eval mode."""
    model_cfg = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    model, _, _ = hf_model(folder, model_cfg, model_cfg["text_cfg"]["context_length"])
    return model.eval()


def score_splits(
    model: Any, folder: Path, splits: Sequence[tuple[str, str]] = EVALUATED
) -> dict[str, Any]:
    """Recall on each split, pictures preprocessed as open_clip_config.json says.

    Args:
        model: a CLIPModel.
        folder: holds its tokenizer.
        splits: (data set, split).

    Returns:
        {"<data set>-<split>": {"txt2img R@1": {"value", "low", "high", "n"}, ...}}.
    """
    side = model.config.vision_config.image_size
    return {
        f"{name}-{split}": score_pupil(
            model, material.read_pictures(name, split, side=side), folder
        )
        for name, split in splits
    }


def table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The scores as a markdown table: percent, with 95 % bootstrap intervals of R@1."""
    lines = [
        "| split | pairs | text to image R@1 | R@5 | R@10 | image to text R@1 | R@5 | R@10 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for split, found in scores.items():
        cells = [f"`{split}`", str(found["txt2img R@1"]["n"])]
        for way in ("txt2img", "img2txt"):
            first = found[f"{way} R@1"]
            cells.append(f"{first['value']:.1f} [{first['low']:.1f}, {first['high']:.1f}]")
            cells += [f"{found[f'{way} R@{k}']['value']:.1f}" for k in (5, 10)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, score, and write."""
    parser = argparse.ArgumentParser(
        prog="python -m mmtune.zoo.score_tiny_clip",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="the model folder")
    folder = parser.parse_args(arguments).model
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    report["scores"] = score_splits(load(folder), folder)
    write_json(report, folder / "metrics.json")
    log.info("%s", table(report["scores"]))


if __name__ == "__main__":
    main()
