"""Score a model folder of the `tiny-llava` layout.

    python -m mmtune.zoo.score_tiny_llava --model mmtune/zoo/models/tiny-llava

Writes `scores` of the folder's metrics.json and the model card, README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.runs import write_json, write_text
from mmtune.zoo.llava import llava_model
from mmtune.zoo.tiny_llava.card import card
from mmtune.zoo.tiny_llava.scores import answer_scores, items, mean_of_kinds

log = logging.getLogger(__name__)

SCORED = (
    ("clipart", "test"),
    ("clipart", "test-text"),
    ("clipart-animals", "test"),
    ("clipart-food", "test"),
    ("easy-vqa", "test"),
)
HEADLINE = ("clipart-test", "easy-vqa-test")  # what the mean over kinds is of
WAYS = ("asked", "rephrased")


def score(
    folder: Path, language: str, device: Any = "cpu", limit: int = 0, **options: Any
) -> dict[str, Any]:
    """Everything that the card shows.

    Args:
        folder: as `mmtune.zoo.llava.save_llava` writes it.
        language: folder of the language model.
        device: where the model runs.
        limit: pictures of each split, the first ones; 0 means all.
        options: of `generate`.

    Returns:
        {"answers": {"<set>-<split>": {"asked": {kind: {...}}, "rephrased": {...}}}, "mean of
        kinds": of the splits of `HEADLINE`, open naming left out}.
    """
    from transformers import AutoTokenizer

    model: Any = llava_model(folder, language).to(device)
    tokenizer = AutoTokenizer.from_pretrained(language)
    answers = {
        f"{name}-{split}": {
            way: answer_scores(
                model, tokenizer, name, split, limit, rephrased=way == "rephrased", **options
            )
            for way in WAYS
        }
        for name, split in SCORED
    }
    means = {
        way: round(mean_of_kinds(*(answers[split][way] for split in HEADLINE)), 1) for way in WAYS
    }
    return {"answers": answers, "mean of kinds": means}


def write_scores(folder: Path, language: str, device: Any = "cpu", limit: int = 0) -> None:
    """Score a folder that has a metrics.json, and write both it and README.md."""
    report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    report["scores"] = score(folder, language, device, limit)
    write_json(folder / "metrics.json", report)
    write_card(folder)


def write_card(folder: Path) -> None:
    """Write README.md from metrics.json."""
    report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    shown = table(report["scores"])
    write_text(folder / "README.md", card(report, shown))
    log.info("%s", shown)


def commonest(name: str, split: str, limit: int = 0) -> dict[str, float]:
    """Percent of each kind that its commonest answer in the same split would get right."""
    counts: dict[str, Counter[str]] = {}
    for _, question in items(name, split, limit)[1]:
        counts.setdefault(question.kind, Counter())[question.answer] += 1
    return {kind: 100 * max(found.values()) / found.total() for kind, found in counts.items()}


def table(scores: Mapping[str, Any]) -> str:
    """The scores as a markdown table, with 95 % bootstrap intervals."""
    lines = [
        "| split | kind of question | questions | right | in other words | commonest answer |",
        "|---|---|---|---|---|---|",
    ]
    for (name, part), (split, ways) in zip(SCORED, scores["answers"].items(), strict=True):
        common = commonest(name, part)
        for kind, found in ways["asked"].items():
            cells = [_cell(found), _cell(ways["rephrased"][kind]), f"{common[kind]:.1f}"]
            lines.append(f"| `{split}` | {kind} | {found['n']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, float]) -> str:
    value, low, high = (f"{found[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, score, and write."""
    parser = argparse.ArgumentParser(
        prog="python -m mmtune.zoo.score_tiny_llava",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="the model folder")
    parser.add_argument("--language", help="folder of SmolLM2 (default: that of its package)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--score-limit", type=int, default=0, help="pictures of a split (0: all)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    language = given.language
    if language is None:
        from mmtune.zoo.smollm import language_folder

        language = str(language_folder())
    write_scores(given.model, language, given.device, given.score_limit)


if __name__ == "__main__":
    main()
