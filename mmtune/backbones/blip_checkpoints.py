"""Checkpoints of the original BLIP code, key by key into the stock classes of transformers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.backbones.architectures import BLIP_CLASSES, BLIP_HEAD, blip_config
from mmtune.backbones.original_checkpoints import (
    VISION_NAMES,
    CheckpointError,
    Converted,
    fill,
    interpolated,
    preprocessing,
    read_checkpoint,
    required,
    side_of,
    some,
)
from mmtune.suggestions import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER = "bert-base-uncased"
DECODE, ENCODE = "[DEC]", "[ENC]"  # what the original adds to BERT's vocabulary, in this order

# What a checkpoint holds beside the parameters of the model that is trained.
LEFT_OUT = {
    "momentum copies": re.compile(r"(\w+_m)\..*"),
    "queues": re.compile(r"(image_queue|text_queue|idx_queue|queue_ptr|ptr_queue)"),
    "temperature": re.compile(r"temp"),
    "position ids": re.compile(r"text_(encoder|decoder\.bert)\.embeddings\.position_ids"),
}
PARTS = {
    "retrieval": ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head"),
    "vqa": ("visual_encoder", "text_encoder", "text_decoder"),
    "caption": ("visual_encoder", "text_decoder"),
}
EVERY_PART = tuple(dict.fromkeys(part for parts in PARTS.values() for part in parts))
POSITIONS = "visual_encoder.pos_embed"
OUTPUT = "text_decoder.cls.predictions"
# Pairs that are one parameter in the fine-tuning classes of both codes. Those load the second name
# last, so its value is the one that they compute with.
TIED = {
    "text_decoder.bert.embeddings.word_embeddings.weight": f"{OUTPUT}.decoder.weight",
    f"{OUTPUT}.bias": f"{OUTPUT}.decoder.bias",
}


def convert(state: Mapping[str, Tensor], kind: str, image_size: int | None = None) -> Converted:
    """Put the tensors of a checkpoint into a stock model.

    Sizes are read from shapes: base and large differ in the vision tower alone. A part that the
    kind has no use for (the decoder of model_base.pth, for retrieval) is left out and counted, as
    momentum copies and queues are.

    Args:
        state: tensors by their original names.
        kind: retrieval, vqa or caption.
        image_size: pixels of the square images that the model is to take; None keeps those of the
            checkpoint. The position embeddings are interpolated where the size differs.

    Raises:
        CheckpointError: a key that is missing, unknown or of another shape than the stock class
            has; the message names it.
    """
    import transformers

    if kind not in PARTS:
        raise CheckpointError(
            f"no kind {kind!r} of BLIP model; there are {', '.join(PARTS)}."
            f"{did_you_mean(kind, PARTS)}"
        )
    used, left_out = _sorted_out(state, kind)
    config, trained_at = _config(used, kind, image_size)
    replaced = _tie(used)
    used[POSITIONS] = interpolated(used[POSITIONS], _grid(config))
    model = getattr(transformers, BLIP_CLASSES[kind])(config)
    fill(model, used, stock_name)
    temperature = float(state["temp"]) if "temp" in state else None
    return Converted(model.eval(), trained_at, dict(left_out), replaced, temperature)


def _sorted_out(state: Mapping[str, Tensor], kind: str) -> tuple[dict[str, Tensor], Counter[str]]:
    """(tensors that the kind uses, number of those left out by reason)."""
    used: dict[str, Tensor] = {}
    left_out: Counter[str] = Counter()
    unknown: list[str] = []
    for name, value in state.items():
        part = name.partition(".")[0]
        reason = next((r for r, names in LEFT_OUT.items() if names.fullmatch(name)), None)
        if reason is not None:
            left_out[reason] += 1
        elif part in PARTS[kind]:
            used[name] = value
        elif part in EVERY_PART:
            left_out[f"{part}, of which {kind} has none"] += 1
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} unknown key(s): {some(unknown)}. Expected "
            f"{', '.join(f'{part}.*' for part in EVERY_PART)}, momentum copies (*_m.*) and queues."
        )
    return used, left_out


def _config(used: Mapping[str, Tensor], kind: str, image_size: int | None) -> tuple[Any, int]:
    """The stock config that the shapes mean, and the image size that the checkpoint has."""
    text = "text_encoder" if "text_encoder" in PARTS[kind] else "text_decoder.bert"
    words = required(used, f"{text}.embeddings.word_embeddings.weight")
    patches = required(used, "visual_encoder.patch_embed.proj.weight")
    positions = required(used, POSITIONS)
    patch, side = patches.shape[-1], side_of(positions, POSITIONS)
    size = image_size or side * patch
    if size % patch:
        raise CheckpointError(
            f"the image size must be a multiple of the {patch} pixels of a patch, got {size}. "
            f"Try {max(1, round(size / patch)) * patch}."
        )
    layer, first = f"{text}.encoder.layer", "visual_encoder.blocks.0.mlp.fc1.weight"
    projection = used.get("vision_proj.weight")
    config = blip_config(
        kind,
        vision={
            "hidden_size": patches.shape[0],
            "intermediate_size": required(used, first).shape[0],
            "num_hidden_layers": _layers(used, "visual_encoder.blocks"),
            "num_attention_heads": _heads(POSITIONS, patches.shape[0]),
            "image_size": size,
            "patch_size": patch,
        },
        text={
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "intermediate_size": required(used, f"{layer}.0.intermediate.dense.weight").shape[0],
            "num_hidden_layers": _layers(used, layer),
            "num_attention_heads": _heads(text, words.shape[1]),
            "max_position_embeddings": required(
                used, f"{text}.embeddings.position_embeddings.weight"
            ).shape[0],
        },
        embedding=256 if projection is None else projection.shape[0],
    )
    return config, side * patch


def _layers(used: Mapping[str, Tensor], prefix: str) -> int:
    numbers = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found = [int(match[1]) for name in used if (match := numbers.match(name))]
    return 1 + max(found, default=-1)


def _heads(name: str, width: int) -> int:
    if width % BLIP_HEAD:
        raise CheckpointError(
            f"{name} is {width} wide, which is no multiple of the {BLIP_HEAD} of an attention head."
        )
    return width // BLIP_HEAD


def _grid(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def _tie(used: dict[str, Tensor]) -> list[str]:
    """Give tied names one value, and say which changed.

    Pre-training ends with them untied: there the bias of the output layer has two entries more than
    its twin, and the output matrix is not that of the word embeddings.
    """
    import torch

    changed = []
    for name, last in TIED.items():
        if name in used and last in used:
            if not torch.equal(used[name], used[last]):
                changed.append(name)
            used[name] = used[last]
    return changed


def stock_name(name: str) -> str | None:
    """The name in transformers of a parameter of the original code; None for an unknown one."""
    part, _, rest = name.partition(".")
    if part != "visual_encoder":
        return name
    for pattern, stock in VISION_NAMES:
        if match := re.fullmatch(pattern, rest):
            return f"vision_model.{match.expand(stock)}"
    return None


def write(
    path: str | Path,
    kind: str,
    out: Path,
    image_size: int | None = None,
    tokenizer: str = TOKENIZER,
) -> tuple[Converted, str | None]:
    """Convert a checkpoint file into a folder that `hf:FOLDER` and transformers load.

    Args:
        path: the checkpoint.
        kind: retrieval, vqa or caption.
        out: the folder to write: config, weights, image preprocessing, and the tokenizer where it
            is at hand.
        image_size: see `convert`.
        tokenizer: folder or hub name of BERT's tokenizer.

    Returns:
        The model, and what is wrong with the tokenizer where it could not be written.

    Raises:
        CheckpointError: see `convert`; or `out` exists.
    """
    from mmtune.runs import write_folder

    if out.exists():
        raise CheckpointError(f"{out} exists already. Choose another folder with --out.")
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}. Expected a checkpoint of BLIP (.pth).")
    converted = convert(read_checkpoint(path), kind, image_size)
    model: Any = converted.model
    vocabulary = model.config.text_config.vocab_size
    words, problem = _tokenizer(tokenizer, vocabulary)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        preprocessing(model.config.vision_config.image_size).save_pretrained(folder)
        if words is not None:
            words.save_pretrained(folder)

    write_folder(out, fill)
    return converted, problem


def _tokenizer(source: str, vocabulary: int) -> tuple[Any, str | None]:
    """BERT's tokenizer with BLIP's two tokens, or None and what is wrong."""
    from transformers import AutoTokenizer

    try:
        words: Any = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # hub, cache and parsing errors have no common base
        reason = str(error).strip().partition("\n")[0]
        return None, (
            f"no tokenizer {source!r}: it is no folder with tokenizer.json or vocab.txt, not in "
            f"the hub's cache, and not to be had from the hub ({type(error).__name__}: {reason})"
        )
    words.add_special_tokens({"bos_token": DECODE})
    words.add_tokens([ENCODE], special_tokens=True)
    found = {token: words.convert_tokens_to_ids(token) for token in (DECODE, ENCODE)}
    expected = {DECODE: vocabulary - 2, ENCODE: vocabulary - 1}
    if found != expected:
        return None, (
            f"{source!r} is not the tokenizer of this checkpoint: {DECODE} and {ENCODE} get the "
            f"ids {list(found.values())}, expected {list(expected.values())}; {TOKENIZER} has "
            "30522 entries"
        )
    return words, None
