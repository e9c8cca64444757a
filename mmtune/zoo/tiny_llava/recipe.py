"""The numbers of the recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LlavaRecipe:
    """Every number of the recipe; each is an option of the command line."""

    seed: int = 0
    start: str = "tiny-clip"  # whose vision tower is the beginning
    patch_size: int = 12  # pixels; that of the start is 8: 64 image tokens in place of 144
    rank: int = 64  # of the deltas of the tower's matrices
    limit: int = 0  # training drawings used of each data set; 0 means all
    icon_share: float = 0.5  # of the pictures of a batch, where icons are given
    shape_share: float = 0.15  # of the pictures of a batch, from easy-vqa
    asked: int = 24  # questions drawn for each picture before training
    name_share: float = 0.35  # of a drawing's questions; likewise below
    kind_share: float = 0.2
    presence_share: float = 0.25
    choice_share: float = 0.2
    kept: int = 4096  # answers are told from the first so many tokens, and those of all questions
    distil_steps: int = 600  # in which the tower learns what that of the start sees
    distil_batch: int = 768
    distil_rate: float = 1e-3
    steps: int = 569
    seconds: int = 0  # above 0: the steps that fit into so many seconds, by the pace measured
    batch: int = 512
    rate: float = 1e-3  # of the projector
    vision_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup: int = 100
    average: float = 0.998
    path_drop: float = 0.1
    strength: float = 1.0  # of the augmentation of drawings
    shape_strength: float = 0.3  # of that of shapes
    weight_distil: float = 0.5  # of the start's view of the same pictures, beside the answers
    check_every: int = 400
    check_limit: int = 150  # pictures of each val split that are asked about
    compile: int = 0  # 1: torch.compile of the layers
