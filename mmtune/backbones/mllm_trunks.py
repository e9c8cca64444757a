"""Trunks of multimodal language models: inner vision features, learned queries, a cached LM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtune.backbones.attention import cache_of
from mmtune.backbones.trunks import Trunk, insert
from mmtune.constants import constant


@dataclass(frozen=True)
class FeatureTrunk(Trunk):
    """A vision encoder whose reader takes the hidden states of an inner layer.

    They are read before the encoder's output could be stripped, so virtual tokens leave at the
    reader's input (`exit`).

    Attributes:
        cropped: tokens that the reader is not given: 1 where the class token is cut off.
    """

    cropped: int = 0

    def leave(self, output: Any, at: Sequence[int]) -> Any:
        if min(at) < self.cropped:
            raise ValueError(
                f"virtual tokens must enter this vision tower behind its class token: positions "
                f">= {self.cropped}, got {min(at)}"
            )
        return super().leave(output, [k - self.cropped for k in at])


@dataclass(frozen=True)
class QueryTrunk(Trunk):
    """The Q-Former's encoder, which treats its first `query_length` tokens as queries.

    Virtual tokens are queries too: they read the image through cross-attention and pass through
    the queries' feed-forward.
    """

    def enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor, at: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().enter(args, kwargs, tokens, at)
        kwargs = kwargs | {"query_length": kwargs["query_length"] + len(at)}
        image_mask = kwargs.get("encoder_attention_mask")
        if image_mask is not None:
            # Which patches exist is the same for every query: one row serves all.
            kwargs["encoder_attention_mask"] = image_mask[..., :1, :]
        return args, kwargs


@dataclass(frozen=True)
class LanguageTrunk(Trunk):
    """A language model's inner module, called by keyword with embeddings and a mask [b, t].

    Virtual tokens enter as embeddings, before positions are known, and so take positions like any
    prompt: later words move on by as many. They are computed once; a cached continuation only
    counts them.
    """

    def entering(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        cache = cache_of(kwargs)
        return cache is None or int(cache.get_seq_length()) == 0

    def enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor, at: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = self._hidden(args, kwargs)
        words = {"input_ids": None, "inputs_embeds": insert(x, tokens.to(x), at)}
        return args, _counted(kwargs, at, x.shape[1] + len(at)) | words

    def carry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], at: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, _counted(kwargs, at, self._hidden(args, kwargs).shape[1])

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None:
            return embeds
        assert self.embed is not None
        return self.embed(kwargs["input_ids"])


@dataclass(frozen=True)
class GridTrunk(LanguageTrunk):
    """A language model whose position ids are [3, b, t] (or [4, b, t], those of words first).

    An image's tokens have positions in a grid, so positions cannot be counted from the mask. A
    virtual token takes the position that a word would have there, and what follows moves on by one.
    """

    def enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor, at: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions, mask = _grids(kwargs), kwargs.get("attention_mask")
        kwargs = kwargs if positions is None else kwargs | {"position_ids": None}
        args, kwargs = super().enter(args, kwargs, tokens, at)
        if positions is not None:
            kwargs["position_ids"] = _moved(positions, mask, at)
        here = kwargs.get("visual_pos_masks")
        if here is not None:
            none = here.new_zeros(len(here), len(at), 1)
            kwargs["visual_pos_masks"] = insert(here[..., None], none, at)[..., 0]
        return args, kwargs

    def carry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], at: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = _grids(kwargs)
        args, kwargs = super().carry(args, kwargs, at)
        if positions is not None:
            kwargs["position_ids"] = positions + len(at)
        return args, kwargs


def _grids(kwargs: dict[str, Any]) -> Tensor | None:
    """The positions in time, height and width [3, b, t] of a call; None where it gives none."""
    positions = kwargs.get("position_ids")
    return positions[-3:] if positions is not None and positions.dim() == 3 else None


def _moved(positions: Tensor, mask: Tensor | None, at: Sequence[int]) -> Tensor:
    """[3, b, t + p]: the positions [3, b, t] of a call with virtual tokens `at` [p] in it."""
    t, order = positions.shape[-1], sorted(range(len(at)), key=lambda j: at[j])
    latest = positions.amax(0)
    if mask is not None:
        latest = latest.masked_fill(mask == 0, -1)
    # The position that a word before token k would have.
    free = torch.nn.functional.pad(latest.cummax(-1).values + 1, (1, 0))
    own = torch.stack([free[:, min(at[j], t)] + order.index(j) for j in range(len(at))], dim=1)
    shift = constant([sum(k <= i for k in at) for i in range(t)], positions.device)
    moved = (positions + shift).permute(1, 2, 0)
    return insert(moved, own[..., None].expand(-1, -1, 3), at).permute(2, 0, 1)


def _counted(kwargs: dict[str, Any], at: Sequence[int], new: int) -> dict[str, Any]:
    """The arguments of a call over `new` tokens, with virtual ones in its mask and positions.

    Positions are counted from the mask, as `generate` counts them, so that padding on the left
    does not move words away from the virtual tokens. Without a mask the model counts by itself.

    Raises:
        ValueError: a mask that is not [b, t], or packed samples.
    """
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None:
        if positions is not None and bool((positions.diff() < 0).any()):
            raise ValueError(
                "virtual tokens cannot enter packed samples (position_ids that start again): give "
                "each sample a row of its own, padded, with an attention_mask"
            )
        return kwargs | {"position_ids": None} if "position_ids" in kwargs else kwargs
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"virtual tokens need the language model's attention_mask as [b, t], got {shape}: pass "
            "the padding mask (in `generate`: the default dynamic cache)"
        )
    ones = torch.ones(len(mask), len(at), 1, dtype=mask.dtype, device=mask.device)
    wide = insert(mask[..., None], ones, at)[..., 0]
    kwargs = kwargs | {"attention_mask": wide}
    if "position_ids" in kwargs:
        counted = (wide.long().cumsum(-1) - 1).clamp(min=0)
        kwargs["position_ids"] = counted[:, -new:]
    return kwargs
