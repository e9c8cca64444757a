"""Score a model folder of the `tiny-blip` layout.

    python -m mmtune.zoo.score_tiny_blip --model mmtune/zoo/models/tiny-blip

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

from mmtune.runs import write_text
from mmtune.zoo.blip import blip_model
from mmtune.zoo.tiny_blip.card import card
from mmtune.zoo.tiny_blip.questions import KINDS, read_split
from mmtune.zoo.tiny_blip.scores import answer_scores, caption_scores, retrieval_scores
from mmtune.zoo.tiny_clip.export import write_json

log = logging.getLogger(__name__)

RETRIEVED = (
    ("clipart", "val"),
    ("clipart", "test"),
    ("clipart", "test-text"),
    ("clipart-animals", "test"),
    ("clipart-food", "test"),
)
CAPTIONED = (("clipart", "test"), ("clipart", "test-text"))


def score(folder: Path, device: Any = "cpu", limit: int = 0) -> dict[str, Any]:
    """Everything that the card shows.

    Args:
        folder: as `mmtune.zoo.blip.save_blip` writes it, with the tokenizer.
        device: where the models run.
        limit: pictures of each split, the first ones; 0 means all.

    Returns:
        {"retrieval": {"<set>-<split>": {"itc": {...}, "itm": {...}}}, "answers": {kind: {...}},
        "captions": {"<set>-<split>": {...}}}.
    """
    matching: Any = blip_model(folder, "retrieval").to(device)
    answering: Any = blip_model(folder, "vqa").to(device)
    captioning: Any = blip_model(folder, "caption").to(device)
    return {
        "retrieval": {
            f"{name}-{split}": retrieval_scores(matching, folder, name, split, limit)
            for name, split in RETRIEVED
        },
        "answers": answer_scores(answering, folder, "test", limit),
        "captions": {
            f"{name}-{split}": caption_scores(captioning, folder, name, split, limit)
            for name, split in CAPTIONED
        },
    }


def write_scores(folder: Path, device: Any = "cpu", limit: int = 0) -> None:
    """Score a folder that has a metrics.json, and write both it and README.md."""
    report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    report["scores"] = score(folder, device, limit)
    write_json(report, folder / "metrics.json")
    shown = tables(report["scores"])
    write_text(folder / "README.md", card(report, shown))
    log.info("%s", shown)


def common_answers(split: str = "test") -> dict[str, float]:
    """How many questions the commonest answer of their kind in `train` would answer, in percent."""
    seen: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for row in read_split("train"):
        for item in row["questions"]:
            seen[item["kind"]][item["answer"]] += 1
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for row in read_split(split):
        for item in row["questions"]:
            hit = item["answer"] == seen[item["kind"]].most_common(1)[0][0]
            for name in ("all", item["kind"]):
                total[name] += 1
                right[name] += hit
    return {name: 100 * right[name] / total[name] for name in total}


def tables(scores: Mapping[str, Any]) -> str:
    """The scores as three markdown tables, with 95 % bootstrap intervals."""
    lines = [
        "| split | pairs | by | text to image R@1 | R@5 | R@10 | image to text R@1 | R@5 | R@10 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for split, ways in scores["retrieval"].items():
        for by, found in ways.items():
            cells = [f"`{split}`", str(found["txt2img R@1"]["n"]), by.upper()]
            for way in ("txt2img", "img2txt"):
                cells.append(_cell(found[f"{way} R@1"]))
                cells += [f"{found[f'{way} R@{k}']['value']:.1f}" for k in (5, 10)]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| kind of question | questions | accuracy | commonest answer |",
        "|---|---|---|---|",
    ]
    common = common_answers()
    for kind, found in scores["answers"].items():
        lines.append(f"| `{kind}` | {found['n']:,} | {_cell(found)} | {common[kind]:.1f} |")
    lines += ["", "| split | nats a token | exact | word F1 |", "|---|---|---|---|"]
    for split, found in scores["captions"].items():
        cells = [_cell(found["loss"], 2), _cell(found["exact"]), _cell(found["word F1"])]
        lines.append(f"| `{split}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, float], digits: int = 1) -> str:
    value, low, high = (f"{found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, score, and write."""
    parser = argparse.ArgumentParser(
        prog="python -m mmtune.zoo.score_tiny_blip",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="the model folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--score-limit", type=int, default=0, help="pictures of a split (0: all)")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_scores(given.model, given.device, given.score_limit)


if __name__ == "__main__":
    main()
