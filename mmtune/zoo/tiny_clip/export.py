"""Embed, score and write the trained model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.runs import write_tensors, write_text
from mmtune.zoo.tiny_clip.teachers import sentence_embeddings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmtune.zoo.tiny_clip.material import Pictures
    from mmtune.zoo.tiny_clip.recipe import Recipe
    from mmtune.zoo.tiny_clip.teachers import JointTeacher


def embed_pictures(
    pictures: Pictures, size: int, device: torch.device, encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Unit vectors of a split's pictures as the shipped preprocessing shows them: [n, e]."""
    import torch
    from torch.nn import functional as F

    found = []
    for start in range(0, len(pictures.pixels), 256):
        batch = pictures.pixels[start : start + 256].to(device).float()
        batch = F.interpolate(batch, size=size, mode="bicubic", antialias=True).clamp(0, 255)
        found.append(F.normalize(encode(batch / 127.5 - 1).float(), dim=-1).cpu())
    return torch.cat(found)


def score(images: Tensor, texts: Tensor, groups: Sequence[int]) -> dict[str, dict[str, float]]:
    """R@1, 5 and 10 both ways, with intervals; all pairs of one text are right for each other.

    Args:
        images: unit vectors; pair i belongs to text `groups[i]`.
        texts: unit vectors.
        groups: n numbers.

    Returns:
        {"txt2img R@1": {"value", "low", "high", "n"}, ...}, in percent.

    Shape:
        images, texts [n, e].
    """
    similarity = images.float().cpu() @ texts.float().cpu().T
    return recalls(similarity.T, similarity, groups)


def recalls(txt2img: Tensor, img2txt: Tensor, groups: Sequence[int]) -> dict[str, dict[str, float]]:
    """As `score`, of scores that are there already.

    Args:
        txt2img: of every text (row) with every image.
        img2txt: of every image (row) with every text.
        groups: n numbers, of the texts.

    Shape:
        txt2img, img2txt [n, n].
    """
    import numpy as np

    from mmtune.metrics.recall import RetrievalRanks, rank_queries, retrieval_metrics

    members: dict[int, list[int]] = {}
    for pair, group in enumerate(groups):
        members.setdefault(group, []).append(pair)
    right = [members[group] for group in groups]
    ranks = RetrievalRanks(
        txt2img=rank_queries(txt2img, right),
        img2txt=rank_queries(img2txt, right),
        owner=np.arange(len(right)),
    )
    found = retrieval_metrics(ranks)
    return {
        name: {
            "value": round(metric.value, 2),
            "low": round(metric.low, 2),
            "high": round(metric.high, 2),
            "n": metric.n,
        }
        for name, metric in found.items()
        if name.startswith(("txt2img R", "img2txt R"))
    }


def score_pupil(model: Any, held: Pictures, tokenizer: Path) -> dict[str, Any]:
    """Recall of a CLIPModel on a split, from its captions.

    Args:
        model: its vision tower's image size is the size of the pictures.
        held: the split.
        tokenizer: folder of its tokenizer.
    """
    import torch
    from torch.nn import functional as F
    from transformers import CLIPTokenizer

    device = next(model.parameters()).device
    tokens = CLIPTokenizer.from_pretrained(str(tokenizer))(
        [row["caption"] for row in held.rows],
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
    ).input_ids.to(device)

    def encode(batch: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=batch).pooler_output)

    with torch.no_grad():
        texts = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
        images = embed_pictures(held, model.config.vision_config.image_size, device, encode)
    return score(images, F.normalize(texts.float(), dim=-1).cpu(), held.groups)


def score_teacher(
    recipe: Recipe, teacher: JointTeacher, folder: Path, held: Pictures, device: torch.device
) -> dict[str, Any]:
    """Recall of the joint teacher on a split."""
    import torch

    sentences = sentence_embeddings(folder, [row["caption"] for row in held.rows], device)
    with torch.no_grad():
        images = embed_pictures(
            held, recipe.teacher_size, device, lambda b: teacher.pictures(teacher.features(b))
        )
        return score(images, teacher.texts(sentences.to(device)).cpu(), held.groups)


def export(model: Any, out: Path) -> None:
    """Write open_clip_config.json and open_clip_model.safetensors (fp16) beside the tokenizer."""
    from mmtune.zoo.conversion import open_clip_config, to_open_clip

    state = {name: t.half().cpu().contiguous() for name, t in model.state_dict().items()}
    write_tensors(out / "open_clip_model.safetensors", to_open_clip(state), {"format": "pt"})
    write_json(open_clip_config(model.config, 0.5, 0.5), out / "open_clip_config.json")


def write_json(value: Any, path: Path) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(value, indent=1) + "\n")
