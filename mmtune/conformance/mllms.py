"""Tiny multimodal language models with random weights, and their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmtune.backbones.base import Backbone

PAD, BEGIN, END, IMAGE_TOKEN, VOCABULARY = 0, 1, 2, 59, 60
# Learned queries of BLIP-2, patches of LLaVA: both models put 4 image tokens before the words.
IMAGE_TOKENS, WORDS, IMAGE = 4, 6, 32

_LANGUAGE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": IMAGE,
    "patch_size": 16,
}


def _blip2(language: Any, **changes: Any) -> nn.Module:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    qformer = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 48,
        "cross_attention_frequency": 1,
        "vocab_size": VOCABULARY,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = Blip2Config(
        vision_config=_VISION,
        qformer_config=qformer | changes,
        text_config=language.to_dict(),
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
    )
    return Blip2ForConditionalGeneration(config)


def blip2_opt(**changes: Any) -> nn.Module:
    """BLIP-2 with OPT; `changes` are of the Q-Former's config."""
    from transformers import OPTConfig

    language = OPTConfig(
        **_LANGUAGE,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=128,
        num_hidden_layers=2,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return _blip2(language, **changes)


def blip2_t5(feed_forward: str = "gated-gelu") -> nn.Module:
    """BLIP-2 with T5: encoder, decoder, no biases; Flan-T5's MLP is gated, T5's ("relu") is not."""
    from transformers import T5Config

    words: dict[str, Any] = _LANGUAGE | {"decoder_start_token_id": PAD}
    language = T5Config(
        **words,
        d_model=32,
        d_kv=8,
        d_ff=128,
        num_layers=2,
        feed_forward_proj=feed_forward,
        dropout_rate=0.0,
        initializer_factor=0.5,  # logits of order 1, which virtual tokens move beyond rounding
    )
    return _blip2(language)


def llava(language: str = "llama", **changes: Any) -> nn.Module:
    """LLaVA with grouped-query attention; its last vision layer, the third, is never read."""
    from transformers import (
        AutoConfig,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    words = AutoConfig.for_model(
        language,
        **_LANGUAGE,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    tower: dict[str, Any] = _VISION | {"num_hidden_layers": 3}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=words,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=IMAGE_TOKENS,
        **changes,
    )
    return LlavaForConditionalGeneration(config)


def images_and_prompts(seed: int, size: int) -> dict[str, Tensor]:
    """Images with prompts of different lengths: image tokens, words, padding on the right."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_TOKEN, (size, IMAGE_TOKENS + WORDS), generator=g)
    ids[:, :IMAGE_TOKENS], ids[:, IMAGE_TOKENS] = IMAGE_TOKEN, BEGIN
    lengths = IMAGE_TOKENS + WORDS - torch.arange(size) % 3
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {
        "pixel_values": torch.randn(size, 3, IMAGE, IMAGE, generator=g),
        "input_ids": ids.masked_fill(mask == 0, PAD),
        "attention_mask": mask,
    }


def images_prompts_and_answers(seed: int, size: int) -> dict[str, Tensor]:
    """The same with the beginnings of answers, as an encoder-decoder wants them."""
    g = torch.Generator().manual_seed(seed + 1)
    answers = torch.randint(3, IMAGE_TOKEN, (size, WORDS), generator=g)
    answers[:, 0] = PAD
    return images_and_prompts(seed, size) | {"decoder_input_ids": answers}


def logits(model: nn.Module, view: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    """[b, t, v]: scores of every next token."""
    return model(**batch).logits
