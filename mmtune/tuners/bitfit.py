"""BitFit: a trained difference on biases, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmtune.backbones.base import Backbone, Site, SiteError
from mmtune.tuners.registry import Method, config_of, options_of
from mmtune.tuners.sited import SitedConfig, SitedTuner

ROLES = ("q", "k", "v", "out", "gate", "fc1", "fc2", "norm")
CROSS = ("cross_q", "cross_k", "cross_v", "cross_out")


@dataclass
class BitFitConfig(SitedConfig):
    """A difference for every bias of the chosen sites; weights stay as they are.

        W x + (b + delta),    and the same for the bias of a norm; delta zero at the start

    Trainable parameters: the number of biases; 11 d in a layer of a vision transformer whose MLP is
    four times as wide (q, k, v, out, fc2 and two norms: d each; fc1: 4 d).

    Args:
        sites: roles whose biases are trained, or branch -> roles; those of them that have no bias
            are left out. None means attention, cross-attention, MLP and norms. ["q", "fc1"], 5 d
            of the 11 d, is the subset with which the paper loses little.
        branches, layers, seed, adapted: see `SitedConfig`.

    Source:
        arXiv 2106.10199. The task's head, which the paper trains too, is the task's affair.
    """

    peft_name: ClassVar[str] = "BITFIT"

    sites: list[str] | dict[str, list[str]] | None = None


class BitFitLayer(BaseTunerLayer):
    """What PEFT visits."""


class ShiftedBias(nn.Module, BitFitLayer):
    """A Linear or norm whose output is shifted, which is what a changed bias does.

    Shape: as the base layer, [..., n].
    """

    adapter_layer_names = ("mmtune_shift",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        if isinstance(base_layer, nn.Linear):  # as which other methods must know it
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.mmtune_shift = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters = []

    def add_adapter(self, name: str) -> None:
        self.mmtune_shift[name] = nn.Parameter(torch.zeros(self.bias.shape))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.mmtune_shift:
                y = y + self.mmtune_shift[name].to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the shift to the bias.

        Args:
            safe_merge: refuse a bias with non-finite values, which stays as it was.
            adapter_names: adapters to fold; None means the active ones.

        Raises:
            ValueError: safe_merge found non-finite values.
        """
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.mmtune_shift or name in self.merged_adapters:
                continue
            merged = (self.bias.data + self.mmtune_shift[name].data).to(self.bias.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter {name!r} would give non-finite biases")
            self.bias.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what `merge` added; equal to the base up to rounding of its dtype."""
        while self.merged_adapters:
            shift = self.mmtune_shift[self.merged_adapters.pop()].data
            self.bias.data = (self.bias.data - shift).to(self.bias.dtype)


class BitFitModel(SitedTuner):
    """Wraps the chosen Linears and norms that have a bias."""

    tuner_layer_cls = BitFitLayer

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site]:
        roles = config.sites
        if roles is None:
            within = [s for s in backbone.sites() if s.branch in (config.branches or [s.branch])]
            roles = [r for r in (*ROLES, *CROSS) if any(s.role == r for s in within)] or list(ROLES)
        chosen = backbone.select(config.branches, roles, config.layers)
        _require_shiftable(chosen)
        biased = [s for s in chosen if getattr(s.module, "bias", None) is not None]
        for branch in config.branches or [None]:
            if not any(branch in (None, s.branch) for s in biased):
                raise SiteError(_without_bias(backbone, branch, chosen))
        return biased

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Site) -> nn.Module:
        layer = target if isinstance(target, ShiftedBias) else ShiftedBias(target)
        layer.add_adapter(adapter_name)
        self._settle(layer, adapter_name, layer.bias.device)
        return layer


def _require_shiftable(chosen: Sequence[Site]) -> None:
    """Raise SiteError for a bias that is not added on the last axis of an output."""
    for site in chosen:
        base = site.module.get_base_layer() if isinstance(site.module, BaseTunerLayer) else None
        module = base or site.module
        known = isinstance(module, nn.Linear) or site.role == "norm"
        if getattr(module, "bias", None) is not None and not known:
            raise SiteError(
                f"bitfit adds to the biases of Linears and norms; {site.path} ({site.role}) is a "
                f"{type(module).__name__}. Choose sites among {', '.join((*ROLES, *CROSS))}."
            )


def _without_bias(backbone: Backbone, branch: str | None, chosen: Sequence[Site]) -> str:
    roles = ", ".join(dict.fromkeys(s.role for s in chosen if branch in (None, s.branch)))
    with_bias = dict.fromkeys(
        s.branch for s in backbone.sites() if getattr(s.module, "bias", None) is not None
    )
    return (
        f"bitfit trains biases, and none of {roles} on {backbone.family}"
        f"{f' in {branch}' if branch else ''} has one; branches with biases: "
        f"{', '.join(with_bias) or 'none'}."
    )


PEFT_METHODS = {BitFitConfig.peft_name: (BitFitConfig, BitFitModel)}
METHODS = (
    Method(
        name="bitfit",
        summary="differences on the biases alone",
        source="arXiv 2106.10199 (ACL 2022)",
        options=options_of(BitFitConfig, leave_out=["adapted", "seed"]),
        build=config_of(BitFitConfig),
    ),
)
