"""One set of CLIP weights in two stock layouts: open_clip's CLIP and transformers' CLIPModel.

Both classes compute the same function when open_clip uses `nn.GELU` ("gelu" in transformers), no
layer scale and argmax pooling; what differs is names, the fused q, k, v matrix of open_clip, and
two transposed projections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPConfig

# open_clip name -> transformers name, where a rename is all there is.
_PLAIN = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWERS = {"transformer.resblocks": "text_model.encoder.layers"} | {
    "visual.transformer.resblocks": "vision_model.encoder.layers"
}
_QKV = ("q_proj", "k_proj", "v_proj")


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformers CLIPModel state dict -> an open_clip CLIP state dict.

    Raises:
        KeyError: a name that no stock CLIPModel has.
    """
    import torch

    source = {name: t for name, t in state.items() if not name.endswith("position_ids")}
    result = {new: source.pop(old) for new, old in _PLAIN.items()}
    result |= {new: source.pop(old).T.contiguous() for new, old in _TRANSPOSED.items()}
    layer_names = {new: old for old, new in _LAYER.items()}
    tower_names = {new: old for old, new in _TOWERS.items()}
    for name in list(source):
        tower, index, part, kind = _layer_parts(name, tower_names)
        block = f"{tower_names[tower]}.{index}"
        if part == "self_attn.q_proj":
            fused = [source.pop(f"{tower}.{index}.self_attn.{p}.{kind}") for p in _QKV]
            result[f"{block}.attn.in_proj_{kind}"] = torch.cat(fused)
        elif part in layer_names:
            result[f"{block}.{layer_names[part]}.{kind}"] = source.pop(name)
    if source:
        raise KeyError(f"no open_clip name for {sorted(source)[:4]}: expected a stock CLIPModel")
    return result


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip CLIP state dict -> a transformers CLIPModel state dict.

    Raises:
        KeyError: a name that open_clip's plain CLIP does not have.
    """
    source = {name: t for name, t in state.items() if name != "attn_mask"}
    result = {new: source.pop(old) for old, new in _PLAIN.items()}
    result |= {new: source.pop(old).T.contiguous() for old, new in _TRANSPOSED.items()}
    for name in list(source):
        tower, index, part, kind = _layer_parts(name, _TOWERS)
        block = f"{_TOWERS[tower]}.{index}"
        if part == "attn" and kind.startswith("in_proj_"):
            pieces = source.pop(name).chunk(3)
            for projection, piece in zip(_QKV, pieces, strict=True):
                suffix = kind.removeprefix("in_proj_")
                result[f"{block}.self_attn.{projection}.{suffix}"] = piece.clone()
        elif part in _LAYER:
            result[f"{block}.{_LAYER[part]}.{kind}"] = source.pop(name)
    if source:
        raise KeyError(f"no CLIPModel name for {sorted(source)[:4]}: expected open_clip's CLIP")
    return result


def _layer_parts(name: str, towers: Mapping[str, str]) -> tuple[str, str, str, str]:
    """`<tower>.<index>.<part>.<kind>` taken apart; KeyError where it is none of `towers`."""
    found = re.fullmatch(r"(.+?)\.(\d+)\.(.+)\.([^.]+)", name)
    if found is None or found.group(1) not in towers:
        raise KeyError(f"{name!r} is not in a tower of a stock CLIP ({', '.join(towers)})")
    tower, index, part, kind = found.groups()
    return tower, index, part, kind


def open_clip_config(config: CLIPConfig, mean: float, std: float) -> dict[str, Any]:
    """What goes into open_clip_config.json for a CLIPModel of this config.

    Args:
        config: with hidden_act "gelu", mlp ratio 4 and the end of text as the highest token id.
        mean: of each channel, in [0, 1] units.
        std: likewise.
    """
    text: Any = config.text_config
    vision: Any = config.vision_config
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": False,
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "mlp_ratio": text.intermediate_size / text.hidden_size,
                "hf_tokenizer_name": "tiny-clip",
                "tokenizer_kwargs": {},
            },
        },
        "preprocess_cfg": {
            "mean": [mean] * 3,
            "std": [std] * 3,
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


def hf_config(model_cfg: Mapping[str, Any], pad_token_id: int) -> CLIPConfig:
    """The CLIPModel config that computes what open_clip's `model_cfg` computes.

    Args:
        model_cfg: the `model_cfg` of an open_clip_config.json of the plain CLIP family.
        pad_token_id: the tokenizer's.

    Raises:
        ValueError: the config uses a feature that CLIPModel does not have.
    """
    from transformers import CLIPConfig

    text, vision = model_cfg["text_cfg"], model_cfg["vision_cfg"]
    foreign = [k for k in ("timm_model_name", "attentional_pool", "ls_init_value") if vision.get(k)]
    foreign += [k for k in ("hf_model_name", "embed_cls", "no_causal_mask") if text.get(k)]
    if foreign:
        raise ValueError(f"CLIPModel has no {', '.join(foreign)}; expected a plain open_clip CLIP")
    activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    embed = model_cfg["embed_dim"]
    return CLIPConfig(
        projection_dim=embed,
        text_config={
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "hidden_act": activation,
            "projection_dim": embed,
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": pad_token_id,
        },
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": activation,
            "projection_dim": embed,
        },
    )
