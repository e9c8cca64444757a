"""Aurora as a PEFT tuner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from mmtune.backbones.base import Site
from mmtune.tuners.aurora.config import AuroraConfig
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

    def _prepare_adapter_config(self, peft_config: AuroraConfig, model_config: Any) -> Any:
        config = super()._prepare_adapter_config(peft_config, model_config)
        seed = peft_config.seed
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        return config

    def _check_sites(self, sites: Sequence[Site]) -> None:
        require_linear(sites, "aurora")

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: AuroraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        site = self._sites[current_key]
        factors = self._factors(adapter_name)
        fresh = not isinstance(target, AuroraLinear)
        layer = AuroraLinear(cast(nn.Linear, target), factors) if fresh else target
        base: Any = layer.get_base_layer()
        blocks = cut(site, base.out_features, base.in_features)
        layer.add_adapter(
            adapter_name, blocks, peft_config.rank_of(site.branch), peft_config, self._generator
        )
        device = base.weight.device
        if fresh:
            self._replace(parent, target_name, layer, device)
        if device.type != "meta":
            layer.aurora_modes.to(device)
            factors.to(device)
        if adapter_name not in self.active_adapters:
            layer.aurora_modes[adapter_name].requires_grad_(False)
            for group in (factors.aurora_U, factors.aurora_V, factors.aurora_core):
                group[adapter_name].requires_grad_(False)
        else:
            layer.set_adapter(self.active_adapters)
            factors.set_adapter(self.active_adapters)

    def _factors(self, adapter_name: str) -> ModeFactors:
        """The shared factors, made when the first adapted layer needs them."""
        if not hasattr(self.model, FACTORS):
            self.model.add_module(FACTORS, ModeFactors())
        factors = self.model.get_submodule(FACTORS)
        factors.add_adapter(adapter_name)  # pyright: ignore[reportCallIssue]
        return factors  # pyright: ignore[reportReturnType]

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        if hasattr(self.model, FACTORS):
            delattr(self.model, FACTORS)
        return model
