"""tiny-diffusion: stock diffusers networks with the text tower of another model of the zoo.

The folder is that of a StableDiffusionPipeline, but for what reads the prompts, which is taken from
the model that diffusion.json names. What is loaded is a stock StableDiffusionPipeline.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.runs import write_json, write_tensors

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

CONFIG = "diffusion.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def text_tower(start: str) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The text tower of a model of the zoo as a stock CLIPTextModel, and its tokenizer.

    Args:
        start: a model that is loaded as a CLIP.
    """
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, CLIPTokenizer

    from mmtune.zoo import model_path
    from mmtune.zoo.conversion import hf_config, to_hf
    from mmtune.zoo.loading import CONFIG as START_CONFIG
    from mmtune.zoo.loading import WEIGHTS as START_WEIGHTS

    folder = model_path(start)
    given = json.loads((folder / START_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    tokenizer: Any = CLIPTokenizer.from_pretrained(str(folder))
    config: Any = hf_config(given, tokenizer.pad_token_id).text_config
    stored = to_hf({name: t.float() for name, t in load_file(folder / START_WEIGHTS).items()})
    state = {
        name.removeprefix("text_model."): t
        for name, t in stored.items()
        if name.startswith("text_model.")
    }
    tower: Any = CLIPTextModel(config)
    getattr(tower, "text_model", tower).load_state_dict(state)
    return tower.eval().requires_grad_(False), tokenizer


def save_diffusion(unet: Any, coder: Any, scheduler: Any, start: str, folder: Path) -> None:
    """Write what was trained, in fp16, and the scheduler.

    Args:
        unet: a UNet2DConditionModel.
        coder: an AutoencoderKL.
        scheduler: the one that a loaded pipeline has.
        start: whose text tower reads the prompts.
        folder: the model folder.
    """
    for name, part in (("unet", unet), ("vae", coder)):
        stored = {n: t.detach().half().cpu().contiguous() for n, t in part.state_dict().items()}
        part.save_config(folder / name)
        write_tensors(folder / name / WEIGHTS, stored, {"format": "pt"})
    scheduler.save_pretrained(folder / "scheduler")
    write_json(folder / CONFIG, {"text_start": start})


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """A stock StableDiffusionPipeline in float32, in eval mode, on the CPU, without progress bars.

    `pipeline(prompt=[...], num_inference_steps=20, guidance_scale=4.0, generator=[...]).images`
    are PIL images; `pipeline.save_pretrained` writes a folder that diffusers reads by itself.

    Args:
        folder: as `save_diffusion` writes it.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    start = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["text_start"]
    tower, tokenizer = text_tower(start)

    def part(of: Any, name: str) -> Any:
        return of.from_pretrained(
            str(folder), subfolder=name, torch_dtype=torch.float32, local_files_only=True
        ).eval()

    stock: Any = StableDiffusionPipeline  # whose annotations want a safety checker
    scheduler: Any = DPMSolverMultistepScheduler
    pipeline = stock(
        vae=part(AutoencoderKL, "vae"),
        text_encoder=tower,
        tokenizer=tokenizer,
        unet=part(UNet2DConditionModel, "unet"),
        scheduler=scheduler.from_pretrained(str(folder), subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
