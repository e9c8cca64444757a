"""Tiny stock models with random weights, one of every family and layout that is claimed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mmtune.conformance import mllms

if TYPE_CHECKING:
    from mmtune.backbones.base import Backbone

VOCABULARY, CONTEXT, IMAGE = 60, 10, 32


ATTENTION = ("q", "k", "v", "out")
CROSS = ("cross_q", "cross_k", "cross_v", "cross_out")


@dataclass(frozen=True)
class Tower:
    """The sizes of a branch, from which parameter counts follow.

    Attributes:
        layers: transformer layers.
        width: d.
        mlp: inner width of the MLP; 0 means the branch has none of its own.
        norms: LayerNorms with a bias in the whole branch.
        kv: output width of k and v; 0 means d.
        source: input width of the cross-attention's k and v; 0 means d.
        roles: of the Linears in each layer.
        biases: whether those Linears have biases; or which of them.
        crossed: layers with cross-attention, where those are fewer than `roles` could say (T5).
        trunk: whether virtual tokens can enter.
    """

    layers: int
    width: int
    mlp: int
    norms: int
    kv: int = 0
    source: int = 0
    roles: tuple[str, ...] = (*ATTENTION, "fc1", "fc2")
    biases: bool | tuple[str, ...] = True
    crossed: int = 0
    trunk: bool = True

    def attentions(self) -> list[int]:
        """The width of the keys of every attention, self and cross."""
        own = self.layers if "k" in self.roles else 0
        crossed = self.crossed or (self.layers if "cross_k" in self.roles else 0)
        return own * [self.kv or self.width] + crossed * [self.width]

    def linears(self) -> dict[str, tuple[int, int]]:
        """Role -> (out, in) of the Linears in one layer."""
        d, kv, source = self.width, self.kv or self.width, self.source or self.width
        sizes = dict.fromkeys(("q", "out", "cross_q", "cross_out"), (d, d))
        sizes |= {"k": (kv, d), "v": (kv, d), "cross_k": (kv, source), "cross_v": (kv, source)}
        sizes |= {"gate": (self.mlp, d), "fc1": (self.mlp, d), "fc2": (d, self.mlp)}
        return {role: sizes[role] for role in self.roles}


@dataclass(frozen=True)
class BackboneCase:
    """One backbone of the matrix.

    Attributes:
        make: the stock model with random weights.
        towers: branch -> sizes.
        batch: (seed, size) -> inputs on the CPU.
        outputs: (model, view, batch) -> what a method must change or leave alone: [n, ...]; the
            first axis has something of every sample.
    """

    make: Callable[[], nn.Module]
    towers: Mapping[str, Tower]
    batch: Callable[[int, int], dict[str, Tensor]]
    outputs: Callable[[nn.Module, Backbone, Mapping[str, Tensor]], Tensor]


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
    """CLIP of open_clip with nn.MultiheadAttention in both towers."""
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
        cast(Any, self.trunk).set_grad_checkpointing(enable)


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


def clip() -> nn.Module:
    """CLIPModel of transformers."""
    from transformers import CLIPConfig, CLIPModel

    text, vision = _towers()
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return CLIPModel(config)


def siglip() -> nn.Module:
    """An MLP that is no multiple of the width, as in SigLIP so400m; one embedding size for both."""
    from transformers import SiglipConfig, SiglipModel

    text, vision = _towers()
    vision = vision | {"intermediate_size": 100}
    text = text | {"projection_size": 48}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def _blip(kind: str, **text_changes: Any) -> nn.Module:
    import transformers

    text, vision = _towers()
    # BLIP draws its vision tower next to zero, and tiny layers would drown the image in the rest.
    vision = vision | {"initializer_range": 0.2}
    text = text | {"initializer_range": 0.2, "sep_token_id": VOCABULARY - 1} | text_changes
    config = transformers.BlipConfig(
        text_config=text, vision_config=vision, image_text_hidden_size=24
    )
    return getattr(transformers, kind)(config)


def blip_retrieval() -> nn.Module:
    """BlipForImageTextRetrieval of transformers."""
    return _blip("BlipForImageTextRetrieval")


def blip_vqa() -> nn.Module:
    """BlipForQuestionAnswering; its decoder reads the question as wide as the encoder the image."""
    return _blip("BlipForQuestionAnswering", hidden_size=48, num_attention_heads=3)


def blip_caption() -> nn.Module:
    """BlipForConditionalGeneration of transformers."""
    return _blip("BlipForConditionalGeneration")


def images_and_texts(seed: int, size: int) -> dict[str, Tensor]:
    """Images and texts that end in the end-of-text token, unpadded."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY - 1, (size, CONTEXT), generator=g)
    ids[:, 0], ids[:, -1] = 1, VOCABULARY - 1
    return {"pixel_values": torch.randn(size, 3, IMAGE, IMAGE, generator=g), "input_ids": ids}


def pair_embeddings(model: nn.Module, view: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    """[2 b, e]: image embeddings, then text embeddings."""
    pairs = view.embed_pairs(model, batch)
    return torch.cat([pairs.image, pairs.text])


def images_and_padded_texts(seed: int, size: int) -> dict[str, Tensor]:
    """Images and texts of different lengths, padded on the right."""
    batch = images_and_texts(seed, size)
    lengths = CONTEXT - torch.arange(size) % 4
    mask = (torch.arange(CONTEXT) < lengths[:, None]).long()
    return batch | {"input_ids": batch["input_ids"] * mask, "attention_mask": mask}


def questions_and_answers(seed: int, size: int) -> dict[str, Tensor]:
    """Padded questions about images, with answers."""
    answers = images_and_texts(seed + 1, size)["input_ids"][:, :5]
    return images_and_padded_texts(seed, size) | {"labels": answers}


def images_and_captions(seed: int, size: int) -> dict[str, Tensor]:
    """Images and padded captions, which are what is to be said."""
    batch = images_and_padded_texts(seed, size)
    return batch | {"labels": batch["input_ids"]}


def embeddings_and_match(model: nn.Module, view: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    """[b, 2 e + 2]: image and text embeddings, and the logits of the match head on each pair."""
    pairs = view.embed_pairs(model, batch)
    return torch.cat([pairs.image, pairs.text, model(**batch).itm_score], dim=-1)


def decoder_logits(model: nn.Module, view: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    """[b, t, n] of BLIP's text decoder; a question answerer's output is its loss alone."""
    caught: list[Tensor] = []
    decoder = view.model.get_submodule("text_decoder")
    hook = decoder.register_forward_hook(lambda _, inputs, output: caught.append(output.logits))
    try:
        model(**batch)
    finally:
        hook.remove()
    return caught[0]


def _pairs(make: Callable[[], nn.Module], vision: Tower, text: Tower) -> BackboneCase:
    towers = {"vision": vision, "text": text}
    return BackboneCase(make, towers, images_and_texts, pair_embeddings)


def _mllm(
    make: Callable[[], nn.Module],
    towers: Mapping[str, Tower],
    batch: Callable[[int, int], dict[str, Tensor]] = mllms.images_and_prompts,
) -> BackboneCase:
    return BackboneCase(make, towers, batch, mllms.logits)


def _qwen(
    generation: str, norms: int, biases: bool | tuple[str, ...], mlp: tuple[str, ...]
) -> BackboneCase:
    vision = Tower(2, 48, 192, norms=norms, roles=(*ATTENTION, *mlp), trunk=False)
    language = Tower(2, 32, 128, norms=0, kv=16, biases=biases)
    towers = {"vision": vision, "language": language}
    return _mllm(partial(mllms.qwen_vl, generation), towers, mllms.patches_and_prompts)


_QFORMER = Tower(2, 32, 128, norms=7, source=48, roles=(*ATTENTION, *CROSS, "fc1", "fc2"))
_VISION, _TEXT = Tower(2, 48, 192, norms=6), Tower(2, 32, 128, norms=5)
_BLIP_VISION = Tower(2, 48, 192, norms=5)
_DECODER_ROLES = (*ATTENTION, "fc1", "fc2", *CROSS)

BACKBONES: dict[str, BackboneCase] = {
    "open_clip": _pairs(open_clip_vit, _VISION, _TEXT),
    "open_clip-fused": _pairs(open_clip_fused, _VISION, _TEXT),
    "open_clip-timm": _pairs(open_clip_timm, Tower(2, 48, 192, norms=5), _TEXT),
    "clip": _pairs(clip, _VISION, _TEXT),
    "siglip": _pairs(siglip, Tower(2, 48, 100, norms=5), _TEXT),
    "blip-retrieval": BackboneCase(
        blip_retrieval,
        {
            "vision": _BLIP_VISION,
            "text": _TEXT,
            "fusion": Tower(2, 32, 0, norms=2, source=48, roles=CROSS),
        },
        images_and_padded_texts,
        embeddings_and_match,
    ),
    "blip-vqa": BackboneCase(
        blip_vqa,
        {
            "vision": _BLIP_VISION,
            "text": Tower(2, 48, 128, norms=5),
            "fusion": Tower(2, 48, 0, norms=2, roles=CROSS),
            "language": Tower(2, 48, 128, norms=8, roles=_DECODER_ROLES),
        },
        questions_and_answers,
        decoder_logits,
    ),
    "blip-caption": BackboneCase(
        blip_caption,
        {
            "vision": _BLIP_VISION,
            "language": Tower(2, 32, 128, norms=8, source=48, roles=_DECODER_ROLES),
        },
        images_and_captions,
        decoder_logits,
    ),
    "blip2-opt": _mllm(
        mllms.blip2_opt,
        {
            "vision": Tower(2, 48, 192, norms=5),
            "fusion": _QFORMER,
            "language": Tower(2, 32, 128, norms=5),
        },
    ),
    "blip2-t5": _mllm(
        mllms.blip2_t5,
        {
            "vision": Tower(2, 48, 192, norms=5),
            "fusion": _QFORMER,
            "language": Tower(4, 32, 128, norms=0, biases=False, crossed=2),
        },
        mllms.images_prompts_and_answers,
    ),
    "llava": _mllm(
        mllms.llava,
        {
            "vision": Tower(2, 48, 192, norms=5),
            "language": Tower(2, 32, 128, norms=0, kv=16, biases=False),
        },
    ),
    "minigpt4": _mllm(
        mllms.minigpt4,
        {
            "vision": Tower(2, 48, 192, norms=5),
            "fusion": _QFORMER,
            "language": Tower(2, 32, 128, norms=0, kv=16, biases=False),
        },
    ),
    "llava-onevision": _mllm(
        mllms.llava_onevision,
        {
            "vision": Tower(2, 48, 192, norms=4),
            "language": Tower(2, 32, 128, norms=0, kv=16, biases=("q", "k", "v")),
        },
        mllms.tiles_and_prompts,
    ),
    "qwen2.5-vl": _qwen("qwen2_5_vl", 0, ("q", "k", "v"), ("gate", "fc1", "fc2")),
    "qwen2-vl": _qwen("qwen2_vl", 4, ("q", "k", "v"), ("fc1", "fc2")),
    "qwen3-vl": _qwen("qwen3_vl", 4, False, ("fc1", "fc2")),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A backbone with random weights, the same for the same seed, in eval mode, frozen.

    Frozen, since torch.matmul folds its operands differently where one requires a gradient, and a
    comparison bit for bit must not see that.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BACKBONES[name].make().eval()
        with torch.no_grad():
            for p in model.parameters():  # zero-initialised biases would hide what is lost
                p.add_(0.02 * torch.randn_like(p))
    return model.requires_grad_(False)
