"""MAM: a prefix for every attention, a scaled parallel adapter beside every MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mmtune.backbones.base import Backbone, Site
from mmtune.tuners.bottleneck import AdapterConfig, AdapterLayer, AdapterModel
from mmtune.tuners.registry import Method, config_of, options_of
from mmtune.tuners.sited import SitedConfig
from mmtune.tuners.virtual_keys import ATTENTIONS, VirtualKeys, VirtualKeysTuner


@dataclass
class MamConfig(SitedConfig):
    """The mix-and-match adapter: prefix tuning at attention, a scaled parallel adapter at the MLP.

        Attention(q, [P_K; K], [P_V; V])
        MLP(x) + s (W_up relu(W_down x + b_down) + b_up)

    W_up and the biases start at zero, the prefix does not: a fresh adapter differs from the base
    model by its prefix alone. A branch without an MLP of its own (BLIP's fusion) gets only the
    prefix.

    Trainable parameters of a branch of width d: 2 p d for each attention, 2 d m + m + d for each
    MLP; a layer with one of each has 2 p d + 2 d m + m + d.

    Args:
        tokens: p, length of the prefix.
        bottleneck: m, units of the adapter.
        scale: s.
        reparameterise: compute the prefix by a perceptron of `prefix_bottleneck` units, as in
            prefix tuning; `mmtune.tuners.prefix.eject` drops it.
        prefix_bottleneck: units of that perceptron.
        branches, layers, seed, adapted: see `SitedConfig`.

    Source:
        "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR 2022,
        arXiv 2110.04366, section 4.6: p = 30, m = 512, s = 4. A flat prefix is this toolkit's
        default, since the paper counts only what is kept after training.
    """

    peft_name: ClassVar[str] = "MAM"

    tokens: int = 30
    bottleneck: int = 512
    scale: float = 4.0
    reparameterise: bool = False
    prefix_bottleneck: int = 512

    def problems(self) -> Iterator[str]:
        sizes = {"tokens": 30, "bottleneck": 512, "prefix_bottleneck": 512}
        for key, usual in sizes.items():
            if getattr(self, key) < 1:
                yield f"mam.{key} must be at least 1, got {getattr(self, key)}. Try {usual}."
        if not (math.isfinite(self.scale) and self.scale > 0):
            yield f"mam.scale must be a positive number, got {self.scale}. Try 4.0."

    def lengths(self) -> dict[str, int]:
        """The prefix is one part of p tokens."""
        return {"prefix": self.tokens}

    def perceptron(self) -> int | None:
        """Units of the prefix's perceptron, or None for a flat prefix."""
        return self.prefix_bottleneck if self.reparameterise else None

    def adapter(self) -> AdapterConfig:
        """The settings of the adapters beside the MLPs."""
        return AdapterConfig(
            branches=self.branches,
            layers=self.layers,
            bottleneck=self.bottleneck,
            placement="mlp",
            activation="relu",
            scale=self.scale,
            parallel=True,
        )


class MamPrefixes(VirtualKeys):
    """The prefixes of all attentions."""


class MamModel(VirtualKeysTuner, AdapterModel):
    """MAM as a PEFT tuner: `VirtualKeys` for attentions, `AdapterModel`'s layers for MLPs."""

    # PEFT hands it to isinstance.
    tuner_layer_cls = (MamPrefixes, AdapterLayer)  # pyright: ignore[reportAssignmentType]
    keys_class = MamPrefixes
    keys_name = "mam_prefixes"
    unmergeable = "its bottlenecks are not linear, and no weight makes its virtual keys and values"

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site]:
        attentions = VirtualKeysTuner._choose(self, backbone, config)
        branches = {site.branch for site in attentions}
        sites = backbone.sites()
        mlps: Sequence[Site] = ()
        if any(site.role == "fc2" and site.branch in branches for site in sites):
            mlps = AdapterModel._choose(self, backbone, config.adapter())
        chosen = {site.path for site in (*attentions, *mlps)}
        return [site for site in sites if site.path in chosen]

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Site) -> nn.Module:
        if site.role in ATTENTIONS:
            return VirtualKeysTuner._adapt(self, config, adapter_name, target, site)
        return AdapterModel._adapt(self, config.adapter(), adapter_name, target, site)


PEFT_METHODS = {MamConfig.peft_name: (MamConfig, MamModel)}
METHODS = (
    Method(
        name="mam",
        summary="a prefix at attention and a scaled parallel adapter at the MLP",
        source="arXiv 2110.04366 (ICLR 2022)",
        options=options_of(MamConfig, leave_out=["adapted"]),
        build=config_of(MamConfig),
    ),
)
