"""A tiny chat model with random weights, as a folder of transformers."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.backbones.writers import word_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w3{% endif %}"
)


def chat_folder(path, template=TEMPLATE):
    """Words w3 … w58; its answers depend on what it reads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = word_tokenizer("<s> $A", {"<pad>": 0, "<s>": 1, "</s>": 2})
    tokenizer.eos_token = "</s>"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return f"hf:{path}"
