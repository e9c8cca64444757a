"""Tiny multimodal language models to be edited, and pictures to ask about."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import LlavaOnevisionImageProcessorPil, Qwen2VLImageProcessorPil

from editing.changes import Delta, LowRank, Replacement
from editing.mllm import MLLM
from editing.requests import EditRequest, Probe
from editing.weight_edits import WeightEdit
from mmtune.backbones.base import ImageSpec, Loaded
from mmtune.backbones.language import language_sites
from mmtune.conformance.mllms import PINPOINTS
from mmtune.data.records import ImageBytes
from tests.backbones.writers import writer

MODELS = ("blip2-opt", "blip2-t5", "llava")
# Families whose images stand elsewhere, or keep their size; what is generic runs over them as well.
SIZED = ("llava-onevision", "qwen2.5-vl", "qwen3-vl")
NEWER = ("minigpt4", *SIZED)
SPEC = ImageSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


LISTENS = {"blip2-t5": 4.0}  # how much stronger attention is made; 10 in other models
ATTENTION = {f"{cross}{role}" for cross in ("", "cross_") for role in ("q", "k", "v", "out")}


def stock(name):
    """(model, its view, tokenizer) whose words depend on the image as those of a trained model do.

    A random language model hardly attends, and T5's random head echoes what it reads.
    """
    model, view, tokenizer = writer(name, prepare=False)
    if name == "blip2-t5":
        head = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
        model.language_model.lm_head.weight = nn.Parameter(head)
    if not name.startswith("blip-"):
        path = "model.language_model" if hasattr(model, "lm_head") else "language_model"
        for site in language_sites(model, path):
            if site.role in ATTENTION:
                site.module.weight.data.mul_(LISTENS.get(name, 10.0))
    return model, view, tokenizer


def processor(name):
    """The stock image processor of a family that reads images of several sizes; else None."""
    if name == "llava-onevision":
        size = {"height": 32, "width": 32}
        return LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS)
    if name in SIZED:
        size = {"shortest_edge": 64, "longest_edge": 1024}  # pixels in all
        return Qwen2VLImageProcessorPil(patch_size=4, size=size)
    return None


def tiny(name, dtype=torch.float32, **options):
    model, view, tokenizer = stock(name)
    loaded = Loaded(
        model=model.to(dtype),
        backbone=view,
        image=SPEC,
        tokenize=lambda texts: {},
        context_length=64,
        name=f"tiny {name}",
        count_tokens=len,
        tokenizer=tokenizer,
        processor=processor(name),
    )
    return MLLM(loaded, **options)


def picture(seed, height=32, width=32):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return ImageBytes(file.getvalue())


SEEN = Probe("w5 w9 w7 w8", "w20 w21", picture(0))
OTHER = Probe("w6 w4", "w22", picture(1))
BARE = Probe("w10 w11 w12", "w23 w24 w25")
CAPTION = Probe("", "w26", picture(2))
WIDE = Probe("w13 w14", "w29", picture(3, 20, 44))
PROBES = (SEEN, BARE, OTHER, CAPTION, Probe("w9", "w27 w28"))
REQUEST = EditRequest(SEEN.question, "w40 w41", SEEN.image, id="r0")
SECOND = EditRequest(OTHER.question, "w42", OTHER.image, id="r1")


def bits(model):
    """Every parameter and buffer, as bytes."""
    return {n: t.detach().view(-1).view(torch.uint8).clone() for n, t in model.state_dict().items()}


def same_bits(model, before):
    now = bits(model)
    return list(now) == list(before) and all(torch.equal(now[n], before[n]) for n in now)


def paths(mllm):
    sites = mllm.backbone.select(["vision", "language"], ["fc1", "fc2"], "last:1")
    return [f"{site.path}.weight" for site in sites]


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(mllm, seed=0, count=4):
    """A change of each form, large enough to be seen."""
    changes = {}
    for i, path in enumerate(paths(mllm)[-count:]):
        rows, columns = mllm.model.get_parameter(path).shape
        changes[path] = (
            Delta(drawn((rows, columns), seed + i)),
            LowRank(drawn((rows, 2), seed + i), drawn((2, columns), seed + i + 9)),
            Replacement(drawn((rows, columns), seed + i)),
            Delta(drawn((rows, columns), seed + i)),
        )[i]
    return WeightEdit.of(mllm, changes, {"seed": seed})
