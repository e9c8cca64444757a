"""Adapters that nobody trained, large enough to change what is found."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model


def random_adapter(loaded, folder, roles=("q", "v")):
    """A LoRA of random factors on these sites of the model, saved."""
    loaded.backbone.prepare()
    paths = [site.path for site in loaded.backbone.select(["vision", "text"], list(roles))]
    torch.manual_seed(0)
    model = get_peft_model(
        loaded.model, LoraConfig(r=4, target_modules=paths, init_lora_weights=False)
    )
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
