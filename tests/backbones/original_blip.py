"""The original BLIP code in small: its names of parameters, and its forward pass by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

WIDTH, HEADS, PATCH, SIDE, WORDS = 128, 2, 8, 4, 60
STOCK = {
    "retrieval": BlipForImageTextRetrieval,
    "vqa": BlipForQuestionAnswering,
    "caption": BlipForConditionalGeneration,
}
VISION = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
    "encoder.layers": "blocks",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.projection": "attn.proj",
    "self_attn.qkv": "attn.qkv",
}


def stock(kind, seed=0):
    """A small stock model whose every parameter is random, biases and norms too."""
    config = BlipConfig(
        text_config={
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 12,
        },
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "image_size": PATCH * SIDE,
            "patch_size": PATCH,
            "layer_norm_eps": 1e-6,
        },
        image_text_hidden_size=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = STOCK[kind](config).eval().requires_grad_(False)
        for p in model.parameters():
            p.copy_(0.2 * torch.randn_like(p) + (0.5 if p.dim() == 1 else 0))
    return model


def original(model, extras=True):
    """The state dict that the original code would have saved for this model."""
    state = {}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "vision_model":
            for new, old in VISION.items():
                rest = rest.replace(new, old)
            name = f"visual_encoder.{rest}"
        state[name] = value.clone()
    if extras:
        copies = {
            f"{part}_m.{rest}": torch.zeros_like(value)
            for name, value in state.items()
            for part, _, rest in [name.partition(".")]
            if part != "itm_head"
        }
        towers = [
            p for p in ("text_encoder", "text_decoder.bert") if f"{p}.embeddings" in str(state)
        ]
        ids = {f"{p}.embeddings.position_ids": torch.arange(12)[None] for p in towers}
        queues = {f"{n}_queue": torch.zeros(24, 8) for n in ("image", "text")}
        queues |= {"idx_queue": torch.full((1, 8), -100), "ptr_queue": torch.zeros(1).long()}
        state |= copies | ids | queues | {"temp": torch.tensor(0.03)}
    return state


def attention(x, source, q, k, v, bias=None):
    """[b, t, d]; q, k, v are (weight, bias) pairs."""

    def heads(y, weight):
        return F.linear(y, *weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    scores = heads(x, q) @ heads(source, k).mT / (WIDTH // HEADS) ** 0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ heads(source, v)).transpose(1, 2).flatten(2)


def vision(state, pixels):
    """The vision tower: attention by the fused qkv matrix, rows of q before k before v."""

    def of(name):
        return state[f"visual_encoder.{name}.weight"], state[f"visual_encoder.{name}.bias"]

    patches = F.conv2d(pixels, *of("patch_embed.proj"), stride=PATCH).flatten(2).mT
    first = state["visual_encoder.cls_token"].expand(len(pixels), -1, -1)
    x = torch.cat([first, patches], 1) + state["visual_encoder.pos_embed"]
    for i in range(2):
        y = F.layer_norm(x, (WIDTH,), *of(f"blocks.{i}.norm1"), eps=1e-6)
        weight, bias = of(f"blocks.{i}.attn.qkv")
        q, k, v = zip(weight.chunk(3), bias.chunk(3), strict=True)
        x = x + F.linear(attention(y, y, q, k, v), *of(f"blocks.{i}.attn.proj"))
        y = F.layer_norm(x, (WIDTH,), *of(f"blocks.{i}.norm2"), eps=1e-6)
        y = F.gelu(F.linear(y, *of(f"blocks.{i}.mlp.fc1")))
        x = x + F.linear(y, *of(f"blocks.{i}.mlp.fc2"))
    return F.layer_norm(x, (WIDTH,), *of("norm"), eps=1e-6)


def text(state, prefix, ids, image=None, causal=False):
    """A text tower: BERT with cross-attention between attention and MLP."""

    def of(name):
        return state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"]

    def added(x, y, name):
        return F.layer_norm(
            F.linear(y, *of(f"{name}.dense")) + x, (WIDTH,), *of(f"{name}.LayerNorm"), eps=1e-12
        )

    def attended(x, source, name, bias=None):
        q, k, v = (of(f"{name}.self.{part}") for part in ("query", "key", "value"))
        return added(x, attention(x, source, q, k, v, bias), f"{name}.output")

    words = state[f"{prefix}.embeddings.word_embeddings.weight"][ids]
    places = state[f"{prefix}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = F.layer_norm(words + places, (WIDTH,), *of("embeddings.LayerNorm"), eps=1e-12)
    later = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1) if causal else None
    for i in range(2):
        x = attended(x, x, f"encoder.layer.{i}.attention", later)
        if image is not None:
            x = attended(x, image, f"encoder.layer.{i}.crossattention")
        y = F.gelu(F.linear(x, *of(f"encoder.layer.{i}.intermediate.dense")))
        x = added(x, y, f"encoder.layer.{i}.output")
    return x


def logits(state, hidden):
    """The output layer of the decoder."""

    def of(name):
        return state[f"text_decoder.cls.predictions.{name}"]

    y = F.gelu(F.linear(hidden, of("transform.dense.weight"), of("transform.dense.bias")))
    norm = of("transform.LayerNorm.weight"), of("transform.LayerNorm.bias")
    y = F.layer_norm(y, (WIDTH,), *norm, eps=1e-12)
    return F.linear(y, of("decoder.weight"), of("decoder.bias"))
