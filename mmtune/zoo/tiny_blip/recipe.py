"""The numbers of the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from mmtune.zoo.tiny_clip.recipe import Recipe


@dataclass(frozen=True)
class BlipRecipe(Recipe):
    """Every number of the recipe; each is an option of the command line.

    What `tiny-clip` has too keeps its name, and its value where none is given here.
    """

    vocab_size: int = 5120
    text_width: int = 256  # the stock decoder wants that of the vision tower
    text_heads: int = 4
    icon_share: float = 0.35
    teacher_steps: int = 600
    teacher_rate: float = 0.0
    scales: int = 1
    steps: int = 6000
    seconds: int = 270
    batch: int = 256
    mixed: int = 128
    rate: float = 7e-4
    vision_rate: float = 3e-4
    start: str = "tiny-clip"  # whose vision tower is the beginning; "" draws it at random
    dropout: float = 0.1  # of the text encoder and decoder, in training only
    temperature: float = 0.07  # of the contrast; transformers' BLIP has none of its own
    smoothing: float = 0.1  # of the labels of captions
    vqa_images: int = 128  # a step
    vqa_asked: int = 4  # questions an image and step
    vqa_limit: int = 0  # training images used; 0 means all
    vqa_kinds: str = (
        "has-shape,lacks-shape,has-color"  # what is asked in training; "" shows none of easy-vqa
    )
    vqa_strength: float = 0.3  # of the augmentation of their pictures
    shape_captions: int = 1  # 1: "blue triangle" and the like are captions to learn
    weight_matching: float = 1.0
    weight_caption: float = 1.0
    weight_answer: float = 1.0
