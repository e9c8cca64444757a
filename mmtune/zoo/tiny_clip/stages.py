"""The two trained stages: the joint teacher, and the pupil that is shipped."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo.tiny_clip.augmentation import augment, mix, recolour
from mmtune.zoo.tiny_clip.export import export, score_pupil
from mmtune.zoo.tiny_clip.objectives import contrast, soft_targets, unlike
from mmtune.zoo.tiny_clip.optimisation import Clock, autocast, cosine, decayed, descend, draw_pairs
from mmtune.zoo.tiny_clip.teachers import SENTENCE_WIDTH, JointTeacher

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmtune.zoo.tiny_clip.material import Material, Pictures
    from mmtune.zoo.tiny_clip.recipe import Recipe

log = logging.getLogger(__name__)


def build_pupil(recipe: Recipe, device: torch.device) -> nn.Module:
    """A stock CLIPModel with two linear heads, used in training only, that face the teachers."""
    import torch
    from transformers import CLIPModel

    from mmtune.zoo.conversion import hf_config

    config = hf_config(
        {
            "embed_dim": recipe.embed,
            "text_cfg": {
                "vocab_size": recipe.vocab_size,
                "width": recipe.text_width,
                "layers": recipe.text_layers,
                "heads": recipe.text_heads,
                "context_length": recipe.context,
            },
            "vision_cfg": {
                "width": recipe.vision_width,
                "layers": recipe.vision_layers,
                "head_width": recipe.vision_width // recipe.vision_heads,
                "image_size": recipe.image_size,
                "patch_size": recipe.patch_size,
            },
        },
        pad_token_id=recipe.vocab_size - 3,
    )
    model: Any = CLIPModel(config)
    model.to(device)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(15.0))
    return model


def train_teacher(
    recipe: Recipe, network: nn.Module, data: Material, generator: torch.Generator
) -> JointTeacher:
    """Stage 2: tune EfficientNet and a linear map of MiniLM embeddings into one space."""
    import torch

    device = data.groups.device
    teacher: Any = JointTeacher(network, recipe.embed, bool(recipe.scales))
    teacher.to(device=device, memory_format=torch.channels_last)
    slow = list(teacher.network.parameters())
    fast = [p for n, p in teacher.named_parameters() if not n.startswith("network.")]
    optimizer = torch.optim.AdamW(
        [{"params": slow, "lr": recipe.teacher_rate}, {"params": fast, "lr": 2e-3}],
        weight_decay=0.05,
    )
    schedule = cosine(optimizer, None, recipe.teacher_steps // 10, recipe.teacher_steps)
    teacher.train()
    if not recipe.teacher_rate:
        teacher.network.eval().requires_grad_(False)
    for step in range(recipe.teacher_steps):
        index, choice = draw_pairs(data, recipe.teacher_batch, recipe.icon_share, generator)
        views = augment(
            data.pictures.pixels[index], data.mirror[index], recipe.teacher_size, generator
        )
        sentences = data.sentences[index, choice]
        with autocast(device):
            features = teacher.features(views.contiguous(memory_format=torch.channels_last))
        images, texts = teacher.pictures(features.float()), teacher.texts(sentences)
        targets = soft_targets(
            data.groups[index], data.sentences[index, 0], recipe.soft_share, recipe.soft_sharpness
        )
        loss = contrast(images, texts, teacher.scale.exp().clamp(max=40), targets)
        descend(loss, optimizer, schedule, teacher)
        if step % recipe.check_every == 0:
            log.info("teacher step %d loss %.3f", step, loss.item())
    return teacher.eval().requires_grad_(False)


def train_pupil(
    recipe: Recipe,
    model: Any,
    teacher: JointTeacher,
    data: Material,
    generator: torch.Generator,
    held: Pictures,
    out: Path,
) -> tuple[nn.Module, int]:
    """Stage 3. Returns the averaged weights as a model of its own, in eval mode, and the steps."""
    import torch

    device = data.groups.device
    heads = torch.nn.ModuleDict(
        {
            "feature": torch.nn.Linear(recipe.vision_width, teacher.width),
            "sentence": torch.nn.Linear(recipe.text_width, SENTENCE_WIDTH),
        }
    ).to(device)
    drop_paths(model, recipe.path_drop)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    parts = torch.nn.ModuleList([model, heads])
    optimizer = torch.optim.AdamW(
        decayed(parts, recipe.weight_decay),
        lr=recipe.rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    clock = Clock(recipe)
    schedule = cosine(optimizer, clock, recipe.warmup)
    networks = _Networks.of(model, teacher, recipe.compile)
    model.train()
    step = 0
    while step < clock.steps:
        losses = pupil_losses(recipe, model, networks, heads, teacher, data, generator)
        descend(sum(losses.values()), optimizer, schedule, parts)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(60.0))
            pace = min(recipe.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - pace)
        step += 1
        clock.tick(step, device)
        if step % recipe.check_every == 0 or step == clock.steps:
            export(average, out)
            found = score_pupil(average, held, out)
            log.info(
                "step %d of %d (%.0f s) %s val t2i %s i2t %s",
                step,
                clock.steps,
                clock.seconds(),
                " ".join(f"{name} {value.item():.3f}" for name, value in losses.items()),
                [found[f"txt2img R@{k}"]["value"] for k in (1, 5, 10)],
                [found[f"img2txt R@{k}"]["value"] for k in (1, 5, 10)],
            )
    return average, step


@dataclass(frozen=True)
class _Networks:
    """The heavy forward passes, compiled or not."""

    vision: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, model: Any, teacher: JointTeacher, compiled: int) -> _Networks:
        import torch

        def vision(pixels: Tensor) -> Tensor:
            return model.vision_model(pixel_values=pixels).pooler_output

        def text(ids: Tensor) -> Tensor:
            return model.text_model(input_ids=ids).pooler_output

        if not compiled:
            return cls(vision, text, teacher.features)
        return cls(torch.compile(vision), torch.compile(text), torch.compile(teacher.features))


def pupil_losses(
    recipe: Recipe,
    model: Any,
    networks: _Networks,
    heads: Any,
    teacher: JointTeacher,
    data: Material,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The weighted losses of one step on freshly drawn pictures and texts."""
    import torch
    from torch.nn import functional as F

    device = data.groups.device
    index, choice = draw_pairs(data, recipe.batch, recipe.icon_share, generator)
    double = 2 * recipe.image_size
    views = augment(data.pictures.pixels[index], data.mirror[index], double, generator)
    rounds = range(-(-recipe.mixed // recipe.batch))
    mixtures = torch.cat([views[:0], *(mix(views, generator) for _ in rounds)])[: recipe.mixed]
    if recipe.recolour:
        mixtures = recolour(mixtures, recipe.recolour, generator)
    shown = torch.cat([views, mixtures])
    word = torch.randint(len(data.word_tokens), (recipe.batch,), generator=generator, device=device)
    ids = torch.cat([data.tokens[index, choice], data.word_tokens[word]])
    sentences = torch.cat([data.sentences[index, choice], data.word_sentences[word]])
    with torch.no_grad(), autocast(device):
        seen = F.interpolate(
            shown, size=recipe.teacher_size, mode="bilinear", antialias=False
        ).contiguous(memory_format=torch.channels_last)
        features = networks.teacher(seen)
        teacher_images = teacher.pictures(features.float())
        teacher_texts = teacher.texts(sentences)
    with autocast(device):
        vision = networks.vision(F.avg_pool2d(shown, 2))
        language = networks.text(ids)
        images = F.normalize(model.visual_projection(vision).float(), dim=-1)
        texts = F.normalize(model.text_projection(language).float(), dim=-1)
        feature, sentence = heads["feature"](vision).float(), heads["sentence"](language).float()
    targets = soft_targets(
        data.groups[index], data.sentences[index, 0], recipe.soft_share, recipe.soft_sharpness
    )
    pairs = slice(0, recipe.batch)
    nce = contrast(images[pairs], texts[pairs], model.logit_scale.exp(), targets)
    return {
        "contrast": recipe.weight_contrast * nce,
        "picture": recipe.weight_picture * unlike(images, teacher_images),
        "feature": recipe.weight_feature * unlike(feature, features.float()),
        "text": recipe.weight_text * unlike(texts, teacher_texts),
        "sentence": recipe.weight_sentence * unlike(sentence, sentences),
    }


def drop_paths(model: Any, chance: float) -> None:
    """Stochastic depth of `model.vision_model` in training: samples go without a layer's change."""
    import torch

    def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
        if not module.training or chance == 0:
            return output
        first = output[0] if isinstance(output, tuple) else output
        before = inputs[0]
        keep = (torch.rand(len(first), 1, 1, device=first.device) >= chance).to(first.dtype)
        mixed = before + keep / (1 - chance) * (first - before)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    for layer in model.vision_model.encoder.layers:
        layer.register_forward_hook(hook)
