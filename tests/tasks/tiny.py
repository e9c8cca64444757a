"""A tiny random CLIPModel with a tokenizer of words, and a small set of coloured pictures."""

from __future__ import annotations

import json

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from mmtune.backbones import backbone_of
from mmtune.backbones.base import ImageSpec, Loaded
from mmtune.data import DataOptions, SourceOptions

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (30, 40, 220), "grey": (128,) * 3}
SHADES = {"dark": 0.4, "light": 1.0}
LENGTH = 8


def tiny_model(seed=0):
    torch.manual_seed(seed)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        **tower,
        "vocab_size": 64,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    vision = {**tower, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return CLIPModel(config).eval()


def tiny_loaded(seed=0):
    return with_words(tiny_model(seed), 16, LENGTH, begin=0, end=1, pad=2)


def with_words(model, size, length, begin, end, pad):
    """The model with a tokenizer that numbers words from 3 on, in the order it meets them."""
    words: dict[str, int] = {}

    def ids(text):
        return [begin, *(3 + words.setdefault(w, len(words)) for w in text.lower().split()), end]

    def tokenize(texts):
        rows = [ids(t) for t in texts]
        rows = [r if len(r) <= length else [*r[: length - 1], end] for r in rows]
        width = max(map(len, rows))
        table = torch.full((len(rows), width), pad, dtype=torch.int64)
        for row, tokens in zip(table, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return {"input_ids": table, "attention_mask": (table != pad).long()}

    return Loaded(
        model=model,
        backbone=backbone_of(model),
        image=ImageSpec(size, (0.5,) * 3, (0.5,) * 3),
        tokenize=tokenize,
        context_length=length,
        name="tiny",
        count_tokens=lambda text: len(ids(text)),
    )


def colour_data(folder, captions=None, on_error="raise"):
    """Eight one-coloured pictures, two captions each, as train and test."""
    entries = []
    for colour, rgb in COLOURS.items():
        for shade, factor in SHADES.items():
            name = f"{shade}-{colour}.png"
            pixels = tuple(int(c * factor) for c in rgb)
            Image.new("RGB", (20, 18), pixels).save(folder / name)
            own = [f"a {shade} {colour} square", f"{colour} and {shade}"]
            entries.append({"image": name, "caption": own if captions is None else captions(name)})
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    source = SourceOptions("blip", str(path))
    return DataOptions(train=source, test=source, on_error=on_error)
