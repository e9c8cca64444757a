"""transformers' Blip2ForConditionalGeneration: ViT, Q-Former, and OPT or T5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtune.backbones import mllm_generation
from mmtune.backbones.base import Site, SiteError, checkpoint_transformers
from mmtune.backbones.generation import joined, padded
from mmtune.backbones.generative import Generative
from mmtune.backbones.language import language_sites, language_trunk
from mmtune.backbones.towers import LayerNames, layer_sites, single_sites, sites_of_layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.fusions import Fusion
    from mmtune.backbones.generation import Decoding
    from mmtune.backbones.trunks import Trunk

VISION_LAYER = LayerNames(
    roles={
        "attention": "self_attn",
        "q": "self_attn.qkv.q",
        "k": "self_attn.qkv.k",
        "v": "self_attn.qkv.v",
        "out": "self_attn.projection",
        "mlp": "mlp",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
    norms=("layer_norm1", "layer_norm2"),
)
_SELF = {
    "attention": "attention.attention",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "out": "attention.output.dense",
}
_CROSS = {
    "cross_attention": "crossattention.attention",
    "cross_q": "crossattention.attention.query",
    "cross_k": "crossattention.attention.key",
    "cross_v": "crossattention.attention.value",
    "cross_out": "crossattention.output.dense",
}
# The learned queries have a feed-forward of their own; words, which this model never gives to its
# Q-Former, would take another.
_FEED_FORWARD = {"fc1": "intermediate_query.dense", "fc2": "output_query.dense"}
QFORMER_LAYER = LayerNames(
    roles=_SELF | _FEED_FORWARD,
    norms=("attention.output.LayerNorm", "output_query.LayerNorm"),
)
QFORMER_CROSS_LAYER = LayerNames(
    roles=_SELF | _CROSS | _FEED_FORWARD,
    norms=(
        "attention.output.LayerNorm",
        "crossattention.output.LayerNorm",
        "output_query.LayerNorm",
    ),
)


class Blip2(Generative):
    """BLIP-2 that answers and captions.

    Branches: `vision`, `fusion` (the Q-Former; every other layer has cross-attention), `projector`
    (one Linear, its head), `language` (OPT, or T5 with its encoder's layers counted first).
    Blip2ForImageTextRetrieval is another class, whose Q-Former also reads words; it is not covered.
    """

    family = "blip2"
    summary = "transformers Blip2ForConditionalGeneration: Q-Former and OPT or T5; VQA, captions"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(c.__name__ == "Blip2ForConditionalGeneration" for c in type(model).__mro__)

    def prepare(self) -> None:
        from mmtune.backbones.projections import split

        super().prepare()
        for layer in self._model.vision_model.encoder.layers:
            split(layer.self_attn, "qkv")

    def restore(self) -> None:
        from mmtune.backbones.projections import restore

        super().restore()
        restore(self.model)

    def iter_sites(self) -> Iterator[Site]:
        m = self._model
        self._require_prepared()
        vision, fusion = m.config.vision_config.hidden_size, m.config.qformer_config.hidden_size
        patches = ["vision_model.embeddings.patch_embedding"]
        yield from single_sites(m, "vision", "embed", patches, vision)
        yield from layer_sites(m, "vision", "vision_model.encoder.layers", VISION_LAYER, vision)
        yield from single_sites(m, "vision", "norm", ["vision_model.post_layernorm"], vision)
        yield from single_sites(m, "fusion", "norm", ["qformer.layernorm"], fusion)
        for index, layer in enumerate(m.qformer.encoder.layer):
            names = QFORMER_CROSS_LAYER if layer.has_cross_attention else QFORMER_LAYER
            path = f"qformer.encoder.layer.{index}"
            yield from sites_of_layer(m, "fusion", index, path, names, fusion)
        projection = "language_projection"
        yield Site("projector", 0, "head", projection, m.language_projection, fusion)
        yield from language_sites(m, "language_model")
        width = m.config.text_config.hidden_size
        yield from single_sites(m, "language", "head", ["language_model.lm_head"], width)

    def trunks(self) -> dict[str, Trunk]:
        """Vision, fusion and language; the projector maps each token by itself and has no trunk."""
        from mmtune.backbones.trunks import Trunk

        m, config = self._model, self._model.config
        encoder, qformer = m.vision_model.encoder, m.qformer.encoder
        return {
            "vision": Trunk(
                "vision",
                "vision_model.encoder",
                encoder,
                width=config.vision_config.hidden_size,
                start=1,
            ),
            "fusion": _query_trunk(qformer, config.qformer_config.hidden_size),
            "language": language_trunk(m, "language_model"),
        }

    def fusions(self) -> list[Fusion]:
        """The Q-Former's layers with cross-attention; T5's own reads no other branch."""
        from mmtune.backbones.fusions import Fusion

        m = self._model
        found = []
        for index, layer in enumerate(m.qformer.encoder.layer):
            if layer.has_cross_attention:
                path = f"qformer.encoder.layer.{index}.crossattention"
                parts = (layer.crossattention, layer.attention, layer.output_query)
                width = m.config.qformer_config.hidden_size
                found.append(Fusion("fusion", index, path, *parts, width, words=False))
        return found

    @property
    def templates(self) -> Mapping[str, str]:
        asked = "Question: {question} Answer:"
        return {"question": asked, "text": asked, "caption": "a photo of"}

    @property
    def ends(self) -> list[int]:
        return mllm_generation.ends_of(self._model.language_model)

    def prompts(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        limit: int | None = None,
        sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The words alone: the learned queries come before them and need no placeholders.

        Their beginning and end are the tokenizer's, as in BLIP-2's processor.
        """
        rows = tokenizer(list(texts), truncation=limit is not None, max_length=limit)["input_ids"]
        left = bool(self._model.config.use_decoder_only_language_model)
        ids, mask = padded(rows, self.pad, left)
        return {"input_ids": ids, "attention_mask": mask}

    def text_prompts(self, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.prompts(tokenizer, texts)

    def read(
        self,
        stock: Any,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        import torch

        embeds, mask = stock.get_input_embeddings()(input_ids), attention_mask
        if pixel_values is not None:
            queries = self.image_tokens(stock, pixel_values).to(embeds)
            embeds = torch.cat([queries, embeds], dim=1)
            mask = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)
        if stock.config.use_decoder_only_language_model:
            return {"embeds": embeds, "mask": mask}
        encoder = stock.language_model.get_encoder()
        states = encoder(inputs_embeds=embeds, attention_mask=mask, return_dict=True)
        return {"states": states.last_hidden_state, "mask": mask}

    def image_tokens(
        self, stock: Any, pixel_values: Tensor, image_sizes: Tensor | None = None
    ) -> Tensor:
        return stock.get_image_features(pixel_values, return_dict=True).pooler_output

    def continued(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        return self._scores(stock, context, target_ids, target_mask, target_ids.shape[1])

    def everywhere(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        return self._scores(stock, context, target_ids, target_mask, last=0)

    def _scores(
        self,
        stock: Any,
        context: Mapping[str, Tensor],
        target_ids: Tensor,
        target_mask: Tensor,
        last: int,
    ) -> Tensor:
        """Those of the `last` positions of a decoder-only model; 0 means all."""
        lm = stock.language_model
        if not stock.config.use_decoder_only_language_model:
            return mllm_generation.decoded(lm, context, target_ids)
        embed = stock.get_input_embeddings()
        inputs = joined(context, embed, target_ids, target_mask)
        return lm(**inputs, logits_to_keep=last, use_cache=False).logits

    def written(self, stock: Any, context: Mapping[str, Tensor], decoding: Decoding) -> Tensor:
        room = None
        if "embeds" in context:
            # The last token is written and not read: it needs no position.
            room = stock.config.text_config.max_position_embeddings + 1
            room -= context["embeds"].shape[1]
        arguments = decoding.within(room).arguments(self.ends, self.pad)
        return mllm_generation.written(stock.language_model, context, arguments)

    def set_gradient_checkpointing(self, enable: bool = True) -> bool:
        return checkpoint_transformers(self.model, enable)

    @property
    def _model(self) -> Any:
        return self.model

    def _require_prepared(self) -> None:
        from mmtune.backbones.projections import Split

        if not isinstance(self._model.vision_model.encoder.layers[0].self_attn.qkv, Split):
            raise SiteError(
                "vision_model still holds fused attention, whose q, k, v are no modules: call "
                "backbone.prepare() first"
            )


def _query_trunk(encoder: nn.Module, width: int) -> Trunk:
    from mmtune.backbones.mllm_trunks import QueryTrunk

    return QueryTrunk(
        "fusion",
        "qformer.encoder",
        encoder,
        width=width,
        hidden="hidden_states",
        mask="attention_mask",
    )
