"""transformers' BLIP: matching of images and texts, question answering, captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import (
    Generative,
    PairEmbeddings,
    Site,
    SiteError,
    checkpoint_transformers,
    reachable,
)
from mmtune.backbones.towers import LayerNames, layer_sites, single_sites

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    the padding of its question. Prepared or not, the model computes that.
    """

    family = "blip"
    summary = f"transformers {', '.join(CLASSES)}"
    instead = RETRIEVAL

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(c.__name__ in CLASSES for c in type(model).__mro__)

    def prepare(self) -> None:
        from mmtune.backbones import blip_attention as attention

        m: Any = self.model
        for layer in m.vision_model.encoder.layers:
            if not isinstance(layer.self_attn, attention.SplitBlipAttention):
                layer.self_attn = attention.SplitBlipAttention(layer.self_attn)
        for path in ("vision_model", *self._text_towers().values()):
            attention.open_tower(m.get_submodule(path))

    def restore(self) -> None:
        from mmtune.backbones import blip_attention as attention

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
        self._require_retrieval()
        keys = ("pixel_values", "input_ids", "attention_mask")
        inputs = {k: batch[k] for k in keys if batch.get(k) is not None}
        out = model(**inputs, use_itm_head=False)
        image = self._projected("vision_proj", out.last_hidden_state)
        text = self._projected("text_proj", out.question_embeds)
        return PairEmbeddings(image, text, image.new_tensor(1 / 0.07))

    def encode_image(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        self._require_retrieval()
        out = reachable(model).vision_model(pixel_values=pixel_values)
        return self._projected("vision_proj", out.last_hidden_state)

    def encode_text(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        self._require_retrieval()
        out = reachable(model).text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self._projected("text_proj", out.last_hidden_state)

    def _require_retrieval(self) -> None:
        if not hasattr(self.model, "itm_head"):
            raise self._embeds_nothing()

    def _projected(self, head: str, hidden: Tensor) -> Tensor:
        """[b, t, d] -> [b, e] of the class token, L2-normalised."""
        from torch.nn.functional import normalize

        return normalize(self.model.get_submodule(head)(hidden[:, 0]), dim=-1)

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
