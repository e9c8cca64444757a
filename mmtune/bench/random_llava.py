"""A LLaVA of any size with random weights, and made-up records to edit and to ask it about."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from editing.mllm import MLLM
from editing.requests import EditRecord, EditRequest, Probe
from mmtune.backbones import backbone_of
from mmtune.backbones.architectures import FIRST_WORD, MEAN, STD, WORDS, Architecture
from mmtune.backbones.base import ImageSpec, Loaded
from mmtune.data.records import ImageBytes


@dataclass(frozen=True)
class Size:
    """Of the model, and of what is measured; the defaults are LLaVA-1.5-7B's.

    Attributes:
        layers, width, mlp, heads, kv_heads, vocabulary: of the language model, a Llama.
        vision_layers, vision_width, vision_mlp, vision_heads: of the vision tower, a CLIP.
        image, patch: pixels along their edges.
        dtype: of the weights.
        device: where it runs.
        records: to be evaluated.
        whole: how many of them are evaluated with what is written, too.
        written: tokens of each answer there.
        runs: of each edit step.
        steps: of a whole edit by fine-tuning.
        seed: of what is drawn.
    """

    layers: int = 32
    width: int = 4096
    mlp: int = 11008
    heads: int = 32
    kv_heads: int = 32
    vocabulary: int = 32064
    vision_layers: int = 24
    vision_width: int = 1024
    vision_mlp: int = 4096
    vision_heads: int = 16
    image: int = 336
    patch: int = 14
    dtype: str = "bfloat16"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    records: int = 16
    whole: int = 4
    written: int = 10
    runs: int = 20
    steps: int = 10
    seed: int = 0


def _config(size: Size) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image,
        patch_size=size.patch,
    )
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=4096,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=size.vocabulary - 1,
        image_seq_length=(size.image // size.patch) ** 2,
        architectures=["LlavaForConditionalGeneration"],
    )


def model_of(size: Size) -> MLLM:
    """A LLaVA with random weights and stand-in words."""
    made = Architecture(
        partial(_config, size),
        ImageSpec(size.image, MEAN, STD),
        {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<image>": size.vocabulary - 1},
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        "<s> $A",
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with torch.device(size.device):
            model = made.model()
    finally:
        torch.set_default_dtype(default)
    loaded = Loaded(
        model=model,
        backbone=backbone_of(model),
        image=made.image,
        tokenize=lambda texts: {},
        context_length=4096,
        name="random LLaVA",
        count_tokens=len,
        tokenizer=made.tokenizer(),
    )
    return MLLM(loaded)


def records_of(size: Size) -> list[EditRecord]:
    """Made-up records: seven probes each, three images and a question without one."""
    drawn = np.random.default_rng(size.seed)
    words = WORDS[: size.vocabulary - 1 - FIRST_WORD]

    def text(low: int, high: int) -> str:
        return " ".join(drawn.choice(words, drawn.integers(low, high + 1)))

    def picture() -> ImageBytes:
        shape = (size.image, size.image, 3)
        file = io.BytesIO()
        Image.fromarray(drawn.integers(0, 256, shape, dtype=np.uint8)).save(file, "PNG")
        return ImageBytes(file.getvalue())

    def record(number: int) -> EditRecord:
        image, other, third = picture(), picture(), picture()
        question, target = text(6, 12), text(1, 3)
        return EditRecord(
            EditRequest(question, target, image, str(number)),
            text_generality=(Probe(text(6, 12), target, image),),
            image_generality=(Probe(question, target, other),),
            text_locality=(Probe(text(6, 12), text(1, 4)),),
            image_locality=(Probe(text(6, 12), text(1, 3), third),),
            portability=(Probe(text(8, 14), text(1, 3), image), Probe(text(8, 14), "man", image)),
        )

    return [record(number) for number in range(size.records)]


def probes_of(record: EditRecord) -> list[Probe]:
    """All that a record asks."""
    asked = record.request
    kinds = ("text_generality", "image_generality", "text_locality", "image_locality")
    probes = [Probe(asked.question, asked.target, asked.image)]
    for kind in (*kinds, "portability"):
        probes += getattr(record, kind)
    return probes
