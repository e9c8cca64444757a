"""Train `tiny-blip` on the pre-training split of `clipart`, on icons, and on some of `easy-vqa`.

    python -m mmtune.zoo.train_tiny_blip --out DIR --teachers DIR --icons DIR --seed 0

Three stages on one GPU (or, for a smoke test with small numbers, on the CPU):
1. a word-piece tokenizer on the training texts, the questions and a list of words;
2. the joint teacher of tiny-clip's recipe: linear maps of EfficientNet-Lite0 and MiniLM;
3. BLIP's losses (contrast, matching with hard negatives, captions), distillation of that teacher,
   and some kinds of questions. Encoder and decoder share all but self-attention; the vision tower
   begins as tiny-clip's. Exponential averages of the weights are kept.
The result is written once for the three stock classes, in fp16, with its scores.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo.blip import blip_tokenizer
from mmtune.zoo.score_tiny_blip import write_scores
from mmtune.zoo.tiny_blip import questions
from mmtune.zoo.tiny_blip.recipe import BlipRecipe
from mmtune.zoo.tiny_blip.stages import build, train_blip
from mmtune.zoo.tiny_blip.tokenizer import train_tokenizer
from mmtune.zoo.tiny_clip import material as made
from mmtune.zoo.tiny_clip.command import begin, facts, recipe_parser
from mmtune.zoo.tiny_clip.export import write_json
from mmtune.zoo.tiny_clip.stages import train_teacher
from mmtune.zoo.tiny_clip.teachers import load_efficientnet

if TYPE_CHECKING:
    import torch

    from mmtune.zoo.tiny_blip.questions import Asked
    from mmtune.zoo.tiny_clip.material import Material

log = logging.getLogger(__name__)


def train(
    recipe: BlipRecipe, teachers: Path, icons: Path | None, out: Path, device: torch.device
) -> dict[str, Any]:
    """Run the whole recipe and write the model folder.

    Args:
        recipe: the numbers.
        teachers: folder below which the two teacher packages are unpacked (or their cache).
        icons: folder with the icon packages; None trains on clipart alone.
        out: the model folder; made if missing.
        device: where training runs.

    Returns:
        What is also written to `out/metrics.json`: recipe, parameters, seconds; the scores are
        added by `main`.
    """
    began = time.time()
    generator = begin(recipe, device)
    data, asked = prepare(recipe, teachers, icons, out, device)
    log.info("%d drawings and icons prepared (%.0f s)", len(data.mirror), time.time() - began)
    teacher = train_teacher(recipe, load_efficientnet(teachers), data, generator)
    log.info("teacher trained (%.0f s)", time.time() - began)
    model = build(recipe, data, device)
    steps = train_blip(recipe, model, teacher, data, asked, generator, out)
    report = {
        "recipe": dataclasses.asdict(recipe) | {"steps": steps, "seconds": 0},
        **facts(model, data, began),
        "training_questions": int((asked.weights > 0).sum()) if asked else 0,
    }
    write_json(report, out / "metrics.json")
    return report


def prepare(
    recipe: BlipRecipe, teachers: Path, icons: Path | None, out: Path, device: torch.device
) -> tuple[Material, Asked | None]:
    """Tokenizer (written to `out`), texts, their embeddings, pictures and questions."""
    kinds = questions.kinds_of(recipe.vqa_kinds)
    gathered = made.gather(recipe, teachers, icons, device)
    rows = questions.read_split("train", recipe.vqa_limit)
    # The words of colours and negations are known pieces even where no such question is asked.
    texts = [text for text in gathered.flat for _ in range(5)] + questions.texts_of(rows)
    train_tokenizer(texts + gathered.words, recipe.vocab_size, out, recipe.context)
    tokenizer = blip_tokenizer(out)
    asked = None
    if kinds:
        asked = questions.on_device(
            rows, kinds, bool(recipe.shape_captions), tokenizer, recipe.image_size, device
        )
    return made.on_device(gathered, tokenizer, recipe.context, device), asked


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train and score."""
    import torch

    parser = recipe_parser("mmtune.zoo.train_tiny_blip", __doc__, BlipRecipe)
    parser.add_argument("--score-limit", type=int, default=0, help="pictures of a split (0: all)")
    given = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, teachers, icons = given.pop("out"), given.pop("teachers"), given.pop("icons")
    device, limit = torch.device(given.pop("device")), given.pop("score_limit")
    out.mkdir(parents=True, exist_ok=True)
    train(BlipRecipe(**given), teachers, icons, out, device)
    write_scores(out, device, limit)


if __name__ == "__main__":
    main()
