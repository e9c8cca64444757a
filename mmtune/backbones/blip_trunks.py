"""Virtual tokens in BLIP's text layers, cached decoding included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import EncoderDecoderCache

from mmtune.backbones.attention import cache_of
from mmtune.backbones.trunks import Trunk, insert


class WordCache(EncoderDecoderCache):
    """A cache that also holds virtual tokens and counts only the words.

    So positions and masks, which the model derives from the cache's length, stay those of the
    words.
    """

    def __init__(self, cache: EncoderDecoderCache, at: Sequence[int]) -> None:
        super().__init__(cache.self_attention_cache, cache.cross_attention_cache)
        self.at = tuple(at)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) - len(self.at)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length - len(self.at), offset


@dataclass(frozen=True)
class TextTrunk(Trunk):
    """BlipTextEncoder: encodes a text, with or without an image, or decodes with a cache."""

    hidden: str = "hidden_states"
    mask: str | None = "attention_mask"

    def entering(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        cache = cache_of(kwargs)
        return cache is None or cache.get_seq_length() == 0

    def enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Any, at: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().enter(args, kwargs, tokens, at)
        cross = kwargs.get("encoder_attention_mask")
        if cross is not None:
            # Every query sees the same keys of the image or question: one row serves all.
            kwargs = {**kwargs, "encoder_attention_mask": cross[..., :1, :]}
        return args, kwargs

    def carry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], at: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        if not isinstance(cache, WordCache):
            raise ValueError(
                f"decoding goes on with a {type(cache).__name__} that does not know of the "
                f"{len(at)} virtual tokens; pass on the cache of the previous output"
            )
        if mask is None:
            return args, kwargs
        # [b, 1, t, s] -> [b, 1, t, s + p]: the virtual tokens are seen by all that follow.
        rows = mask.flatten(0, 2)[..., None]
        seen = rows.new_full((len(rows), len(cache.at), 1), float(mask.dtype == torch.bool))
        wide = insert(rows, seen, cache.at)[..., 0].unflatten(0, mask.shape[:3])
        return args, {**kwargs, "attention_mask": wide}

    def leave(self, output: Any, at: Sequence[int]) -> Any:
        output = super().leave(output, at)
        t = output.last_hidden_state.shape[1]
        # Its cache is told by its class: versions of transformers give the field different names.
        for name, value in list(output.items()):
            if isinstance(value, EncoderDecoderCache):
                output[name] = WordCache(value, [min(k, t) for k in at])
        return output
