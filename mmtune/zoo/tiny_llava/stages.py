"""The two trained stages: the tower learns to see as its start does, then all learn to answer."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mmtune.zoo.llava import root_of, start_tower
from mmtune.zoo.tiny_clip.augmentation import augment, mix
from mmtune.zoo.tiny_clip.optimisation import Clock, autocast, cosine
from mmtune.zoo.tiny_clip.stages import drop_paths
from mmtune.zoo.tiny_llava.material import Asked, draw_batch
from mmtune.zoo.tiny_llava.model import last_state

if TYPE_CHECKING:
    from mmtune.zoo.tiny_llava.model import TinyLlava
    from mmtune.zoo.tiny_llava.recipe import LlavaRecipe

log = logging.getLogger(__name__)


class Teacher:
    """The tower that was the start, which sees smaller patches."""

    def __init__(self, recipe: LlavaRecipe, device: torch.device) -> None:
        tower: Any = start_tower(recipe.start)
        self.tower: Any = tower.to(device).requires_grad_(False)
        self.device = device

    def unlike(self, seen: Tensor, pixels: Tensor) -> Tensor:
        """How far what a pupil sees is from what this tower sees: 1 - cosine, mean over tokens.

        Shape:
            seen [b, 1 + n, d]; pixels [b, 3, s, s].
        """
        with torch.no_grad(), autocast(self.device):
            full = last_state(self.tower, pixels)
        side, small = round((full.shape[1] - 1) ** 0.5), round((seen.shape[1] - 1) ** 0.5)
        grid = full[:, 1:].transpose(1, 2).reshape(len(full), -1, side, side).float()
        pooled = F.adaptive_avg_pool2d(grid, small).flatten(2).transpose(1, 2)
        wanted = torch.cat([full[:, :1].float(), pooled], dim=1)
        centre = wanted.mean(dim=(0, 1))
        near = F.cosine_similarity(seen.float() - centre, wanted - centre, dim=-1)
        return 1 - near.mean()


def distil(recipe: LlavaRecipe, model: TinyLlava, data: Asked, generator: torch.Generator) -> None:
    """Let the tower see in augmented and mixed pictures what the start's tower sees there."""
    if not recipe.distil_steps:
        return
    teacher = Teacher(recipe, data.pixels.device)
    own = [p for n, p in model.trained().items() if ".vision_tower." in n]
    step = _Steps(own, recipe.distil_rate, recipe, recipe.distil_steps)
    size, device = model.stock.config.vision_config.image_size, data.pixels.device
    for number in range(recipe.distil_steps):
        index = torch.randint(
            len(data.pixels), (recipe.distil_batch,), generator=generator, device=device
        )
        pixels = augment(data.pixels[index], data.mirror[index], size, generator)
        pixels = torch.cat([pixels[: len(pixels) // 2], mix(pixels[len(pixels) // 2 :], generator)])
        with autocast(device):
            loss = teacher.unlike(model.see(pixels), pixels)
        step(loss)
        if number % recipe.check_every == 0 or number + 1 == recipe.distil_steps:
            log.info("distil step %d %.3f", number, loss.item())


def train_llava(
    recipe: LlavaRecipe,
    model: TinyLlava,
    data: Asked,
    generator: torch.Generator,
    out: Path,
    check: Callable[[], dict[str, Any]],
) -> int:
    """Train, write the averages of the weights to `out`, and return the steps done.

    Args:
        recipe: the numbers.
        model: in training; in the end it holds the averages.
        data: pictures and questions.
        generator: on their device.
        out: the model folder.
        check: scores what is in `out`.
    """
    device = data.pixels.device
    tower = model.stock.model.vision_tower
    drop_paths(_Around(root_of(tower)), recipe.path_drop)
    teacher = Teacher(recipe, device) if recipe.weight_distil else None
    if recipe.compile:
        for layer in model.stock.model.language_model.layers:
            layer.compile()
    parameters = model.trained()
    average = {name: copy.deepcopy(p.detach()) for name, p in parameters.items()}
    clock = Clock(recipe)  # pyright: ignore[reportArgumentType] (it reads steps and seconds)
    vision = [p for n, p in parameters.items() if ".vision_tower." in n]
    others = [p for n, p in parameters.items() if ".vision_tower." not in n]
    descend = _Steps(vision, recipe.vision_rate, recipe, clock, others)
    sums, step = {}, 0
    with tqdm(total=clock.steps, desc="tiny-llava", mininterval=10.0) as bar:
        while step < clock.steps:
            losses = _losses(recipe, model, data, generator, teacher)
            descend(sum(losses.values()))
            with torch.no_grad():
                pace = min(recipe.average, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - pace)
            step += 1
            bar.update()
            clock.tick(step, device)
            bar.total = clock.steps
            sums = {
                n: 0.98 * sums.get(n, v.detach()) + 0.02 * v.detach() for n, v in losses.items()
            }
            if step % recipe.check_every == 0 or step == clock.steps:
                found = {name: round(value.item(), 3) for name, value in sums.items()}
                log.info("step %d (%.0f s) %s", step, clock.seconds(), json.dumps(found))
                _exchange(parameters, average)
                model.save(out)
                log.info("val %s", json.dumps(check()))
                if step < clock.steps:
                    _exchange(parameters, average)
    return step


def _losses(
    recipe: LlavaRecipe,
    model: TinyLlava,
    data: Asked,
    generator: torch.Generator,
    teacher: Teacher | None,
) -> dict[str, Tensor]:
    index, question = draw_batch(data, recipe, generator)
    size, device = model.stock.config.vision_config.image_size, data.pixels.device
    cut = int((index < sum(data.parts[:2])).sum())  # drawings and icons come first
    pixels = torch.cat(
        [
            augment(data.pixels[some], data.mirror[some], size, generator, strength)
            for some, strength in (
                (index[:cut], recipe.strength),
                (index[cut:], recipe.shape_strength),
            )
        ]
    )
    picked = (index, question)
    with autocast(device):
        seen = model.see(pixels)
        told = model.tell(
            seen, data.opening, data.ids[picked], data.begin[picked], data.end[picked], data.kept
        )
        losses = {"answer": told.mean()}
        if teacher is not None:
            losses["distil"] = recipe.weight_distil * teacher.unlike(seen, pixels)
    return losses


def _exchange(parameters: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            held = parameter.detach().clone()
            parameter.copy_(average[name])
            average[name].copy_(held)


class _Around(nn.Module):
    """What `drop_paths` expects: a module with the tower as `vision_model`."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision_model = tower


class _Steps:
    """AdamW with a warm-up and a cosine; the tower goes at a rate of its own."""

    def __init__(
        self,
        vision: list[nn.Parameter],
        vision_rate: float,
        recipe: LlavaRecipe,
        steps: Clock | int,
        others: list[nn.Parameter] | None = None,
    ) -> None:
        groups: list[dict[str, Any]] = []
        for some, rate in ((vision, vision_rate), (others or [], recipe.rate)):
            for wide, decay in ((True, recipe.weight_decay), (False, 0.0)):
                chosen = [p for p in some if (p.ndim >= 2) == wide]
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
        groups = [group for group in groups if group["params"]]
        self.parameters = [p for group in groups for p in group["params"]]
        fused = self.parameters[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=fused)
        fixed = isinstance(steps, int)
        last = steps if isinstance(steps, int) else steps.steps
        self.schedule = cosine(
            self.optimizer,
            None if fixed else steps,
            min(recipe.warmup, last),
            last if fixed else 0,
        )

    def __call__(self, loss: Any) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
