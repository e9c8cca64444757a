"""The two trained stages: the autoencoder, then the UNet that makes latents from noise."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtune.zoo.tiny_clip.optimisation import Clock, autocast, cosine, decayed, descend
from mmtune.zoo.tiny_diffusion.material import Drawn, moved, numbered
from mmtune.zoo.tiny_diffusion.model import build_coder, build_unet, training_noise

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmtune.zoo.tiny_diffusion.recipe import DiffusionRecipe

log = logging.getLogger(__name__)
_CHUNK = 512


@dataclass
class Latents:
    """What the UNet is trained on.

    Attributes:
        drawn: [n, c, channels, s / 4, s / 4], of n pictures in c places, of unit size.
        clipart: how many of the n are drawings; icons follow.
        numbers: int64 [n, v], the numbers of each picture's texts.
        texts: [m, t, d], hidden states of the different texts; the first is the empty one.
    """

    drawn: Tensor
    clipart: int
    numbers: Tensor
    texts: Tensor


class Trained:
    """A network in training: float32 weights, and on CUDA devices a bfloat16 copy that computes.

    Args:
        network: its parameters are changed.
        of: makes a module of tensors -> tensors of the computing copy.
        rate: of learning, at its height.
        weight_decay: of the matrices.
        clock: how many steps there are.
        warmup: steps.
    """

    def __init__(
        self,
        network: nn.Module,
        of: Callable[[nn.Module], nn.Module],
        rate: float,
        weight_decay: float,
        clock: Clock,
        warmup: int,
    ) -> None:
        import torch

        self.network, self.device = network, next(network.parameters()).device
        cuda = self.device.type == "cuda"
        self.copy = copy.deepcopy(network).bfloat16() if cuda else network
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.run: Any = of(self.copy)
        self.optimizer = torch.optim.AdamW(
            decayed(network, weight_decay), lr=rate, betas=(0.9, 0.99), fused=cuda
        )
        self.schedule = cosine(self.optimizer, clock, warmup)

    def capture(self, *example: Tensor) -> None:
        """Run the passes as CUDA graphs from now on, on tensors shaped like these."""
        import torch

        self.run = torch.cuda.make_graphed_callables(self.run, example)

    def step(self, loss: Tensor) -> None:
        """One step against the gradient, its norm cut at 1."""
        import torch

        if self.copy is self.network:
            descend(loss, self.optimizer, self.schedule, self.network)
            return
        self.copy.zero_grad(set_to_none=True)  # a captured pass hands out the same memory again
        loss.backward()
        mine: list[Any] = list(self.network.parameters())
        theirs: list[Any] = list(self.copy.parameters())
        for parameter in mine:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            torch._foreach_copy_([p.grad for p in mine], [p.grad for p in theirs])
            torch.nn.utils.clip_grad_norm_(mine, 1.0)
            self.optimizer.step()
            self.schedule.step()
            torch._foreach_copy_(theirs, mine)


def _coding(coder: Any) -> nn.Module:
    """Pixels -> what is decoded of a sample of their latents, and KL divergence a latent number."""
    import torch
    from torch import nn

    class Coding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coder = coder

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            code = self.coder.encode(pixels).latent_dist
            noise = torch.randn_like(code.mean)
            found = self.coder.decode(code.mean + code.std * noise).sample
            kl = 0.5 * (code.mean.float() ** 2 + code.var.float() - 1 - code.logvar.float()).mean()
            return found, kl

    return Coding()


def _predicting(unet: Any) -> nn.Module:
    """Noisy latents, steps and texts -> the predicted velocity."""
    from torch import nn

    class Predicting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, noisy: Tensor, step: Tensor, texts: Tensor) -> Tensor:
            return self.unet(noisy, step, encoder_hidden_states=texts, return_dict=False)[0]

    return Predicting()


def train_coder(
    recipe: DiffusionRecipe, data: Drawn, generator: torch.Generator
) -> tuple[nn.Module, int]:
    """Stage 1: an autoencoder whose latents are of unit size by its `scaling_factor`, and steps."""
    device = data.pixels.device
    coder: Any = build_coder(recipe)
    coder.to(device=device, memory_format=_channels_last())
    timed = dataclasses.replace(recipe, steps=recipe.coder_steps, seconds=recipe.coder_seconds)
    clock = Clock(timed)  # pyright: ignore[reportArgumentType] (it reads steps and seconds)
    warmup = min(recipe.warmup, recipe.coder_steps // 10 + 1)
    trained = Trained(coder, _coding, recipe.coder_rate, 1e-4, clock, warmup)
    if recipe.graphs:
        trained.capture(_some(recipe, data, recipe.coder_batch, generator).to(trained.dtype))
    step = 0
    while step < clock.steps:
        pixels = _some(recipe, data, recipe.coder_batch, generator)
        found, kl = trained.run(pixels.to(trained.dtype))
        loss, parts = coder_loss(recipe, found.float(), pixels, kl)
        trained.step(loss)
        step += 1
        clock.tick(step, device)
        if step % 500 == 0 or step == clock.steps:
            shown = {name: round(value.item(), 4) for name, value in parts.items()}
            log.info("coder step %d of %d (%.0f s) %s", step, clock.steps, clock.seconds(), shown)
    coder.eval().requires_grad_(False)
    for parameter in coder.parameters():
        parameter.data = parameter.data.half().float()  # what the file holds is what is used
    size = encode(coder, _some(recipe, data, 4 * _CHUNK, generator)).square().mean().sqrt()
    coder.register_to_config(scaling_factor=round(1 / size.item(), 5))
    return coder, step


def _some(recipe: DiffusionRecipe, data: Drawn, count: int, generator: torch.Generator) -> Tensor:
    index = _draw(recipe, len(data.pixels), data.clipart, count, generator)
    pixels = moved(data.pixels[index], data.mirror[index], recipe.size, generator, recipe.strength)
    return pixels.contiguous(memory_format=_channels_last())


def _channels_last() -> Any:
    import torch

    return torch.channels_last


def coder_loss(
    recipe: DiffusionRecipe, found: Tensor, pixels: Tensor, kl: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Absolute differences of pixels and of their edges, and KL divergence a latent number."""
    wrong = found - pixels
    pixel = wrong.abs().mean()
    edges = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
    loss = pixel + recipe.weight_edges * edges + recipe.weight_kl * kl
    return loss, {"pixel": pixel, "edges": edges, "kl": kl, "mse": wrong.square().mean()}


def encode(coder: Any, pixels: Tensor) -> Tensor:
    """The means of the latents, in chunks: [b, 3, s, s] -> [b, channels, s / 4, s / 4]."""
    import torch

    with torch.no_grad(), autocast(pixels.device):
        return torch.cat(
            [coder.encode(some).latent_dist.mean.float() for some in pixels.split(256)]
        )


def psnr(coder: Any, pixels: Tensor) -> Tensor:
    """Of each picture decoded from its latent, in dB: [b, 3, s, s] in [-1, 1] -> [b]."""
    import torch

    with torch.no_grad():
        found = [
            coder.decode(coder.encode(some).latent_dist.mean).sample.clamp(-1, 1) - some
            for some in pixels.split(64)
        ]
    return -10 * ((torch.cat(found) / 2).square().mean(dim=(1, 2, 3))).log10()


def gather_latents(
    recipe: DiffusionRecipe,
    coder: Any,
    data: Drawn,
    read: Callable[[list[str]], Tensor],
    generator: torch.Generator,
) -> Latents:
    """Latents of every picture in `recipe.copies` places, and what is read in every text.

    Args:
        recipe: the numbers.
        coder: of `train_coder`.
        data: pictures and texts.
        read: texts -> hidden states [m, t, d].
        generator: on the pictures' device.
    """
    import torch

    device, scale = data.pixels.device, coder.config.scaling_factor
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rounds = []
    for _ in range(recipe.copies):
        found = []
        for start in range(0, len(data.pixels), _CHUNK):
            part = slice(start, start + _CHUNK)
            shown = moved(
                data.pixels[part], data.mirror[part], recipe.size, generator, recipe.strength
            )
            found.append((scale * encode(coder, shown)).to(dtype))
        rounds.append(torch.cat(found))
    texts, numbers = numbered(data.texts)
    states = [read(texts[start : start + _CHUNK]) for start in range(0, len(texts), _CHUNK)]
    return Latents(
        drawn=torch.stack(rounds, dim=1),
        clipart=data.clipart,
        numbers=torch.tensor(numbers, device=device),
        texts=torch.cat([some.to(device=device, dtype=dtype) for some in states]),
    )


def train_unet(
    recipe: DiffusionRecipe,
    data: Latents,
    generator: torch.Generator,
    check: Callable[[nn.Module], None],
) -> tuple[nn.Module, int]:
    """Stage 2. Returns the averaged weights as a model of its own, in eval mode, and the steps.

    Args:
        recipe: the numbers.
        data: latents and texts.
        generator: on their device.
        check: called with the averages every `recipe.check_every` seconds, and at the end.
    """
    import torch

    device = data.drawn.device
    unet: Any = build_unet(recipe, data.texts.shape[2])
    unet.to(device=device, memory_format=_channels_last()).train()
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    clock = Clock(recipe)  # pyright: ignore[reportArgumentType] (it reads steps and seconds)
    trained = Trained(unet, _predicting, recipe.rate, recipe.weight_decay, clock, recipe.warmup)
    if recipe.graphs:
        latents, texts = draw_batch(recipe, data, generator)
        trained.capture(
            latents.to(trained.dtype),
            torch.zeros_like(latents[:, 0, 0, 0]).long(),
            texts.to(trained.dtype),
        )
    strengths = training_noise().alphas_cumprod.to(device)
    mean, checked, step = torch.zeros((), device=device), 0.0, 0
    while step < clock.steps:
        latents, texts = draw_batch(recipe, data, generator)
        loss = velocity_loss(trained.run, latents, texts, strengths, generator, trained.dtype)
        trained.step(loss)
        with torch.no_grad():
            pace = min(recipe.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - pace)
            mean.lerp_(loss.detach().float(), max(0.01, 1 / (1 + step)))
        step += 1
        clock.tick(step, device)
        if clock.seconds() > checked + recipe.check_every or step == clock.steps:
            checked = clock.seconds()
            log.info("step %d of %d (%.0f s) loss %.4f", step, clock.steps, checked, mean.item())
            check(average)
    return average, step


def draw_batch(
    recipe: DiffusionRecipe, data: Latents, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random latents with one of each one's texts, some of these left empty.

    Returns:
        [b, channels, s, s] and [b, t, d].
    """
    import torch

    device, (have, copies) = data.drawn.device, data.drawn.shape[:2]
    index = _draw(recipe, have, data.clipart, recipe.batch, generator)

    def number(below: int) -> Tensor:
        return torch.randint(below, (recipe.batch,), generator=generator, device=device)

    chance = torch.rand(2, recipe.batch, generator=generator, device=device)
    choice = torch.where(chance[0] < 0.4, 0, number(data.numbers.shape[1]))
    text = torch.where(chance[1] < recipe.empty, 0, data.numbers[index, choice])
    latents = data.drawn[index, number(copies)].contiguous(memory_format=torch.channels_last)
    return latents, data.texts[text]


def velocity_loss(
    predict: Callable[..., Tensor],
    latents: Tensor,
    texts: Tensor,
    strengths: Tensor,
    generator: torch.Generator | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Squared error of v = a noise - s x at a random step; a^2 + s^2 = 1.

    Args:
        predict: (a x + s noise, step, texts) -> v.
        latents: x.
        texts: hidden states.
        strengths: a^2 of every step.
        generator: on the latents' device.
        dtype: what is predicted in; None: that of the texts.

    Shape:
        latents [b, channels, s, s]; texts [b, t, d]; strengths [steps].
    """
    import torch

    count, device = len(latents), latents.device
    step = torch.randint(len(strengths), (count,), generator=generator, device=device)
    kept = strengths[step, None, None, None]
    a, s = kept.sqrt(), (1 - kept).sqrt()
    noise = torch.randn(latents.shape, generator=generator, device=device)
    clean = latents.float()
    dtype = dtype or texts.dtype
    found = predict((a * clean + s * noise).to(dtype), step, texts.to(dtype))
    return (found.float() - (a * noise - s * clean)).square().mean()


def _draw(
    recipe: DiffusionRecipe, have: int, clipart: int, count: int, generator: torch.Generator
) -> Tensor:
    """Random numbers of pictures, `recipe.icon_share` of them of icons where there are any."""
    import torch

    device = generator.device
    icons = round(recipe.icon_share * count) if have > clipart else 0
    drawings = torch.randint(clipart, (count - icons,), generator=generator, device=device)
    if not icons:
        return drawings
    more = torch.randint(clipart, have, (icons,), generator=generator, device=device)
    return torch.cat([drawings, more])
