"""The numbers of the recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Every number of the recipe; each is an option of the command line."""

    seed: int = 0
    vocab_size: int = 8192
    context: int = 32
    image_size: int = 96
    patch_size: int = 8
    vision_width: int = 256
    vision_layers: int = 6
    vision_heads: int = 4
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 3
    embed: int = 256
    variants: int = 6
    limit: int = 0  # training drawings used; 0 means all
    icon_share: float = 0.5  # of a batch, where icons are given
    words: int = 0  # extra words used; 0 means all
    teacher_size: int = 144
    teacher_steps: int = 400
    teacher_batch: int = 512
    teacher_rate: float = 3e-4  # 0 leaves EfficientNet as it is
    scales: int = 0  # 1: the teacher's features come from all of its depths, not the last alone
    steps: int = 7000
    seconds: int = 0  # above 0: the steps that fit into so many seconds, by the pace measured
    batch: int = 512
    mixed: int = 256  # pictures a step, mixed of two, that only the teacher labels
    recolour: float = 0.0  # share of the mixed ones that get other colours
    rate: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 300
    average: float = 0.999
    path_drop: float = 0.1
    soft_share: float = 0.3
    soft_sharpness: float = 20.0
    weight_contrast: float = 1.0
    weight_picture: float = 2.0
    weight_feature: float = 1.0
    weight_text: float = 2.0
    weight_sentence: float = 1.0
    check_every: int = 1000
    compile: int = 0  # 1: torch.compile of the networks
