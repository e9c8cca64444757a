"""The method x backbone matrix: a method is a row of METHODS, a backbone a row of BACKBONES."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY, CONTEXT, IMAGE = 60, 10, 32


def _open_clip(**changes: Any) -> nn.Module:
    from open_clip.model import CLIP, CustomTextCLIP

    vision = {"image_size": IMAGE, "patch_size": 16, "layers": 2, "width": 48, "head_width": 16}
    text = {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 32,
        "heads": 2,
        "layers": 2,
    }
    cls = CustomTextCLIP if changes.pop("custom", False) else CLIP
    return cls(24, vision | changes.pop("vision", {}), text | changes.pop("text", {}), **changes)


def open_clip_vit() -> nn.Module:
    return _open_clip()


def open_clip_fused() -> nn.Module:
    """open_clip's own attention with a bare in_proj_weight, query/key norms and head scales."""
    block = {"block_type": "custom", "qk_norm": True, "scale_heads": True, "scale_attn_inner": True}
    return _open_clip(vision=block, text=block, output_dict=True)


def open_clip_timm() -> nn.Module:
    """SigLIP's layout: a timm vision trunk with fused qkv, text in a tower of its own, a bias."""
    import timm

    model = _open_clip(custom=True, init_logit_bias=-10.0)
    trunk = timm.create_model(
        "vit_tiny_patch16_224", img_size=IMAGE, embed_dim=48, depth=2, num_heads=3, num_classes=24
    )
    model.visual = TimmVisual(trunk)
    return model


class TimmVisual(nn.Module):
    """The part of open_clip's TimmModel that matters: `trunk` and a forward through it."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)


def _towers() -> tuple[dict[str, int], dict[str, int]]:
    text = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": IMAGE,
        "patch_size": 16,
    }
    return text, vision


def hf_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text, vision = _towers()
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return CLIPModel(config)


def hf_siglip() -> nn.Module:
    """An MLP that is no multiple of the width, as in SigLIP so400m; one embedding size for both."""
    from transformers import SiglipConfig, SiglipModel

    text, vision = _towers()
    vision = vision | {"intermediate_size": 100}
    text = text | {"projection_size": 48}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "open_clip": open_clip_vit,
    "open_clip-fused": open_clip_fused,
    "open_clip-timm": open_clip_timm,
    "clip": hf_clip,
    "siglip": hf_siglip,
}
VISION, TEXT = 48, 32  # widths of the towers above; two layers each


def build(name: str, seed: int = 0) -> nn.Module:
    """A backbone with random weights, the same for the same seed, in eval mode, frozen.

    Frozen, since torch.matmul folds its operands differently where one requires a gradient, and a
    comparison bit for bit must not see that.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BACKBONES[name]().eval()
        with torch.no_grad():
            for p in model.parameters():  # zero-initialised biases would hide what is lost
                p.add_(0.02 * torch.randn_like(p))
    return model.requires_grad_(False)


def batch(seed: int = 0, size: int = 3) -> dict[str, torch.Tensor]:
    """Images and texts that end in the end-of-text token, unpadded."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY - 1, (size, CONTEXT), generator=g)
    ids[:, 0], ids[:, -1] = 1, VOCABULARY - 1
    return {"pixel_values": torch.randn(size, 3, IMAGE, IMAGE, generator=g), "input_ids": ids}


def _mlp(backbone: str) -> tuple[int, int]:
    return (100 if backbone == "siglip" else 4 * VISION), 4 * TEXT


def aurora_attention_count(backbone: str) -> int:
    r, projections = 4, 4 * 2
    return sum(2 * r * d + r + projections * r for d in (VISION, TEXT))


def aurora_whole_count(backbone: str) -> int:
    """q, k, v, out and the MLP; SigLIP's vision MLP is not cut: factors of its own shapes."""
    r = 4
    text = 2 * r * TEXT + r + 2 * (4 + 8) * r
    mlp, _ = _mlp(backbone)
    if mlp % VISION == 0:
        return text + 2 * r * VISION + r + 2 * (4 + 8) * r
    own = 2 * (r * (VISION + mlp) + r) + 2 * 2 * r
    return text + 2 * r * VISION + r + 2 * 4 * r + own


def aurora_dense_count(backbone: str) -> int:
    r_vision, r_text, r = 4, 2, 4
    shared = sum(2 * r * d + r**3 for d in (VISION, TEXT))
    return shared + 2 * 2 * r_vision + 2 * 2 * r_text


def aurora_interleaved_count(backbone: str) -> int:
    r = 4
    return 2 * r * TEXT + r**3 + 2 * 8 * r


def lora_count(backbone: str) -> int:
    r, layers = 4, 2
    attention = sum(2 * layers * r * 2 * d for d in (VISION, TEXT))
    mlp_v, mlp_t = _mlp(backbone)
    return attention + layers * r * ((VISION + mlp_v) + (TEXT + mlp_t))


@dataclass(frozen=True)
class MethodCase:
    """One row: a method, settings, and its trainable count in closed form."""

    method: str
    settings: dict[str, Any]
    count: Callable[[str], int]
    merges: bool = True
    backbones: tuple[str, ...] = field(default=tuple(BACKBONES))


EVERY = ["q", "k", "v", "out", "fc1", "fc2"]
METHODS: dict[str, MethodCase] = {
    "aurora": MethodCase("aurora", {"rank": 4}, aurora_attention_count),
    "aurora-mlp": MethodCase("aurora", {"rank": 4, "sites": EVERY}, aurora_whole_count),
    "aurora-materialise": MethodCase(
        "aurora", {"rank": 4, "sites": EVERY, "compute": "materialise"}, aurora_whole_count
    ),
    "aurora-dense-per-branch-rank": MethodCase(
        "aurora",
        {"rank": 4, "core": "dense", "sites": ["q", "v"], "branch_ranks": {"text": 2}},
        aurora_dense_count,
    ),
    "aurora-interleaved": MethodCase(
        "aurora",
        {
            "rank": 4,
            "core": "dense",
            "block_layout": "interleaved",
            "sites": {"text": ["fc1", "fc2"]},
        },
        aurora_interleaved_count,
    ),
    "lora": MethodCase("lora", {"rank": 4, "sites": ["q", "v", "fc1"]}, lora_count),
}
PAIRS = [(m, b) for m, case in METHODS.items() for b in case.backbones]
