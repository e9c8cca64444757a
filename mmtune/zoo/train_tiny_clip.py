"""Train `tiny-clip` from nothing on the pre-training split of `clipart`.

    python -m mmtune.zoo.train_tiny_clip --out DIR --teachers DIR --icons DIR --seed 0

Three stages on one GPU (or, for a smoke test with small numbers, on the CPU):
1. a byte-pair tokenizer on the training texts and a list of words;
2. a joint teacher: EfficientNet-Lite0 tuned with a linear map of MiniLM embeddings, by InfoNCE;
3. the pupil, a stock transformers CLIPModel: InfoNCE with equal texts as positives and soft targets
   by MiniLM similarity, plus distillation of the joint teacher on augmented and mixed pictures,
   and of its text side on captions and words. Exponential averages of the weights are kept.
The result is written in open_clip's layout, in fp16, with its scores.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo.score_tiny_clip import EVALUATED, score_splits
from mmtune.zoo.tiny_clip import material as made
from mmtune.zoo.tiny_clip.command import begin, facts, recipe_parser
from mmtune.zoo.tiny_clip.export import export, score_teacher, write_json
from mmtune.zoo.tiny_clip.recipe import Recipe
from mmtune.zoo.tiny_clip.stages import build_pupil, train_pupil, train_teacher
from mmtune.zoo.tiny_clip.teachers import load_efficientnet, sentence_embeddings
from mmtune.zoo.tiny_clip.tokenizer import train_tokenizer

if TYPE_CHECKING:
    import torch

    from mmtune.zoo.tiny_clip.material import Material

log = logging.getLogger(__name__)


def train(
    recipe: Recipe, teachers: Path, icons: Path | None, out: Path, device: torch.device
) -> dict[str, Any]:
    """Run the whole recipe and write the model folder.

    Args:
        recipe: the numbers.
        teachers: folder below which the two teacher packages are unpacked (or their cache).
        icons: folder with the icon packages; None trains on clipart alone.
        out: the model folder; made if missing.
        device: where training runs.

    Returns:
        What is also written to `out/metrics.json`: recipe, scores, parameters, seconds.
    """
    began = time.time()
    generator = begin(recipe, device)
    data = prepare(recipe, teachers, icons, out, device)
    checks = {pair: made.read_pictures(*pair) for pair in EVALUATED}
    teacher = train_teacher(recipe, load_efficientnet(teachers), data, generator)
    teacher_scores = {
        f"{name}-{split}": score_teacher(recipe, teacher, teachers, held, device)
        for (name, split), held in checks.items()
    }
    model = build_pupil(recipe, device)
    held = made.read_pictures("clipart", "val", side=recipe.image_size)
    average, steps = train_pupil(recipe, model, teacher, data, generator, held, out)
    for parameter in average.parameters():
        parameter.data = parameter.data.half().float()  # what the file holds is what is scored
    export(average, out)
    report = {
        "recipe": dataclasses.asdict(recipe) | {"steps": steps},
        "scores": score_splits(average, out),
        "teacher_scores": teacher_scores,
        **facts(average, data, began),
    }
    write_json(report, out / "metrics.json")
    return report


def prepare(
    recipe: Recipe, teachers: Path, icons: Path | None, out: Path, device: torch.device
) -> Material:
    """Tokenizer (written to `out`), texts, their embeddings, and pictures on the device."""
    from transformers import CLIPTokenizer

    gathered = made.gather(recipe, teachers, icons, device)
    repeated = [text for text in gathered.flat for _ in range(5)]
    train_tokenizer(repeated + gathered.words, recipe.vocab_size, out, recipe.context)
    tokenizer = CLIPTokenizer.from_pretrained(str(out))
    return made.on_device(gathered, tokenizer, recipe.context, device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    import torch

    parser = recipe_parser("mmtune.zoo.train_tiny_clip", __doc__, Recipe)
    parser.add_argument("--prepare-only", action="store_true", help="stop after the embeddings")
    given = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, teachers, device = given.pop("out"), given.pop("teachers"), given.pop("device")
    icons = given.pop("icons")
    out.mkdir(parents=True, exist_ok=True)
    prepare_only = given.pop("prepare_only")
    recipe = Recipe(**given)
    if prepare_only:
        prepare(recipe, teachers, icons, out, torch.device(device))
        for pair in EVALUATED:
            held = made.read_pictures(*pair)
            sentence_embeddings(teachers, [row["caption"] for row in held.rows], device)
        return
    report = train(recipe, teachers, icons, out, torch.device(device))
    for name, scores in report["scores"].items():
        log.info("%s %s", name, {k: v["value"] for k, v in scores.items()})


if __name__ == "__main__":
    main()
