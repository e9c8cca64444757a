"""Train `tiny-diffusion`: a latent diffusion model of drawings, prompted through tiny-clip's texts.

    python -m mmtune.zoo.train_tiny_diffusion --out DIR --icons DIR --seed 0

Two stages on one GPU (or, for a smoke test with small numbers, on the CPU):
1. a stock AutoencoderKL learns to give drawings and icons back from a quarter of their edge;
2. a stock UNet2DConditionModel learns to take noise away from their latents, told what they show by
   the text tower of tiny-clip, which stays as it is. Exponential averages of the weights are kept.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.runs import write_json
from mmtune.zoo.diffusion import load_pipeline, save_diffusion, text_tower
from mmtune.zoo.tiny_clip.command import begin, recipe_parser
from mmtune.zoo.tiny_diffusion.material import drawings, gather, moved
from mmtune.zoo.tiny_diffusion.recipe import DiffusionRecipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

# What is drawn to look at while it trains.
LOOKED_AT = (
    "red apple", "cat", "house", "sailing ship", "bicycle", "tree", "flag of france",
    "ace of spades", "yellow star", "blue car", "guitar", "clock", "flower", "fish", "airplane",
    "man with hat", "folder icon", "green arrow", "umbrella", "hammer, silhouette",
    "smiling face", "book", "butterfly", "cup of coffee", "castle", "no smoking sign",
    "computer monitor", "snowman", "horse", "strawberry cake", "red balloon", "moon and stars",
)  # fmt: skip


def train(
    recipe: DiffusionRecipe, icons: Path | None, out: Path, device: torch.device
) -> dict[str, Any]:
    """Run the whole recipe and write the model folder.

    Args:
        recipe: the numbers.
        icons: folder with the icon packages; None trains without.
        out: the model folder; made if missing.
        device: where training runs.

    Returns:
        What is also written to `out/metrics.json`: recipe, sizes, seconds; scores are added by
        `mmtune.zoo.score_tiny_diffusion`.
    """
    import torch

    from mmtune.zoo.tiny_diffusion.model import sampling_noise
    from mmtune.zoo.tiny_diffusion.stages import gather_latents, psnr, train_coder, train_unet

    began = time.time()
    generator = begin(recipe, device)
    data = gather(recipe, icons)
    data.pixels, data.mirror = data.pixels.to(device), data.mirror.to(device)
    log.info("%d pictures (%.0f s)", len(data.pixels), time.time() - began)
    coder, coder_steps = train_coder(recipe, data, generator)
    held = drawings("clipart", "val", recipe.limit)[1].to(device)
    plain = torch.zeros(len(held), dtype=torch.bool, device=device)
    given_back = psnr(coder, moved(held, plain, recipe.size, generator, 0.0)).mean().item()
    log.info("autoencoder: %.2f dB on clipart-val (%.0f s)", given_back, time.time() - began)
    latents = gather_latents(recipe, coder, data, _reader(recipe.text, device), generator)
    log.info("latents and texts (%.0f s)", time.time() - began)

    def check(average: nn.Module) -> None:
        save_diffusion(average, coder, sampling_noise(), recipe.text, out)
        write_grid(out, LOOKED_AT, out / "grid.png", device)

    unet, steps = train_unet(recipe, latents, generator, check)
    done = {"steps": steps, "coder_steps": coder_steps, "seconds": 0, "coder_seconds": 0}
    report = {
        "recipe": dataclasses.asdict(recipe) | done,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "coder_parameters": sum(p.numel() for p in coder.parameters()),
        "coder_psnr": round(given_back, 2),
        "training_pictures": {"clipart": data.clipart, "icons": len(data.mirror) - data.clipart},
        "seconds": round(time.time() - began),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    write_json(out / "metrics.json", report)
    return report


def _reader(start: str, device: torch.device) -> Any:
    """Texts -> the hidden states that a StableDiffusionPipeline shows its UNet."""
    import torch

    tower, tokenizer = text_tower(start)
    tower.to(device)  # pyright: ignore[reportArgumentType]

    def read(texts: list[str]) -> Tensor:
        ids = tokenizer(
            texts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            return tower(ids.to(device))[0]

    return read


def write_grid(
    folder: Path, prompts: Sequence[str], path: Path, device: Any = "cpu", guidance: float = 4.0
) -> None:
    """Draw each prompt with the model in `folder`, eight in a row."""
    import torch
    from PIL import Image

    pipeline = load_pipeline(folder).to(device)
    generators = [torch.Generator(device).manual_seed(seed) for seed in range(len(prompts))]
    images = pipeline(
        prompt=list(prompts),
        num_inference_steps=20,
        guidance_scale=guidance,
        generator=generators,
    ).images  # pyright: ignore[reportAttributeAccessIssue] (of a pipeline's output)
    side = images[0].width
    grid = Image.new("RGB", (8 * side, -(-len(images) // 8) * side), "white")
    for number, image in enumerate(images):
        grid.paste(image, (number % 8 * side, number // 8 * side))
    grid.save(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    import torch

    parser = recipe_parser(
        "mmtune.zoo.train_tiny_diffusion", __doc__, DiffusionRecipe, teachers=False
    )
    given = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out, icons, device = given.pop("out"), given.pop("icons"), torch.device(given.pop("device"))
    out.mkdir(parents=True, exist_ok=True)
    train(DiffusionRecipe(**given), icons, out, device)


if __name__ == "__main__":
    main()
