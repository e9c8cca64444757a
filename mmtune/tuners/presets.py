"""Methods that PEFT already has, aimed at sites."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmtune.backbones import backbone_of
from mmtune.tuners.registry import Method
from mmtune.tuners.sited import require_linear

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


@dataclass
class LoraOptions:
    """LoRA: an update of low rank beside each chosen weight, which stays as it is.

        W x + (alpha / rank) B A x,    A [rank, d_in] drawn, B [d_out, rank] zero at the start

    A fresh adapter changes nothing.

    Trainable parameters: rank (d_in + d_out) for each adapted weight.

    Attributes:
        rank: r, columns of B.
        alpha: the update is (alpha / rank) B A.
        dropout: probability of dropping an input feature of the update.
        branches: branches to adapt; None means all.
        sites: roles to adapt, or branch -> roles.
        layers: "all", "first:N", "last:N", or indices within each branch.
        branch_ranks: branch -> rank.
        rslora: scale by alpha / sqrt(rank) instead.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    branches: list[str] | None = None
    sites: list[str] | dict[str, list[str]] = field(default_factory=lambda: ["q", "v"])
    layers: Any = "all"
    branch_ranks: dict[str, int] = field(default_factory=dict)
    rslora: bool = False


def lora_config(
    model: nn.Module, options: LoraOptions | None = None, **settings: Any
) -> LoraConfig:
    """PEFT's LoraConfig for the chosen sites of `model`, whose fused attention it splits.

    Args:
        model: a stock model that some backbone describes.
        options: the settings; or give them by keyword.
        **settings: fields of LoraOptions.

    Source:
        LoRA, arXiv 2106.09685; the implementation is PEFT's.
    """
    from peft import LoraConfig

    chosen = options if options is not None else LoraOptions(**settings)
    return LoraConfig(**aimed(model, chosen, "lora"))


def aimed(model: nn.Module, options: LoraOptions, method: str) -> dict[str, Any]:
    """The arguments of a LoraConfig for the chosen sites of `model`, which it prepares.

    Raises:
        SiteError: the sites do not exist, or are no Linears; the message names `method`.
    """
    backbone = backbone_of(model)
    backbone.prepare()
    sites = backbone.select(options.branches, options.sites, options.layers)
    require_linear(sites, method)
    ranks = {
        only([s.path for s in sites if s.branch == branch]): rank
        for branch, rank in options.branch_ranks.items()
    }
    return {
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": only([s.path for s in sites]),
        "rank_pattern": ranks,
        "use_rslora": options.rslora,
    }


def only(paths: list[str]) -> str:
    """A pattern that matches these paths from their start, and nothing else.

    PEFT would match a plain path as a suffix: open_clip's text layer `transformer.resblocks.0` is a
    suffix of its vision layer's path.
    """
    return r"(?<!.)(?:" + "|".join(re.escape(p) for p in paths) + ")"


METHODS = (
    Method(
        name="lora",
        summary="low-rank update of chosen weights (PEFT's LoRA, aimed at sites)",
        source="arXiv 2106.09685 (ICLR 2022)",
        options=LoraOptions,
        build=lora_config,
    ),
)
