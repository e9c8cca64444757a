"""Load a shipped CLIP as open_clip's class or as transformers' class, with what feeds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import ImageSpec, Loaded

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"


def load_clip(folder: Path, name: str, flavour: str) -> Loaded:
    """Load `folder` (open_clip's local-dir layout with a CLIP tokenizer) in float32, eval mode.

    Args:
        folder: holds open_clip_config.json, open_clip_model.safetensors and the tokenizer's files.
        name: the model's name in the zoo.
        flavour: "open_clip" or "hf".
    """
    from mmtune.backbones import backbone_of
    from mmtune.backbones.loading import open_clip_loaded

    if flavour == "open_clip":
        return open_clip_loaded(f"local-dir:{folder}", None, f"zoo:{name}")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    context_length = config["model_cfg"]["text_cfg"]["context_length"]
    model, tokenize, count = hf_model(folder, config["model_cfg"], context_length)
    preprocess = config["preprocess_cfg"]
    return Loaded(
        model=model.eval(),
        backbone=backbone_of(model),
        image=ImageSpec(
            size=config["model_cfg"]["vision_cfg"]["image_size"],
            mean=tuple(preprocess["mean"]),
            std=tuple(preprocess["std"]),
            interpolation=preprocess["interpolation"],
            resize=preprocess["resize_mode"],
        ),
        tokenize=tokenize,
        context_length=context_length,
        name=f"zoo:{name}",
        count_tokens=count,
    )


_Tokenize = Callable[[Sequence[str]], "dict[str, Tensor]"]


def hf_model(
    folder: Path, model_cfg: dict[str, Any], context_length: int
) -> tuple[nn.Module, _Tokenize, Callable[[str], int]]:
    """The CLIPModel, its tokenize function and its token counter."""
    from safetensors.torch import load_file
    from transformers import CLIPModel, CLIPTokenizer

    from mmtune.zoo.conversion import hf_config, to_hf

    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    model = CLIPModel(hf_config(model_cfg, tokenizer.pad_token_id))
    state = {key: value.float() for key, value in load_file(folder / WEIGHTS).items()}
    missing, unexpected = model.load_state_dict(to_hf(state), strict=False)
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing or unexpected:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit its config: missing {missing[:4]}, "
            f"unexpected {unexpected[:4]}. Restore the file."
        )

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        found = tokenizer(
            list(texts),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=context_length,
        )
        return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}

    return model, tokenize, lambda text: len(tokenizer(text).input_ids)
