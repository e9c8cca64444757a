"""The numbers of the recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DiffusionRecipe:
    """Every number of the recipe; each is an option of the command line."""

    seed: int = 0
    text: str = "tiny-clip"  # whose text tower reads the prompts
    size: int = 96  # pixels
    limit: int = 0  # training drawings used of each data set; 0 means all
    variants: int = 6  # texts a drawing
    icon_share: float = 0.6  # of a batch, where icons are given
    strength: float = 1.0  # of moving and scaling
    coder_width: int = 32  # channels of the autoencoder at full size
    coder_deep: int = 64  # likewise at its two smaller sizes
    channels: int = 4  # of a latent, which has a quarter of the picture's edge
    coder_steps: int = 3000
    coder_seconds: int = 0  # above 0: the steps that fit into so many seconds, by the pace measured
    coder_batch: int = 128
    coder_rate: float = 1e-3
    weight_edges: float = 1.0  # of the differences between neighbouring pixels
    weight_kl: float = 3e-4
    copies: int = 6  # latents kept of each drawing, each moved and scaled otherwise
    width: int = 64  # channels of the UNet at its largest size
    deep: int = 128  # likewise at the two smaller sizes
    dropout: float = 0.0
    steps: int = 6000
    seconds: int = 0  # above 0: the steps that fit into so many seconds, by the pace measured
    batch: int = 512
    rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 300
    average: float = 0.999
    empty: float = 0.1  # share of prompts that are left empty, for guidance
    check_every: int = 100  # seconds
    graphs: int = 0  # 1: CUDA graphs of the forward and backward passes
