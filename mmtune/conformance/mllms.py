"""Tiny multimodal language models with random weights, and their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmtune.backbones.base import Backbone

PAD, BEGIN, END, IMAGE_TOKEN, VOCABULARY = 0, 1, 2, 59, 60
# Learned queries of BLIP-2, patches of LLaVA: both models put 4 image tokens before the words.
IMAGE_TOKENS, WORDS, IMAGE = 4, 6, 32
PINPOINTS = [[32, 32], [32, 64], [64, 32]]  # heights and widths that OneVision enlarges images to

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


def minigpt4() -> nn.Module:
    """MiniGPT-4: BLIP-2's layout with a Llama, whose image stands where its placeholders are."""
    from transformers import LlamaConfig

    language = LlamaConfig(
        **_LANGUAGE,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return _blip2(language)


def llava_onevision() -> nn.Module:
    """LLaVA-OneVision with SigLIP and Qwen2; images become at most two tiles of 32 pixels."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    words = Qwen2Config(
        **_LANGUAGE,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=words,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def qwen_vl(generation: str = "qwen2_5_vl") -> nn.Module:
    """Qwen-VL: qwen2_vl, qwen2_5_vl (windows in its first layer) or qwen3_vl (one deepstack)."""
    import transformers

    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[generation]
    vision: dict[str, Any] = {"depth": 2, "num_heads": 3, "patch_size": 4, "hidden_size": 48}
    if generation == "qwen2_vl":
        vision |= {"embed_dim": 48, "hidden_size": 32}
    else:
        vision |= {"intermediate_size": 192, "out_hidden_size": 32}
    if generation == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if generation == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    words: dict[str, Any] = _LANGUAGE | {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        text_config=words,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=PAD,  # which word tokenizers give for what they do not know
        vision_end_token_id=PAD,
        video_token_id=5,
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


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


def _prompts(counts: Sequence[int], g: torch.Generator) -> dict[str, Tensor]:
    """Prompts of images with these numbers of tokens: image, begin, words, padding on the right."""
    longest = max(counts) + WORDS
    ids = torch.full((len(counts), longest), PAD)
    for row, count in enumerate(counts):
        length = count + WORDS - row % 3
        ids[row, :count], ids[row, count] = IMAGE_TOKEN, BEGIN
        ids[row, count + 1 : length] = torch.randint(
            6, IMAGE_TOKEN, (length - count - 1,), generator=g
        )
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def tiles_and_prompts(seed: int, size: int) -> dict[str, Tensor]:
    """Tiles of squares and of images twice as wide as high, with prompts, as OneVision reads them.

    A square has 4 tokens as a whole and 2 lines of 2 and a line break in its tile; another image
    has 4 and 2 lines of 4 and a line break in its two tiles.
    """
    g = torch.Generator().manual_seed(seed)
    wide = [row % 2 for row in range(size)]
    pixels = torch.randn(size, 3, 3, IMAGE, IMAGE, generator=g)
    for row, is_wide in enumerate(wide):
        pixels[row, 2 + is_wide :] = 0
    sizes = torch.tensor([[IMAGE, 2 * IMAGE] if is_wide else [IMAGE, IMAGE] for is_wide in wide])
    counts = [4 + 2 * (5 if is_wide else 3) for is_wide in wide]
    return {"pixel_values": pixels, "image_sizes": sizes, **_prompts(counts, g)}


def patches_and_prompts(seed: int, size: int) -> dict[str, Tensor]:
    """Patches of images of 16 x 16 and 16 x 32 pixels in one row, with prompts, for Qwen-VL."""
    g = torch.Generator().manual_seed(seed)
    grids = [[1, 4, 4 + 4 * (row % 2)] for row in range(size)]
    patches = [h * w for _, h, w in grids]
    found = _prompts([n // 4 for n in patches], g)
    return {
        "pixel_values": torch.randn(sum(patches), 3 * 2 * 4 * 4, generator=g),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (found["input_ids"] == IMAGE_TOKEN).int(),
        **found,
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
