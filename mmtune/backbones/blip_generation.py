"""BLIP's decoder of answers and captions, computed from its parts.

The stock class for questions smooths its loss and shows no scores, and transformers (5.17 to 5.24)
loses the mask of a question on its way to the decoder's cross-attention, so that an answer would
depend on how far its question was padded. Here that mask counts, as it does in BLIP's own code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mmtune.backbones.blip_attention import heed_masks
from mmtune.backbones.generation import Decoding, padded, positions

if TYPE_CHECKING:
    from torch import Tensor


def answers(stock: Any) -> bool:
    """Whether the model reads a question with the image before it decodes."""
    return hasattr(stock, "text_encoder")


def prompts(
    stock: Any, tokenizer: Any, texts: Sequence[str], limit: int | None
) -> dict[str, Tensor]:
    """Questions as the text encoder reads them, or beginnings of captions for the decoder."""
    text = stock.config.text_config
    if answers(stock):
        cut: dict[str, Any] = {"truncation": limit is not None, "max_length": limit}
        rows = tokenizer(list(texts), **cut)["input_ids"]
        # Checkpoints of the original code want [ENC] in front of what is read with an image.
        first = getattr(stock.config, "match_token_id", None)
        rows = rows if first is None else [[first, *row[1:]] for row in rows]
    else:
        words = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        kept = None if limit is None else max(limit - 1, 0)
        rows = [[text.bos_token_id, *row[:kept]] for row in words]
    ids, mask = padded(rows, text.pad_token_id, left=not answers(stock))
    return {"input_ids": ids, "attention_mask": mask}


def read(
    stock: Any, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> dict[str, Tensor]:
    """The states that the decoder attends to, with their mask, and the tokens it begins with.

    Args:
        stock: the model.
        pixel_values: [b, 3, s, s]; or [b, f, 3, s, s], f frames whose states stand side by side.
        input_ids: [b, t].
        attention_mask: [b, t].
    """
    states = image_states(stock, pixel_values)
    if not answers(stock):
        seen = attention_mask.new_ones(states.shape[:2])
        return {"states": states, "seen": seen, "ids": input_ids, "mask": attention_mask}
    heed_masks(stock.text_decoder.bert)
    question = stock.text_encoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        encoder_hidden_states=states,
        encoder_attention_mask=attention_mask.new_ones(states.shape[:2]),
    )
    begin = input_ids.new_full((len(input_ids), 1), stock.decoder_start_token_id)
    return {
        "states": question.last_hidden_state,
        "seen": attention_mask,
        "ids": begin,
        "mask": torch.ones_like(begin),
    }


def image_states(stock: Any, pixel_values: Tensor) -> Tensor:
    """[b, i, d] of images, or [b, f * i, d] of f frames each."""
    if pixel_values.dim() == 4:
        return stock.vision_model(pixel_values=pixel_values).last_hidden_state
    frames = stock.vision_model(pixel_values=pixel_values.flatten(0, 1)).last_hidden_state
    return frames.unflatten(0, pixel_values.shape[:2]).flatten(1, 2)


def continued(
    stock: Any, context: Mapping[str, Tensor], target_ids: Tensor, target_mask: Tensor
) -> Tensor:
    """[n, t, v] scores of the target tokens."""
    mask = torch.cat([context["mask"], target_mask[:, :-1]], dim=1)
    return stock.text_decoder(
        input_ids=torch.cat([context["ids"], target_ids[:, :-1]], dim=1),
        attention_mask=mask,
        position_ids=positions(mask),
        encoder_hidden_states=context["states"],
        encoder_attention_mask=context["seen"],
        logits_to_keep=target_ids.shape[1],
        use_cache=False,
    ).logits


def written(
    stock: Any, context: Mapping[str, Tensor], decoding: Decoding, ends: Sequence[int], pad: int
) -> Tensor:
    """[b, m] new tokens, no more than the decoder has positions for."""
    begun = context["ids"].shape[1]
    # The last token is written and not read: it needs no position.
    room = stock.config.text_config.max_position_embeddings - begun + 1
    found = stock.text_decoder.generate(
        input_ids=context["ids"],
        attention_mask=context["mask"],
        encoder_hidden_states=context["states"],
        encoder_attention_mask=context["seen"],
        **decoding.within(room).arguments(ends, pad),
    )
    return found[:, begun:]
