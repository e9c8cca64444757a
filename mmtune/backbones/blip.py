"""transformers' BLIP: matching of images and texts, question answering, captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import (
    PairEmbeddings,
    Site,
    SiteError,
    checkpoint_transformers,
    reachable,
)
from mmtune.backbones.generative import Generative
from mmtune.backbones.towers import LayerNames, layer_sites, single_sites

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.blip_matching import Matching
    from mmtune.backbones.fusions import Fusion
    from mmtune.backbones.generation import Decoding
    from mmtune.backbones.trunks import Trunk

VISION_LAYER = LayerNames(
    roles={
        "attention": "self_attn",
        "q": "self_attn.q",
        "k": "self_attn.k",
        "v": "self_attn.v",
        "out": "self_attn.out",
        "mlp": "mlp",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
    norms=("layer_norm1", "layer_norm2"),
)
# The two Linears of a text layer's MLP lie in no module of their own: there is no role "mlp".
TEXT_LAYER = LayerNames(
    roles={
        "attention": "attention.self",
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "out": "attention.output.dense",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    },
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
)
CROSS_LAYER = LayerNames(
    roles={
        "cross_attention": "crossattention.self",
        "cross_q": "crossattention.self.query",
        "cross_k": "crossattention.self.key",
        "cross_v": "crossattention.self.value",
        "cross_out": "crossattention.output.dense",
    },
    norms=("crossattention.output.LayerNorm",),
    whole=False,
)
DECODER_LAYER = LayerNames(
    roles={**TEXT_LAYER.roles, **CROSS_LAYER.roles},
    norms=(*TEXT_LAYER.norms, *CROSS_LAYER.norms),
)
RETRIEVAL = "BlipForImageTextRetrieval"
CLASSES = (RETRIEVAL, "BlipForQuestionAnswering", "BlipForConditionalGeneration")


class Blip(Generative):
    """transformers' three BLIP classes, base and large.

    Branches: `vision`; `text`, the text encoder, and `fusion`, its cross-attention to the image;
    `language`, the decoder of answers and captions with its cross-attention. Only
    BlipForImageTextRetrieval embeds pairs, by its contrastive heads.

    transformers 5.24 does not hand the mask of the encoder down to cross-attention: an answer sees
    the padding of its question. Prepared or not, the model's own forward pass computes that; what
    this view scores and writes heeds the mask (`blip_generation`).
    """

    family = "blip"
    summary = f"transformers {', '.join(CLASSES)}"
    instead = RETRIEVAL
    reads_videos = True

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(c.__name__ in CLASSES for c in type(model).__mro__)

    def prepare(self) -> None:
        from mmtune.backbones import blip_attention as attention

        super().prepare()
        m: Any = self.model
        for layer in m.vision_model.encoder.layers:
            if not isinstance(layer.self_attn, attention.SplitBlipAttention):
                layer.self_attn = attention.SplitBlipAttention(layer.self_attn)
        for path in ("vision_model", *self._text_towers().values()):
            attention.open_tower(m.get_submodule(path))

    def restore(self) -> None:
        from mmtune.backbones import blip_attention as attention

        super().restore()
        m: Any = self.model
        for layer in m.vision_model.encoder.layers:
            if isinstance(layer.self_attn, attention.SplitBlipAttention):
                layer.self_attn = layer.self_attn.restored()
        for path in ("vision_model", *self._text_towers().values()):
            attention.close_tower(m.get_submodule(path))

    def iter_sites(self) -> Iterator[Site]:
        m: Any = self.model
        if hasattr(m.vision_model.encoder.layers[0].self_attn, "qkv"):
            raise SiteError(
                "vision_model.encoder.layers still holds fused attention, whose q, k, v are no "
                "modules: call backbone.prepare() first"
            )
        width = m.config.vision_config.hidden_size
        yield from self._branch(
            "vision",
            "vision_model.encoder.layers",
            VISION_LAYER,
            width,
            embed=["vision_model.embeddings.patch_embedding"],
            norm=["vision_model.post_layernorm"],
            head=["vision_proj"],
        )
        width = m.config.text_config.hidden_size
        towers = self._text_towers()
        if "text" in towers:
            layers = "text_encoder.encoder.layer"
            yield from self._branch(
                "text",
                layers,
                TEXT_LAYER,
                width,
                embed=["text_encoder.embeddings.word_embeddings"],
                norm=["text_encoder.embeddings.LayerNorm"],
                head=["text_proj"],
            )
            if m.config.text_config.is_decoder:  # what BLIP calls a layer with cross-attention
                yield from self._branch("fusion", layers, CROSS_LAYER, width, head=["itm_head"])
        if "language" in towers:
            yield from self._branch(
                "language",
                "text_decoder.bert.encoder.layer",
                DECODER_LAYER,
                width,
                embed=["text_decoder.bert.embeddings.word_embeddings"],
                norm=[
                    "text_decoder.bert.embeddings.LayerNorm",
                    "text_decoder.cls.predictions.transform.LayerNorm",
                ],
                head=["text_decoder.cls.predictions.decoder"],
            )

    def _branch(
        self,
        branch: str,
        layers: str,
        names: LayerNames,
        width: int,
        **outside: list[str],
    ) -> Iterator[Site]:
        """Sites of a branch: its embeddings, its layers, what comes around them."""
        m = self.model
        yield from single_sites(m, branch, "embed", outside.get("embed", []), width)
        yield from layer_sites(m, branch, layers, names, width)
        for role in ("norm", "head"):
            yield from single_sites(m, branch, role, outside.get(role, []), width)

    def _text_towers(self) -> dict[str, str]:
        """Branch -> path of the BlipTextModel; a question answerer has two."""
        paths = {"text": "text_encoder", "language": "text_decoder.bert"}
        return {b: p for b, p in paths.items() if hasattr(self.model, p.partition(".")[0])}

    def set_gradient_checkpointing(self, enable: bool = True) -> bool:
        return checkpoint_transformers(self.model, enable)

    def embed_pairs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        """ITC features of one forward pass of the contrastive head.

        That pass returns similarities and the towers' hidden states; the two projections are
        computed from those once more. transformers does not keep BLIP's learned temperature, so
        the scale is that of its initial value, 1 / 0.07.
        """
        parts = self.matching(model)
        keys = ("pixel_values", "input_ids", "attention_mask")
        inputs = {k: batch[k] for k in keys if batch.get(k) is not None}
        out = model(**inputs, use_itm_head=False)
        image = parts.image_features(out.last_hidden_state)
        text = parts.text_features(out.question_embeds)
        return PairEmbeddings(image, text, image.new_full((), 1 / 0.07))

    def encode_image(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        parts = self.matching(model)
        return parts.image_features(parts.image_states(pixel_values))

    def encode_text(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        parts = self.matching(model)
        return parts.text_features(parts.text_states(input_ids, attention_mask))

    def matching(self, model: nn.Module, first: int | None = None) -> Matching:
        """The parts with which `model` compares images and texts.

        Args:
            model: possibly wrapped.
            first: id of the token that begins a text read with its image; None takes
                `match_token_id` of the model's config, which conversion of an original checkpoint
                sets ([ENC]), and where the config has none leaves the texts as they are.

        Raises:
            TypeError: this class does not compare them.
        """
        from mmtune.backbones.blip_matching import Matching

        if not hasattr(self.model, "itm_head"):
            raise self._embeds_nothing()
        if first is None:
            first = getattr(self.model.config, "match_token_id", None)
        return Matching(reachable(model), first)

    def trunks(self) -> dict[str, Trunk]:
        """Of vision, text and language; fusion takes the text encoder's tokens and has none."""
        from mmtune.backbones.blip_trunks import TextTrunk
        from mmtune.backbones.trunks import Trunk, embedded

        m: Any = self.model
        width = m.config.vision_config.hidden_size
        found = {
            "vision": Trunk(
                "vision", "vision_model.encoder", m.vision_model.encoder, width, start=1
            )
        }
        text = m.config.text_config
        for branch, path in self._text_towers().items():
            tower = m.get_submodule(path)
            # Behind the class token that is pooled; ahead of the begin token, from which a decoder
            # that sees only what came before predicts its first word.
            start = 1 if branch == "text" else 0
            found[branch] = TextTrunk(
                branch,
                f"{path}.encoder",
                tower.encoder,
                text.hidden_size,
                start=start,
                context=text.max_position_embeddings,
                causal=branch == "language",
                embed=partial(embedded, tower.embeddings, start),
            )
        return found

    def fusions(self) -> list[Fusion]:
        """Every layer of the text encoder, as `fusion`, and of the decoder."""
        from mmtune.backbones.fusions import Fusion

        m: Any = self.model
        config = m.config.text_config
        found = []
        for branch, tower in self._text_towers().items() if config.is_decoder else ():
            words = branch == "text"
            for index, layer in enumerate(m.get_submodule(tower).encoder.layer):
                path = f"{tower}.encoder.layer.{index}.crossattention"
                parts = (layer.crossattention, layer.attention, layer.output)
                name = "fusion" if words else branch
                found.append(Fusion(name, index, path, *parts, config.hidden_size, words))
        return found

    @property
    def writes(self) -> bool:
        return hasattr(self.model, "text_decoder")

    @property
    def templates(self) -> Mapping[str, str]:
        return {"question": "{question}", "caption": "a picture of "}

    @property
    def ends(self) -> list[int]:
        m: Any = self.model
        return [int(m.config.text_config.sep_token_id)]

    def prompts(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        limit: int | None = None,
        sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        from mmtune.backbones import blip_generation

        return blip_generation.prompts(self.model, tokenizer, texts, limit)

    def read(
        self,
        stock: Any,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_sizes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        from mmtune.backbones import blip_generation

        return blip_generation.read(stock, pixel_values, input_ids, attention_mask)

    def continued(
        self, stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
    ) -> Tensor:
        from mmtune.backbones import blip_generation

        return blip_generation.continued(stock, context, target_ids, target_mask)

    def written(self, stock: Any, context: Mapping[str, Tensor], decoding: Decoding) -> Tensor:
        from mmtune.backbones import blip_generation

        return blip_generation.written(stock, context, decoding, self.ends, self.pad)
