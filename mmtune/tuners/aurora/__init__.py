"""Aurora: mode approximation with factors shared by all layers and branches."""

from __future__ import annotations

from mmtune.tuners.aurora.config import AuroraConfig
from mmtune.tuners.aurora.context import PooledContext, context_of
from mmtune.tuners.aurora.factors import ModeFactors
from mmtune.tuners.aurora.layer import AuroraLinear
from mmtune.tuners.aurora.model import AuroraModel
from mmtune.tuners.registry import Method, config_of, options_of

PEFT_METHODS = {AuroraConfig.peft_name: (AuroraConfig, AuroraModel)}
METHODS = (
    Method(
        name="aurora",
        summary="mode approximation: CP factors shared by layers and branches; gate and context",
        source="arXiv 2305.08381 (NeurIPS 2023)",
        options=options_of(AuroraConfig, leave_out=["adapted"]),
        build=config_of(AuroraConfig),
    ),
)

__all__ = [
    "METHODS",
    "PEFT_METHODS",
    "AuroraConfig",
    "AuroraLinear",
    "AuroraModel",
    "ModeFactors",
    "PooledContext",
    "context_of",
]
