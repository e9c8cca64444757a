"""Steps of gradient descent, their schedule, and what each step draws."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmtune.zoo.tiny_clip.material import Material
    from mmtune.zoo.tiny_clip.recipe import Recipe

log = logging.getLogger(__name__)


class Clock:
    """How many steps there are: the recipe's, or what fits into its seconds by the pace."""

    def __init__(self, recipe: Recipe) -> None:
        self.steps = recipe.steps
        self.limit = recipe.seconds
        self.began = time.time()
        self.warm = 0.0

    def seconds(self) -> float:
        return time.time() - self.began

    def tick(self, step: int, device: torch.device) -> None:
        """Measure the pace over steps 20 to 80, after compilation."""
        import torch

        if not self.limit or step not in (20, 80):
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step == 20:
            self.warm = self.seconds()
            return
        pace = (self.seconds() - self.warm) / 60
        self.steps = max(step + 1, step + int((self.limit - self.seconds()) / pace))
        log.info("%.3f s a step: %d steps", pace, self.steps)


def draw_pairs(
    data: Material, count: int, icons: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random drawings, none twice while they last, and one of each one's texts.

    Args:
        data: n drawings.
        count: how many to draw.
        icons: share of them that are icons, where there are any.
        generator: on the data's device.

    Returns:
        Index of the drawing and of its text, both int64 [count].
    """
    import torch

    device, have = data.groups.device, len(data.groups)
    share = round(icons * count) if have > data.clipart else 0
    parts = ((0, data.clipart, count - share), (data.clipart, have, share))
    rounds = [
        start + torch.randperm(end - start, generator=generator, device=device)[:taken]
        for start, end, wanted in parts
        for taken in _portions(wanted, end - start)
    ]
    index = torch.cat(rounds)
    variants = data.tokens.shape[1]
    choice = torch.randint(variants, (count,), generator=generator, device=device)
    caption = torch.rand(count, generator=generator, device=device) < 0.4
    return index, torch.where(caption, torch.zeros_like(choice), choice)


def _portions(wanted: int, have: int) -> list[int]:
    """`wanted` in portions of at most `have`."""
    return [min(have, wanted - done) for done in range(0, wanted, max(have, 1))]


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors and scalars do not."""
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    others = [p for p in module.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def cosine(
    optimizer: torch.optim.Optimizer, clock: Clock | None, warmup: int, steps: int = 0
) -> Any:
    """Linear warm-up, then half a cosine to zero at `clock.steps` (or `steps`)."""
    import torch

    def factor(step: int) -> float:
        last = clock.steps if clock else steps
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, last - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def descend(loss: Any, optimizer: Any, schedule: Any, module: nn.Module) -> None:
    """One step against the gradient, its norm cut at 1."""
    import torch

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def autocast(device: torch.device) -> Any:
    """bfloat16 where it is fast, on CUDA devices."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
