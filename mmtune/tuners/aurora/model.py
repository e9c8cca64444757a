"""Aurora as a PEFT tuner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from mmtune.backbones.base import Backbone, Site
from mmtune.backbones.fusions import Fusion
from mmtune.tuners.aurora.config import AuroraConfig
from mmtune.tuners.aurora.factors import AuroraLayer, ModeFactors, cut, sharing_key
from mmtune.tuners.aurora.fusing import FusedLayer, settle
from mmtune.tuners.aurora.layer import AuroraLinear
from mmtune.tuners.aurora.origins import Origins, cheap
from mmtune.tuners.aurora.siblings import TOGETHER
from mmtune.tuners.sited import SitedTuner, require_linear

# PEFT skips modules whose name holds its prefix when it deletes an adapter; these must be visited.
FACTORS, FUSED, ORIGINS = "mode_factors", "mode_fusion", "mode_origins"


class AuroraModel(SitedTuner):
    """Injects `AuroraLinear` at the chosen sites, and in the model's root what they share.

    The root holds one `ModeFactors`, and a `FusedLayer` for each layer with a gate or a context.

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

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site | Fusion]:
        chosen = backbone.select(config.branches, config.sites, config.layers)
        require_linear(chosen, "aurora")
        self._cheap = cheap(backbone, chosen) if config.forms() else []
        fusions = settle(backbone, config)
        reading = [fusion for fusion in fusions if fusion.words]
        self._last_reading = reading[-1] if reading else None
        return [*chosen, *fusions]

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, config in self.peft_config.items():
            if kept := cast(AuroraConfig, config).kept():
                raise ValueError(
                    f"AURORA cannot be merged: adapter {name!r} changes hidden states by its "
                    f"{' and '.join(kept)}, which no weight can hold. Use it unmerged, or train an "
                    "adapter with gate: off and context: off."
                )

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Site | Fusion) -> nn.Module:
        if isinstance(site, Fusion):
            self._fuse(config, adapter_name, site)
            return target
        factors = self._attach(FACTORS, ModeFactors)
        factors.add_adapter(adapter_name)
        if self._cheap:
            self._attach(ORIGINS, Origins).watch(self._cheap)
            self._cheap = []  # one site is enough
        if config.forms():
            factors.rounds.watch(self.model)
        layer = target if isinstance(target, AuroraLinear) else AuroraLinear(target, factors)
        if layer is not target:
            layer.rounds = factors.rounds
            layer.rounds.layers.append(layer)
            layer.role = site.role
            self._join(layer, site)
        base: Any = layer.get_base_layer()
        blocks = cut(site, base.out_features, base.in_features)
        rank, key = config.rank_of(site.branch), sharing_key(config.sharing, site, blocks)
        made = layer.add_adapter(
            adapter_name, key, blocks, rank, config, self._generator, site.branch
        )
        for part in (layer, factors) if made else (layer,):
            self._settle(part, adapter_name, base.weight.device)
        return layer

    def _join(self, layer: AuroraLinear, site: Site) -> None:
        """Make it a sibling of the projections that read the same tokens."""
        parent = self.model.get_submodule(site.path.rpartition(".")[0])
        roles = next((group for group in TOGETHER if site.role in group), ())
        for other in parent.children():
            if isinstance(other, AuroraLinear) and other.role in roles:
                layer.siblings = other.siblings
                layer.siblings.members.append(layer)
                return

    def _fuse(self, config: Any, adapter_name: str, fusion: Fusion) -> None:
        """Give a layer with cross-attention its gate and context."""
        name = f"{FUSED}_{fusion.branch}_{fusion.layer}"
        layer = self._attach(name, partial(FusedLayer, fusion))
        layer.add_adapter(adapter_name, config, fusion == self._last_reading, self._generator)
        device = next(fusion.module.parameters(), next(self.model.parameters())).device
        self._settle(layer, adapter_name, device)
