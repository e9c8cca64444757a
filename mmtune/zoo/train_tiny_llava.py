"""Train `tiny-llava`: a projector and deltas of tiny-clip's tower, before a frozen SmolLM2.

    python -m mmtune.zoo.train_tiny_llava --out DIR --icons DIR --seed 0

Two stages on one GPU (or, for a smoke test with small numbers, on the CPU):
1. the tower, cut into larger patches, learns to see what it saw with small ones;
2. tower and projector learn to have the language model, which stays as it is, answer questions
   about drawings, icons and shapes. Exponential averages of the weights are kept.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.runs import write_json
from mmtune.zoo.llava import llava_model
from mmtune.zoo.tiny_clip.command import begin, recipe_parser
from mmtune.zoo.tiny_llava.material import gather
from mmtune.zoo.tiny_llava.recipe import LlavaRecipe
from mmtune.zoo.tiny_llava.scores import answer_scores, mean_of_kinds

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CHECKED = (("clipart", "val"), ("easy-vqa", "val"))


def train(
    recipe: LlavaRecipe, language: str, icons: Path | None, out: Path, device: torch.device
) -> dict[str, Any]:
    """Run the whole recipe and write the model folder.

    Args:
        recipe: the numbers.
        language: folder of the language model.
        icons: folder with the icon packages; None trains without.
        out: the model folder; made if missing.
        device: where training runs.

    Returns:
        What is also written to `out/metrics.json`: recipe, sizes, seconds; scores are added by
        `mmtune.zoo.score_tiny_llava`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mmtune.zoo.tiny_llava.model import TinyLlava
    from mmtune.zoo.tiny_llava.stages import distil, train_llava

    began = time.time()
    generator = begin(recipe, device)
    tokenizer = AutoTokenizer.from_pretrained(language)
    data = gather(recipe, icons, tokenizer, device)
    log.info("%s drawings, icons and shapes (%.0f s)", data.parts, time.time() - began)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    speaking = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    model = TinyLlava(recipe, speaking).to(device)
    rest = torch.ones(speaking.config.vocab_size, dtype=torch.bool)
    rest[data.kept.cpu()] = False
    never = rest.nonzero()[:, 0].tolist()

    def check() -> dict[str, Any]:
        whole: Any = llava_model(out, language).to(device)
        found = [
            answer_scores(whole, tokenizer, *pair, limit=recipe.check_limit, suppress_tokens=never)
            for pair in CHECKED
        ]
        values = {kind: s["value"] for scores in found for kind, s in scores.items()}
        return {"mean": round(mean_of_kinds(*found), 1)} | values

    distil(recipe, model, data, generator)
    log.info("tower prepared (%.0f s)", time.time() - began)
    steps = train_llava(recipe, model, data, generator, out, check)
    trained = model.trained().values()
    report = {
        "recipe": dataclasses.asdict(recipe) | {"steps": steps, "seconds": 0},
        "trained_parameters": sum(p.numel() for p in trained),
        "parameters": sum(p.numel() for p in llava_model(out, language).parameters()),
        "training_pictures": dict(zip(("clipart", "icons", "easy-vqa"), data.parts, strict=True)),
        "kept_tokens": len(data.kept),
        "seconds": round(time.time() - began),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    write_json(out / "metrics.json", report)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    import torch

    parser = recipe_parser("mmtune.zoo.train_tiny_llava", __doc__, LlavaRecipe, teachers=False)
    parser.add_argument("--language", help="folder of SmolLM2 (default: that of its package)")
    given = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, icons, language = given.pop("out"), given.pop("icons"), given.pop("language")
    device = torch.device(given.pop("device"))
    out.mkdir(parents=True, exist_ok=True)
    if language is None:
        from mmtune.zoo.smollm import language_folder

        language = str(language_folder())
    train(LlavaRecipe(**given), language, icons, out, device)


if __name__ == "__main__":
    main()
