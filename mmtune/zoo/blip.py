"""One set of BLIP weights as the three stock classes of transformers, each tensor stored once.

BLIP's text encoder and its decoder share everything but self-attention. A folder holds
`vision.safetensors` and `text.safetensors`, which are a BlipForImageTextRetrieval, and
`decoder.safetensors` with what the decoder does not share: its self-attention and the head above.

One convention for texts, in all three classes: an encoder reads `[CLS] text [SEP]`, with or without
the image (BLIP's own code puts [ENC] first where the image is seen; the stock classes and their
processor do not). A decoder begins with [DEC], the config's bos_token_id, and ends with [SEP].

Source: BLIP (arXiv:2201.12086), section 3.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import ImageSpec, Loaded
from mmtune.runs import write_tensors, write_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import BlipConfig

CLASSES = {
    "retrieval": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
    "caption": "BlipForConditionalGeneration",
}
FILES = ("vision", "text", "decoder")
_OWN = re.compile(r"text_decoder\.(bert\.encoder\.layer\.\d+\.attention|cls\.predictions)\.")
_TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_encoder.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}


def source_of(name: str) -> str:
    """The stored tensor that fills the tensor `name` of any of the three classes."""
    if name in _TIED:
        return _TIED[name]
    if _OWN.match(name) or not name.startswith("text_decoder."):
        return name
    return name.replace("text_decoder.bert.", "text_encoder.", 1)


def file_of(stored: str) -> str:
    """Which of `FILES` holds a stored tensor."""
    if stored.startswith(("vision_model.", "vision_proj.")):
        return "vision"
    return "decoder" if stored.startswith("text_decoder.") else "text"


def tie(encoder: nn.Module, decoder: nn.Module) -> None:
    """Let a BlipTextLMHeadModel use a BlipTextModel's modules, all but self-attention and head."""
    e: Any = encoder
    d: Any = decoder
    d.bert.embeddings = e.embeddings
    for ours, theirs in zip(e.encoder.layer, d.bert.encoder.layer, strict=True):
        theirs.crossattention, theirs.intermediate = ours.crossattention, ours.intermediate
        theirs.output = ours.output
    d.cls.predictions.decoder.weight = e.embeddings.word_embeddings.weight
    d.cls.predictions.decoder.bias = d.cls.predictions.bias


def save_blip(tensors: Mapping[str, Tensor], config: BlipConfig, folder: Path) -> None:
    """Write config, image preprocessing and weights (fp16) beside the tokenizer.

    Args:
        tensors: by the names of any of the classes; tied ones may be there more than once.
        config: of the model.
        folder: the model folder.

    Raises:
        ValueError: tensors that should be one differ.
    """
    import torch

    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        source, half = source_of(name), tensor.detach().half().cpu().contiguous()
        if not torch.equal(stored.setdefault(source, half), half):
            raise ValueError(
                f"{name} differs from {source}, with which it must be tied: call tie()"
            )
    for file in FILES:
        chosen = {name: t for name, t in stored.items() if file_of(name) == file}
        write_tensors(folder / f"{file}.safetensors", chosen, {"format": "pt"})
    vision: Any = config.vision_config
    side = vision.image_size
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": True,
    }
    write_text(folder / "preprocessor_config.json", json.dumps(processor, indent=1) + "\n")
    content = config.to_diff_dict() | {"architectures": list(CLASSES.values())}
    write_text(folder / "config.json", json.dumps(content, indent=1) + "\n")


def blip_model(folder: Path, flavour: str) -> nn.Module:
    """The stock class of a flavour, filled from `folder`, in float32 and eval mode.

    Encoder and decoder get tensors of their own, equal to begin with, so that either can be tuned.

    Raises:
        ValueError: the weights do not fit the config.
    """
    import transformers

    model: Any = getattr(transformers, CLASSES[flavour])(blip_config(folder))
    wanted = {name: source_of(name) for name in model.state_dict()}
    stored = _stored(folder, {file_of(source) for source in wanted.values()})
    missing = sorted(set(wanted.values()) - set(stored))
    if missing:
        raise ValueError(
            f"{folder} lacks tensors for {CLASSES[flavour]}: {missing[:4]}. Restore it."
        )
    try:
        model.load_state_dict({name: stored[source] for name, source in wanted.items()})
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights do not fit config.json: {error}") from None
    return model.eval()


def blip_config(folder: Path) -> BlipConfig:
    """The config of all three classes."""
    from transformers import BlipConfig

    return BlipConfig.from_pretrained(str(folder))


def blip_tokenizer(folder: Path) -> Any:
    """The BertTokenizer of a model folder."""
    from transformers import BertTokenizer

    return BertTokenizer.from_pretrained(str(folder))


def load_blip(folder: Path, name: str, flavour: str) -> Loaded:
    """Load `folder` as one of the three classes with what feeds it.

    Args:
        folder: as `save_blip` writes it, with the tokenizer's files.
        name: the model's name in the zoo.
        flavour: a key of `CLASSES`.
    """
    from mmtune.backbones.loading import hf_loaded

    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    spec = ImageSpec(
        size=settings["size"]["height"],
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
        interpolation="bicubic",
        resize="squash",
    )
    model, tokenizer = blip_model(folder, flavour), blip_tokenizer(folder)
    return hf_loaded(model, tokenizer, spec, f"zoo:{name}@{flavour}")


def _stored(folder: Path, files: Iterable[str]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor.float()
        for file in files
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }
