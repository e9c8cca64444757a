"""Score a model folder of the `tiny-diffusion` layout.

    python -m mmtune.zoo.score_tiny_diffusion --model DIR --teachers DIR --icons DIR

Writes `scores` of the folder's metrics.json and the model card, README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.runs import write_json, write_text
from mmtune.zoo import model_path
from mmtune.zoo.diffusion import CONFIG, load_pipeline
from mmtune.zoo.tiny_diffusion.card import card
from mmtune.zoo.tiny_diffusion.material import gather
from mmtune.zoo.tiny_diffusion.recipe import DiffusionRecipe
from mmtune.zoo.tiny_diffusion.scores import (
    Asked,
    ClipJudge,
    PictureJudge,
    asked,
    copies,
    cpu_seconds,
    draw,
    matches,
    nearest,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

SCORED = (("clipart", "test"), ("clipart", "test-text"), ("clipart", "train"))
DRAWN = 500  # prompts of the training split
STEPS, GUIDANCE = 20, 4.0
COPY = 0.05  # as near as this is a copy


def score(
    folder: Path,
    teachers: Path,
    icons: Path | None,
    device: torch.device,
    seeds: int = 3,
    limit: int = 0,
    keep: Path | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> dict[str, Any]:
    """Everything that the card shows.

    Args:
        folder: as `mmtune.zoo.diffusion.save_diffusion` writes it.
        teachers: folder below which the package of EfficientNet-Lite0 is unpacked.
        icons: folder with the icon packages of the training; None: it had none.
        device: where it is computed.
        seeds: pictures a prompt.
        limit: prompts of each split; 0 means all, of the training split `DRAWN`.
        keep: folder for the pictures, as <set>-<split>.safetensors.
        steps: of the sampler.
        guidance: its scale.

    Returns:
        {"steps", "guidance", "seeds", "splits": {"<set>-<split>": {"drawn": ..., "real": ...}}}.
    """
    pipeline = load_pipeline(folder).to(device)
    start = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["text_start"]
    known = gather(DiffusionRecipe(), icons).pixels
    clip = ClipJudge(model_path(start), device)
    picture = PictureJudge(teachers, known[:: max(1, len(known) // 4000)], device)
    splits = {}
    for name, split in SCORED:
        cut = min(limit or DRAWN, DRAWN) if split == "train" else limit
        wanted = asked(name, split, cut)
        drawn = [draw(pipeline, wanted.prompts, seed, steps, guidance) for seed in range(seeds)]
        if keep is not None:
            _keep(drawn, keep / f"{name}-{split}.safetensors")
        splits[f"{name}-{split}"] = judged(wanted, drawn, clip, picture, known, device)
        log.info("%s-%s %s", name, split, json.dumps(splits[f"{name}-{split}"]["drawn"]))
    return {"steps": steps, "guidance": guidance, "seeds": seeds, "splits": splits}


def judged(
    wanted: Asked,
    drawn: Sequence[Tensor],
    clip: ClipJudge,
    picture: PictureJudge,
    known: Tensor,
    device: torch.device,
) -> dict[str, Any]:
    """Scores of a split's pictures, one tensor a seed, and of its real drawings.

    Returns:
        {"drawn": {"clip", "picture": see `matches`, "nearest": {"median", "copies"}}, "real": of
        the real drawings, without "picture"}.
    """
    import torch

    texts = clip.texts(wanted.prompts)
    real = picture.images(wanted.real)

    def near(shown: Sequence[Tensor]) -> dict[str, Any]:
        distances = torch.stack([nearest(some, known, device)[0] for some in shown])
        return {
            "median": round(distances.median().item(), 4),
            "copies": copies(distances, COPY),
        }

    def by_clip(shown: Sequence[Tensor]) -> dict[str, Any]:
        return matches(torch.stack([clip.images(some) @ texts.T for some in shown]), wanted.groups)

    like = torch.stack([picture.images(some) @ real.T for some in drawn])
    return {
        "drawn": {
            "clip": by_clip(drawn),
            "picture": matches(like, wanted.groups),
            "nearest": near(drawn),
        },
        "real": {"clip": by_clip([wanted.real]), "nearest": near([wanted.real])},
    }


def _keep(drawn: Sequence[Tensor], path: Path) -> None:
    import torch

    from mmtune.runs import write_tensors

    write_tensors(path, {"pixels": torch.stack(list(drawn))}, {"format": "pt"})


def write_card(folder: Path) -> None:
    """Write README.md from metrics.json."""
    report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    shown = table(report["scores"])
    write_text(folder / "README.md", card(report, shown))
    log.info("%s", shown)


def table(scores: Mapping[str, Any]) -> str:
    """The scores as a markdown table, with 95 % bootstrap intervals."""
    lines = [
        "| prompts of | prompts | pictures | judge | own | others' | difference | R@1 | R@10 "
        "| chance R@1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for split, found in scores["splits"].items():
        for pictures, judge in (("drawn", "clip"), ("real", "clip"), ("drawn", "picture")):
            one = found[pictures][judge]
            cells = [f"`{split}`", f"{one['own']['n']:,}", pictures, _JUDGES[judge]]
            cells += [f"{one['own']['value']:.1f}", f"{one['others']['value']:.1f}"]
            cells += [_cell(one["difference"]), _cell(one["R@1"]), _cell(one["R@10"])]
            cells.append(f"{one['chance R@1']['value']:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_JUDGES = {"clip": "tiny-clip", "picture": "EfficientNet"}


def _cell(found: Mapping[str, float]) -> str:
    value, low, high = (f"{found[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, score, and write."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m mmtune.zoo.score_tiny_diffusion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="the model folder")
    parser.add_argument("--teachers", type=Path, required=True, help="unpacked teacher packages")
    parser.add_argument("--icons", type=Path, help="unpacked icon packages of the training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3, help="pictures a prompt")
    parser.add_argument("--score-limit", type=int, default=0, help="prompts of a split (0: all)")
    parser.add_argument("--keep", type=Path, help="folder in which the pictures are kept")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = given.model / "metrics.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    report["scores"] = score(
        given.model,
        given.teachers,
        given.icons,
        torch.device(given.device),
        given.seeds,
        given.score_limit,
        given.keep,
    )
    report["cpu_seconds"] = cpu_seconds(load_pipeline(given.model), STEPS, GUIDANCE)
    write_json(path, report)
    write_card(given.model)


if __name__ == "__main__":
    main()
