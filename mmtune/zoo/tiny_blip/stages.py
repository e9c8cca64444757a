"""The trained stage: BLIP's three losses, the joint teacher's distillation, and questions."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo import model_path
from mmtune.zoo.blip import blip_model, save_blip
from mmtune.zoo.tiny_blip.losses import Objective
from mmtune.zoo.tiny_blip.model import TinyBlip, blip_config, start_vision
from mmtune.zoo.tiny_blip.questions import Asked
from mmtune.zoo.tiny_blip.scores import answer_scores, retrieval_scores
from mmtune.zoo.tiny_clip.optimisation import Clock, cosine, decayed, descend
from mmtune.zoo.tiny_clip.stages import drop_paths
from mmtune.zoo.tiny_clip.teachers import SENTENCE_WIDTH, JointTeacher

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mmtune.zoo.tiny_blip.recipe import BlipRecipe
    from mmtune.zoo.tiny_clip.material import Material

log = logging.getLogger(__name__)


def build(recipe: BlipRecipe, data: Material, device: torch.device) -> TinyBlip:
    """The model before training; its vision tower begins as that of `recipe.start`."""
    from torch.nn import functional as F

    model = TinyBlip(blip_config(recipe), recipe.dropout).to(device)
    if recipe.start:
        pictures = data.pictures.pixels[: data.clipart][:256].float()
        shown = F.interpolate(pictures, size=recipe.image_size, mode="bicubic", antialias=True)
        start_vision(model, model_path(recipe.start), shown.clamp(0, 255) / 127.5 - 1)
    return model


def train_blip(
    recipe: BlipRecipe,
    model: TinyBlip,
    teacher: JointTeacher,
    data: Material,
    asked: Asked | None,
    generator: torch.Generator,
    out: Path,
) -> int:
    """Train `model`, write the averages of its weights to `out`, and return the steps done."""
    import torch
    from tqdm import tqdm

    device = data.groups.device
    heads = torch.nn.ModuleDict(
        {
            "feature": torch.nn.Linear(recipe.vision_width, teacher.width),
            "sentence": torch.nn.Linear(recipe.text_width, SENTENCE_WIDTH),
        }
    ).to(device)
    drop_paths(model.matching, recipe.path_drop)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    parts = torch.nn.ModuleList([model, heads])
    optimizer = torch.optim.AdamW(
        _groups(model, heads, recipe),
        lr=recipe.rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    clock = Clock(recipe)
    schedule = cosine(optimizer, clock, min(recipe.warmup, recipe.steps))
    see = torch.compile(model.see) if recipe.compile else model.see
    objective = Objective(recipe, model, see, heads, teacher, data, asked, generator)
    model.train()
    step = 0
    with tqdm(total=clock.steps, desc="tiny-blip", mininterval=5.0) as bar:
        while step < clock.steps:
            losses = objective.losses()
            descend(sum(losses.values()), optimizer, schedule, parts)
            with torch.no_grad():
                pace = min(recipe.average, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - pace)
            step += 1
            bar.update()
            clock.tick(step, device)
            bar.total = clock.steps
            if step % recipe.check_every == 0 or step == clock.steps:
                found = {name: round(value.item(), 3) for name, value in losses.items()}
                log.info("step %d (%.0f s) %s", step, clock.seconds(), json.dumps(found))
                log.info("val %s", json.dumps(check(average, out, device)))
    return step


def check(model: TinyBlip, out: Path, device: torch.device) -> dict[str, float]:
    """Write `model` to `out`, and score it on `clipart`'s val and some pictures of easy-vqa's."""
    save_blip(model.tensors(), model.config, out)
    found = retrieval_scores(blip_model(out, "retrieval").to(device), out, "clipart", "val")
    answers = answer_scores(blip_model(out, "vqa").to(device), out, "val", limit=100)
    return {
        "itc": found["itc"]["txt2img R@1"]["value"],
        "itm": found["itm"]["txt2img R@1"]["value"],
    } | {kind: score["value"] for kind, score in answers.items()}


def _groups(model: TinyBlip, heads: nn.Module, recipe: BlipRecipe) -> list[dict[str, Any]]:
    """Parameter groups: the vision tower goes slower if it has begun as another's."""
    vision = decayed(model.matching.vision_model, recipe.weight_decay)
    slow = {id(p) for p in model.matching.vision_model.parameters()}
    for group in vision:
        group["lr"] = recipe.vision_rate if recipe.start else recipe.rate
    others = decayed(model, recipe.weight_decay) + decayed(heads, recipe.weight_decay)
    for group in others:
        group["params"] = [p for p in group["params"] if id(p) not in slow]
    return vision + others
