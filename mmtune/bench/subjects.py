"""The models on which training steps are measured, with something to train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmtune.backbones.base import Backbone, Loaded

Loss = Callable[["nn.Module", Mapping[str, "Tensor"]], "Tensor"]
ANSWER = 8  # tokens of an answer, for models that write


@dataclass(frozen=True)
class Subject:
    """A model at its full size with random weights, or one of the zoo's.

    Attributes:
        model: what `mmtune.backbones.loading.load` takes.
        batch: samples of a step unless told otherwise.
        summary: one line.
    """

    model: str
    batch: int
    summary: str


SUBJECTS = {
    "clip-l-14": Subject("hf:random:clip-vit-large-patch14", 128, "CLIP ViT-L/14, transformers"),
    "clip-b-16": Subject("hf:random:clip-vit-base-patch16", 128, "CLIP ViT-B/16, transformers"),
    "blip-base": Subject("hf:random:blip-itm-base-coco", 32, "BLIP base, 384 px"),
    "open_clip-b-16": Subject("open_clip:ViT-B-16", 128, "open_clip ViT-B/16"),
    "open_clip-l-14": Subject("open_clip:ViT-L-14", 128, "open_clip ViT-L/14"),
    "llava-7b": Subject("llava-7b", 4, "LLaVA-1.5's layout, 7B, 336 px, 32 words"),
    "tiny-clip": Subject("zoo:tiny-clip@hf", 32, "the zoo's CLIP, transformers"),
    "tiny-open_clip": Subject("zoo:tiny-clip", 32, "the zoo's CLIP, open_clip"),
    "tiny-blip": Subject("zoo:tiny-blip", 16, "the zoo's BLIP"),
}


@dataclass(frozen=True)
class Bench:
    """A subject that is ready: what it computes in a step.

    Attributes:
        stock: the model, never trained itself.
        inputs: of every step.
        loss: (model, inputs) -> scalar.
    """

    stock: nn.Module
    inputs: Mapping[str, Tensor]
    loss: Loss


def ready(name: str, batch: int, dtype: torch.dtype, device: torch.device, seed: int) -> Bench:
    """Load a subject and draw its inputs.

    Args:
        name: one of `SUBJECTS`.
        batch: samples.
        dtype: of weights and pixels.
        device: where they are.
        seed: of weights and inputs.
    """
    import torch

    torch.manual_seed(seed)
    if name == "llava-7b":
        return _llava(batch, dtype, device)
    from mmtune.backbones.loading import load

    loaded = load(SUBJECTS[name].model)
    model = loaded.model.to(device, dtype)
    inputs = {key: value.to(device) for key, value in _pairs(loaded, batch).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return Bench(model, inputs, _contrast)


def _pairs(loaded: Loaded, batch: int) -> dict[str, Tensor]:
    import torch

    from mmtune.backbones.architectures import WORDS

    size = loaded.image.size
    texts = [" ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(12)) for i in range(batch)]
    return {"pixel_values": torch.randn(batch, 3, size, size), **loaded.tokenize(texts)}


def _contrast(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    import torch
    import torch.nn.functional as F

    pairs = view_of(model).embed_pairs(model, inputs)
    logits = pairs.scale * pairs.image.float() @ pairs.text.float().T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _llava(batch: int, dtype: torch.dtype, device: torch.device) -> Bench:
    import torch

    from mmtune.bench.random_llava import Size, model_of

    size = Size(dtype=str(dtype).removeprefix("torch."), device=str(device))
    model: Any = model_of(size).model
    images, words = (size.image // size.patch) ** 2, 32 + ANSWER
    ids = torch.randint(1000, size.vocabulary - 1, (batch, images + words), device=device)
    ids[:, :images] = size.vocabulary - 1
    labels = ids.masked_fill(torch.arange(images + words, device=device) < images + 32, -100)
    pixels = torch.randn(batch, 3, size.image, size.image, device=device, dtype=dtype)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels, "labels": labels,
    }  # fmt: skip
    return Bench(model.train(), inputs, lambda model, inputs: model(**inputs).loss)


def view_of(model: nn.Module) -> Backbone:
    """The backbone of a model that may be wrapped by PEFT and torch.compile."""
    from mmtune.backbones import backbone_of

    inner: Any = getattr(model, "_orig_mod", model)
    return backbone_of(inner.get_base_model() if hasattr(inner, "get_base_model") else inner)
