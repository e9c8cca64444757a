"""transformers' CLIPModel and SiglipModel: same layers, different heads and losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from mmtune.backbones.base import (
    Backbone,
    PairEmbeddings,
    Site,
    checkpoint_transformers,
    reachable,
)
from mmtune.backbones.towers import HF_LAYER, layer_sites, single_sites

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.trunks import Trunk


class DualEncoder(Backbone):
    """Two transformers towers that `get_image_features` and `get_text_features` read."""

    heads: ClassVar[Mapping[str, tuple[str, ...]]]
    model_class: ClassVar[str]
    # CLIP: a class token, a causal text tower, a begin token. SigLIP has none of the three.
    pools_at_tokens: ClassVar[bool]

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(c.__name__ == cls.model_class for c in type(model).__mro__)

    def iter_sites(self) -> Iterator[Site]:
        config: Any = self.model.config
        towers = (
            ("vision", "vision_model", config.vision_config.hidden_size, "patch_embedding"),
            ("text", "text_model", config.text_config.hidden_size, "token_embedding"),
        )
        for branch, tower, width, embedding in towers:
            m = self.model
            yield from single_sites(m, branch, "embed", [f"{tower}.embeddings.{embedding}"], width)
            yield from single_sites(m, branch, "norm", [f"{tower}.pre_layrnorm"], width)
            yield from layer_sites(m, branch, f"{tower}.encoder.layers", HF_LAYER, width)
            last = [f"{tower}.post_layernorm", f"{tower}.final_layer_norm"]
            yield from single_sites(m, branch, "norm", last, width)
            yield from single_sites(m, branch, "head", self.heads[branch], width)

    def trunks(self) -> dict[str, Trunk]:
        from mmtune.backbones.trunks import Trunk, embedded

        m: Any = self.model
        vision, text = m.config.vision_config, m.config.text_config
        return {
            "vision": Trunk(
                "vision",
                "vision_model.encoder",
                m.vision_model.encoder,
                width=vision.hidden_size,
                start=int(self.pools_at_tokens),
            ),
            "text": Trunk(
                "text",
                "text_model.encoder",
                m.text_model.encoder,
                width=text.hidden_size,
                start=int(self.pools_at_tokens),
                context=text.max_position_embeddings,
                causal=self.pools_at_tokens,
                mask="attention_mask",
                embed=partial(embedded, m.text_model.embeddings, int(self.pools_at_tokens)),
            ),
        }

    def set_gradient_checkpointing(self, enable: bool = True) -> bool:
        return checkpoint_transformers(self.model, enable)

    def encode_image(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        return _unit(_features(reachable(model).get_image_features(pixel_values=pixel_values)))

    def encode_text(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        inputs = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        return _unit(_features(reachable(model).get_text_features(**inputs)))

    def embed_pairs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        keys = ("pixel_values", "input_ids", "attention_mask")
        out = model(**{k: batch[k] for k in keys if batch.get(k) is not None})
        inner: Any = self.model
        bias = getattr(inner, "logit_bias", None)
        return PairEmbeddings(out.image_embeds, out.text_embeds, inner.logit_scale.exp(), bias)


class HFClip(DualEncoder):
    """transformers' CLIPModel."""

    family = "clip"
    summary = "transformers CLIPModel: OpenAI CLIP, LAION and DataComp checkpoints"
    model_class = "CLIPModel"
    pools_at_tokens = True
    heads: ClassVar = {"vision": ("visual_projection",), "text": ("text_projection",)}


class Siglip(DualEncoder):
    """transformers' SiglipModel; its attention pooling head stays as it is, unadapted."""

    family = "siglip"
    summary = (
        "transformers SiglipModel: sigmoid loss, no class token; text is padded to full length"
    )
    model_class = "SiglipModel"
    pools_at_tokens = False
    heads: ClassVar = {"vision": (), "text": ("text_model.head",)}


def _features(output: Any) -> Tensor:
    """Transformers 5 wraps the features in a pooled output; earlier versions return them bare."""
    return getattr(output, "pooler_output", output)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(p=2, dim=-1, keepdim=True)
