"""Aurora as a PEFT tuner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mmtune.backbones.base import Backbone, Site
from mmtune.tuners.aurora.factors import AuroraLayer, ModeFactors, cut
from mmtune.tuners.aurora.layer import AuroraLinear
from mmtune.tuners.sited import SitedTuner, require_linear

# PEFT skips modules whose name holds its prefix when it deletes an adapter; this one must be
# visited.
FACTORS = "mode_factors"


class AuroraModel(SitedTuner):
    """Injects `AuroraLinear` at the chosen sites and one `ModeFactors` in the model.

    Source: arXiv 2305.08381; the equations are in `AuroraConfig`.
    """

    prefix = "aurora_"
    tuner_layer_cls = AuroraLayer
    # `inject_adapter_in_model` is refused: only get_peft_model knows to remove the factors on
    # unload.
    uses_shared_state = True

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        unknown = set(config.branch_ranks) - set(config.branches or config.branch_ranks)
        if unknown:
            raise ValueError(
                f"aurora.branch_ranks names {', '.join(sorted(unknown))}, which is not among the "
                f"adapted branches ({', '.join(config.branches)})"
            )

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site]:
        chosen = backbone.select(config.branches, config.sites, config.layers)
        require_linear(chosen, "aurora")
        return chosen

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Site) -> nn.Module:
        factors = self._attach(FACTORS, ModeFactors)
        factors.add_adapter(adapter_name)
        layer = target if isinstance(target, AuroraLinear) else AuroraLinear(target, factors)
        base: Any = layer.get_base_layer()
        blocks = cut(site, base.out_features, base.in_features)
        layer.add_adapter(
            adapter_name, blocks, config.rank_of(site.branch), config, self._generator
        )
        for part in (layer, factors):
            self._settle(part, adapter_name, base.weight.device)
        return layer
