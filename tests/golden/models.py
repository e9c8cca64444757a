"""Stock BLIP with the golden weights, and the shipped tuner on it with the golden factors."""

import peft
import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from mmtune import AuroraConfig
from mmtune.backbones import backbone_of
from mmtune.tuners.aurora.factors import ModeFactors

from .draws import D, Draws

HEADS, IMAGE, PATCH, VOCABULARY, POSITIONS = 12, 32, 16, 40, 16
SITES = {
    "vision": ["q", "k", "v", "out", "fc1", "fc2"],
    "text": ["q", "k", "v"],
    "fusion": ["cross_q", "cross_k", "cross_v"],
}
GATES = ("scale_self", "shift_self", "scale_cross", "shift_cross")


def blip(ffn: int = 8, layers: int = 1) -> BlipForImageTextRetrieval:
    """Both towers as wide as the reference's; the vision tower's MLP is four times as wide."""
    text = {
        "hidden_size": D,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "sep_token_id": 2,
    }
    vision = {
        "hidden_size": D,
        "intermediate_size": 4 * D,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "layer_norm_eps": 1e-6,
    }
    return BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision))


def _named(draws: Draws, names: dict[str, str], ends: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Module -> stem of its drawn tensors, as a state dict."""
    return {
        f"{module}.{key}": draws[f"{stem}_{end}"]
        for module, stem in names.items()
        for key, end in zip(("weight", "bias"), ends, strict=True)
    }


def vision_attention(draws: Draws, prefix: str = "") -> dict[str, torch.Tensor]:
    return _named(draws, {"qkv": f"{prefix}qkv", "projection": f"{prefix}proj"}, ("w", "b"))


def vision_mlp(draws: Draws, prefix: str = "") -> dict[str, torch.Tensor]:
    return _named(draws, {"fc1": f"{prefix}fc1", "fc2": f"{prefix}fc2"}, ("w", "b"))


def vision_layer(draws: Draws, prefix: str) -> dict[str, torch.Tensor]:
    norms = {f"layer_norm{i}": f"{prefix}ln{i}" for i in (1, 2)}
    return {
        **{f"self_attn.{k}": v for k, v in vision_attention(draws, prefix).items()},
        **{f"mlp.{k}": v for k, v in vision_mlp(draws, prefix).items()},
        **_named(draws, norms, ("g", "b")),
    }


def text_layer(draws: Draws, prefix: str = "", cross: bool = True) -> dict[str, torch.Tensor]:
    linears = {"intermediate.dense": f"{prefix}ffn1", "output.dense": f"{prefix}ffn2"}
    norms = {"output.LayerNorm": f"{prefix}ffn_ln"}
    parts = {"attention": "self", **({"crossattention": "cross"} if cross else {})}
    for module, part in parts.items():
        names = {"self.query": "q", "self.key": "k", "self.value": "v", "output.dense": "o"}
        linears |= {f"{module}.{name}": f"{prefix}{part}.{c}" for name, c in names.items()}
        norms[f"{module}.output.LayerNorm"] = f"{prefix}{part}.ln"
    return _named(draws, linears, ("w", "b")) | _named(draws, norms, ("g", "b"))


def towers(draws: Draws, layers: int) -> dict[str, torch.Tensor]:
    """Of the whole model but its three heads."""
    vision, text = "vision_model", "text_encoder"
    state = {
        f"{vision}.embeddings.class_embedding": draws["vis.cls"],
        f"{vision}.embeddings.position_embedding": draws["vis.pos"],
        f"{text}.embeddings.word_embeddings.weight": draws["txt.word"],
        f"{text}.embeddings.position_embeddings.weight": draws["txt.pos"],
    }
    state |= _named(draws, {f"{vision}.embeddings.patch_embedding": "vis.patch"}, ("w", "b"))
    norms = {f"{vision}.post_layernorm": "vis.ln", f"{text}.embeddings.LayerNorm": "txt.emb_ln"}
    state |= _named(draws, norms, ("g", "b"))
    for i in range(layers):
        own = vision_layer(draws, f"vis.{i}.")
        state |= {f"{vision}.encoder.layers.{i}.{k}": v for k, v in own.items()}
        own = text_layer(draws, f"txt.{i}.")
        state |= {f"{text}.encoder.layer.{i}.{k}": v for k, v in own.items()}
    return state


def fill(module: torch.nn.Module, state: dict[str, torch.Tensor], absent: tuple[str, ...] = ()):
    """Give a module all of its weights, but those whose names begin with one of `absent`."""
    result = module.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert [k for k in result.missing_keys if not k.startswith(absent)] == []


def adapt(model, draws: Draws, sites: dict[str, list[str]], **settings):
    """Adapt the model with the reference's settings and its drawn factors: (PeftModel, factors)."""
    diagonal = "lam" in draws.drawn
    backbone_of(model).prepare()
    config = AuroraConfig(
        rank=draws.number("R"),
        core="diagonal" if diagonal else "dense",
        block_layout="plain" if diagonal else "interleaved",
        sites=sites,
        **({"gate": "off", "context": "off"} | settings),
    )
    wrapped = peft.get_peft_model(model, config)
    factors = next(m for m in model.modules() if isinstance(m, ModeFactors))
    groups = (factors.aurora_U, factors.aurora_V, factors.aurora_core)
    drawn = (draws["U"], draws["V"], draws["lam" if diagonal else "core"])
    for group, value in zip(groups, drawn, strict=True):
        assert list(group["default"]) == [f"{D}x{D}"]
        group["default"][f"{D}x{D}"].data = value.clone()
    return wrapped.eval(), factors


def places(model, branch: str, layer: int) -> dict:
    """Role -> the adapted Linear."""
    chosen = backbone_of(model).select([branch], SITES[branch], [layer])
    return {site.role: site.module for site in chosen}


def gate(model, layer: int):
    return model.get_submodule(f"mode_fusion_fusion_{layer}").aurora_gate["default"]


def set_text_layer(model, draws: Draws, layer: int = 0, prefix: str = "", cross: bool = True):
    """Draw the mode vectors and the gate of one text layer into it."""
    for branch, part in (("text", "self"), *((("fusion", "cross"),) if cross else ())):
        for role, linear in places(model, branch, layer).items():
            set_modes(linear, draws[f"{prefix}{part}.p_{role[-1]}"][:, None])
    for name in GATES:
        getattr(gate(model, layer), name).data = draws[f"{prefix}{name}"].clone()


def set_modes(linear, values):
    """`values` [R, m]: one column a block."""
    assert linear.aurora_modes["default"].shape == values.T.shape
    linear.aurora_modes["default"].data = values.T.contiguous().clone()


def modes_grad(*linears):
    """[R, m] gradient of the mode vectors of several projections, in order."""
    return torch.cat([x.aurora_modes["default"].grad for x in linears]).T
