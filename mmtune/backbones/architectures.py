"""Sizes of the published models that configs name, without a hub: random weights, stand-in words.

What is built here has the size of the real thing and none of its knowledge: it serves to count
parameters, to estimate memory (`mmtune train --dry-run`) and to time steps (`mmtune rehearse`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mmtune.backbones.base import ImageSpec

if TYPE_CHECKING:
    from torch import nn

BLIP_CLASSES = {
    "retrieval": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
    "caption": "BlipForConditionalGeneration",
}
BLIP_HEAD = 64  # width of an attention head, in both towers of base and large
BLIP_VISION = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096},
}
# Folders that `mmtune convert blip` writes are known by such a name.
CONVERTED = re.compile(r"blip-(base|large)-(retrieval|vqa|caption)-(\d+)")

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Words that a stand-in tokenizer knows besides "word7" (id 7), one token each; so do most others.
WORDS = """
    man woman dog cat bird horse child boy girl people house street road car bus train boat
    plane bike tree flower grass field beach water river sea sky cloud sun snow rain hill rock
    sand city park yard room table chair bed door window wall floor lamp clock book phone screen
    cup plate bowl bottle knife bread cake fruit apple orange pizza salad meat fish egg red blue
    green yellow black white brown gray pink purple big small tall short long old young new wet
    dry open closed empty full happy standing sitting walking running riding holding eating
    looking playing jumping sleeping reading wearing near under over behind beside with and the
    a of in on at to from two three four five six hat shirt coat shoe bag ball game team player
    helmet glove board wave light dark sign fence bridge tower church store kitchen office
    school garden farm forest lake mountain animal sheep cow bear duck frog toy box wheel engine
    truck kite umbrella camera mirror
""".split()
FIRST_WORD = 1000  # the id of the first of them


@dataclass(frozen=True)
class Architecture:
    """A stock model without its weights.

    Attributes:
        config: makes the transformers config; `architectures[0]` names the stock class.
        image: how pixels become its input.
        special: token -> id, of a stand-in tokenizer; other ids are words.
        roles: what transformers calls those tokens: "pad_token" -> token.
        frame: what stands around a text.
    """

    config: Callable[[], Any]
    image: ImageSpec
    special: Mapping[str, int]
    roles: Mapping[str, str]
    frame: str

    def model(self) -> nn.Module:
        """The stock model with random weights."""
        import transformers

        config = self.config()
        return getattr(transformers, config.architectures[0])(config)

    def tokenizer(self) -> Any:
        """A tokenizer with the real one's size and special ids, but words of its own."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        taken = {index: token for token, index in self.special.items()}
        taken |= {FIRST_WORD + number: word for number, word in enumerate(WORDS)}
        size = self.config().text_config.vocab_size
        vocabulary = {taken.get(i, f"word{i}"): i for i in range(size)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token=self.roles["unk_token"]))
        words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
        words.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=self.frame, special_tokens=list(self.special.items())
        )
        words.add_special_tokens(list(self.special))
        return PreTrainedTokenizerFast(tokenizer_object=words, **self.roles)


def blip_config(
    kind: str,
    vision: Mapping[str, Any],
    text: Mapping[str, Any] | None = None,
    embedding: int = 256,
) -> Any:
    """The stock config of a BLIP model as the original code has it.

    transformers' defaults differ in three places: 8 text heads instead of 12, an epsilon of 1e-5
    instead of 1e-6 in the vision tower, and a vision tower that starts next to zero. What it has no
    name for is `match_token_id`: [ENC], the last word, begins a text that is read with an image.
    """
    from transformers import BlipConfig

    width = dict(text or {}).get("hidden_size", 768)
    config: Any = BlipConfig(
        text_config={"num_attention_heads": width // BLIP_HEAD, **(text or {})},
        vision_config={"layer_norm_eps": 1e-6, "initializer_range": 0.02, **vision},
        image_text_hidden_size=embedding,
        architectures=[BLIP_CLASSES[kind]],
    )
    if kind != "caption":
        config.match_token_id = config.text_config.vocab_size - 1
    return config


def _blip(kind: str, size: str, pixels: int) -> Architecture:
    vision = BLIP_VISION[size]
    vision = {**vision, "num_attention_heads": vision["hidden_size"] // BLIP_HEAD}
    return Architecture(
        partial(blip_config, kind, {**vision, "image_size": pixels}),
        ImageSpec(pixels, MEAN, STD, resize="squash"),
        {
            "[PAD]": 0,
            "[UNK]": 100,
            "[CLS]": 101,
            "[SEP]": 102,
            "[MASK]": 103,
            "[DEC]": 30522,
            "[ENC]": 30523,
        },
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "bos_token": "[DEC]",
        },
        "[CLS] $A [SEP]",
    )


def _clip_config(vision: Mapping[str, int], text: Mapping[str, int], embedding: int) -> Any:
    from transformers import CLIPConfig

    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return CLIPConfig(
        text_config={**text, **ends},
        vision_config=dict(vision),
        projection_dim=embedding,
        architectures=["CLIPModel"],
    )


def _clip(patch: int, pixels: int = 224, large: bool = False) -> Architecture:
    width, text_width, embedding = (1024, 768, 768) if large else (768, 512, 512)
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 24 if large else 12,
        "num_attention_heads": width // 64,
        "patch_size": patch,
        "image_size": pixels,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": 12,
        "num_attention_heads": text_width // 64,
    }
    start, end = "<|startoftext|>", "<|endoftext|>"
    return Architecture(
        partial(_clip_config, vision, text, embedding),
        ImageSpec(pixels, MEAN, STD),
        {start: 49406, end: 49407},
        {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end},
        f"{start} $A {end}",
    )


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "blip-itm-base-coco": partial(_blip, "retrieval", "base", 384),
    "blip-itm-base-flickr": partial(_blip, "retrieval", "base", 384),
    "blip-itm-large-coco": partial(_blip, "retrieval", "large", 384),
    "blip-itm-large-flickr": partial(_blip, "retrieval", "large", 384),
    "blip-vqa-base": partial(_blip, "vqa", "base", 384),
    "blip-vqa-capfilt-large": partial(_blip, "vqa", "base", 384),
    "blip-image-captioning-base": partial(_blip, "caption", "base", 384),
    "blip-image-captioning-large": partial(_blip, "caption", "large", 384),
    "clip-vit-base-patch16": partial(_clip, 16),
    "clip-vit-base-patch32": partial(_clip, 32),
    "clip-vit-large-patch14": partial(_clip, 14, large=True),
    "clip-vit-large-patch14-336": partial(_clip, 14, 336, large=True),
}


def architecture(name: str) -> Architecture | None:
    """The architecture of a model known by its hub name, or by the name of a converted folder.

    Args:
        name: only its last part counts: Salesforce/blip-vqa-base, models/blip-base-retrieval-384.

    Returns:
        None where it is not known here.
    """
    last = name.rstrip("/").rpartition("/")[2]
    if last in ARCHITECTURES:
        return ARCHITECTURES[last]()
    if match := CONVERTED.fullmatch(last):
        return _blip(match[2], match[1], int(match[3]))
    return None
