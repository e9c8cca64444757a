"""What the language models inside BLIP-2 and LLaVA share in scoring and writing text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def ends_of(model: Any) -> list[int]:
    """Ids that end a text, as the model's own `generate` takes them.

    Raises:
        ValueError: the model names none.
    """
    found = model.generation_config.eos_token_id
    found = model.config.get_text_config().eos_token_id if found is None else found
    if found is None:
        raise ValueError(f"the config of {type(model).__name__} names no eos_token_id; set one")
    return list(found) if isinstance(found, list | tuple) else [int(found)]


def decoded(lm: Any, context: Mapping[str, Tensor], target_ids: Tensor) -> Tensor:
    """[n, t, v]: the scores of target tokens by an encoder-decoder that has read its prompts."""
    import torch

    start = target_ids.new_full((len(target_ids), 1), lm.config.decoder_start_token_id)
    return lm(
        encoder_outputs=(context["states"],),
        attention_mask=context["mask"],
        decoder_input_ids=torch.cat([start, target_ids[:, :-1]], dim=1),
        use_cache=False,
        return_dict=True,
    ).logits


def written(model: Any, context: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Tensor:
    """[b, m] new tokens of a decoder-only model, or of an encoder-decoder (states in context)."""
    mask = context["mask"]
    if "states" not in context:
        return model.generate(inputs_embeds=context["embeds"], attention_mask=mask, **arguments)
    from transformers.modeling_outputs import BaseModelOutput

    states = BaseModelOutput(last_hidden_state=context["states"])
    found = model.generate(encoder_outputs=states, attention_mask=mask, **arguments)
    return found[:, 1:]  # without the token that begins a decoder


# What a generation config may say that does not change what is written greedily.
IDLE = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "use_cache"),
    *("transformers_version", "_from_model_config", "output_attentions", "output_hidden_states"),
}


def likeliest_alone(model: Any) -> bool:
    """Whether `generate` with one beam writes the likeliest token each time, nothing else."""
    return model.generation_config.to_diff_dict().keys() <= IDLE
