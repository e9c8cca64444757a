"""BLIP's attention with q, k, v, out as Linears and keys and values that can be extended."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextEmbeddings, BlipTextSelfAttention

from mmtune.backbones.attention import EXTENSION, attend, cache_of
from mmtune.backbones.projections import (
    ProjectionError,
    _heads,
    _join_rows,
    _linear,
    _plain,
    _split_rows,
)


class SplitBlipAttention(nn.Module):
    """BLIP's vision attention (fused qkv Linear) with visible projections.

    Shape: hidden_states [b, t, d] -> ([b, t, d], None). Attention weights are not available.
    """

    extensible = True

    def __init__(self, stock: BlipAttention) -> None:
        super().__init__()
        self.num_heads = stock.num_heads
        self.q, self.k, self.v = _split_rows(stock.qkv.weight, stock.qkv.bias)
        self.out = stock.projection
        self.dropout = stock.dropout
        self.train(stock.training)
        # The emptied stock module is kept outside the module tree: it knows its class and options.
        object.__setattr__(self, "_stock", stock)
        stock.qkv = stock.qkv.to("meta")

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        q, k, v = (_heads(proj(hidden_states), self.num_heads) for proj in (self.q, self.k, self.v))
        y = attend(self, q, k, v, None, dropout=self.dropout.p if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2)), None

    def restored(self) -> nn.Module:
        """The stock module with the present weights."""
        stock = cast(Any, self._stock)
        stock.qkv = _linear(*_join_rows(self.q, self.k, self.v), stock.qkv.weight.requires_grad)
        stock.projection = _plain(self.out)
        return stock.train(self.training)


class OpenTextAttention(BlipTextSelfAttention):
    """BLIP's text attention, self or cross, through scaled_dot_product_attention.

    Its query, key and value are Linears already, so a stock module becomes one by its class alone
    (`open_tower`): parameters, names and hooks stay.

    Shape: hidden_states [b, t, d], encoder_hidden_states [b, s, d'] -> ([b, t, d], None).
    """

    extensible = True
    heeds_mask = False  # of what it reads; see `heed_masks`

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the stock forward, without attention weights.

        Args:
            hidden_states: [b, t, d], of which the queries are made.
            attention_mask: [b, 1, t, s], added to the scores of self-attention.
            encoder_hidden_states: [b, s, d'], or [1, s, d'] for all of the batch, of which the keys
                and values are made; None means self-attention.
            encoder_attention_mask: [b, 1, t, s], added to the scores of cross-attention. In
                transformers 5.24 the layer around does not hand it down: padding of the encoder is
                seen there, and here as there.
            kwargs: may hold the cache (`cache_of`): keys and values of earlier calls; those of
                cross-attention are made once.
        """
        crossing = encoder_hidden_states is not None
        source = encoder_hidden_states if crossing else hidden_states
        q = _heads(self.query(hidden_states), self.num_attention_heads)
        k, v = self._keys_and_values(source, crossing, cache_of(kwargs))
        k, v = (x.expand(len(q), -1, -1, -1) for x in (k, v))
        mask = encoder_attention_mask if crossing else attention_mask
        if crossing and mask is None and self.heeds_mask:
            mask = attention_mask  # the name under which the layer hands the encoder's mask down
        y = attend(
            self, q, k, v, _fitting(mask, q), dropout=self.dropout.p if self.training else 0.0
        )
        return y.transpose(1, 2).flatten(2), None

    def _keys_and_values(self, source: Tensor, crossing: bool, cache: Any) -> tuple[Tensor, Tensor]:
        """[b, h, s, e] each, of `source` and of what the cache holds."""
        both = isinstance(cache, EncoderDecoderCache)
        kept: Any = cache
        if both:
            kept = cache.cross_attention_cache if crossing else cache.self_attention_cache
        if both and crossing and cache.is_updated.get(self.layer_idx):
            return kept.layers[self.layer_idx].keys, kept.layers[self.layer_idx].values
        k, v = (_heads(proj(source), self.num_attention_heads) for proj in (self.key, self.value))
        if kept is not None:
            k, v = kept.update(k, v, self.layer_idx)
        if both and crossing:
            cache.is_updated[self.layer_idx] = True
        return k, v


class OpenTextEmbeddings(BlipTextEmbeddings):
    """BLIP's text embeddings, which leave the word embeddings they add to as they are.

    The stock module adds positions in place. Under activation checkpointing transformers makes
    frozen word embeddings a leaf that requires grad, which cannot be written to.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Any = None,
        inputs_embeds: Tensor | None = None,
        **length: int,
    ) -> Tensor:
        """As the stock forward; `length`, of the cache, bears another name by version."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(None, position_ids, words.clone(), **length)


_OPEN: dict[type[nn.Module], type[nn.Module]] = {
    BlipTextSelfAttention: OpenTextAttention,
    BlipTextEmbeddings: OpenTextEmbeddings,
}
_STOCK = {opened: stock for stock, opened in _OPEN.items()}


def open_tower(tower: nn.Module) -> None:
    """Give the modules of a vision or text model their open classes.

    Calls that ask it for attention weights are refused from then on.
    """
    for module in tower.modules():
        if type(module) in _OPEN:
            module.__class__ = _OPEN[type(module)]
    if not hasattr(tower, "_mmtune_refusal"):
        handle: Any = tower.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
        tower._mmtune_refusal = handle


def heed_masks(tower: nn.Module) -> None:
    """Open a decoder, and let its cross-attention heed the mask of what it reads, from now on.

    The mask arrives as `attention_mask`, which transformers (5.17 to 5.24) overlooks. It stays so
    until `close_tower`: what activation checkpointing computes again must be the same.
    """
    open_tower(tower)
    for module in tower.modules():
        if isinstance(module, OpenTextAttention):
            module.heeds_mask = True


def close_tower(tower: nn.Module) -> None:
    """Undo `open_tower`, and take extensions of its attention away."""
    for module in tower.modules():
        if type(module) in _STOCK:
            module.__dict__.pop(EXTENSION, None)
            module.__dict__.pop("heeds_mask", None)
            module.__class__ = _STOCK[type(module)]
    handle: Any = tower.__dict__.pop("_mmtune_refusal", None)
    if handle is not None:
        handle.remove()


def _refuse_weights(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wanted = kwargs.get("output_attentions")
    if tower.config.output_attentions if wanted is None else wanted:
        raise ProjectionError(
            f"{type(tower).__name__} was asked for output_attentions, but prepared attention "
            "computes no weights; restore the stock modules with Backbone.restore()"
        )


def _fitting(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask in q's dtype and on its device; its lowest value stays finite.

    Under autocast the mask is float32 and q is not: float32's lowest value would become -inf, and a
    row that sees nothing would no longer be the mean of all values, as it is in the stock module.
    """
    if mask is None or (mask.dtype == q.dtype and mask.device == q.device):
        return mask
    if mask.dtype == torch.bool:
        return mask.to(q.device)
    return mask.clamp(min=torch.finfo(q.dtype).min).to(q)
