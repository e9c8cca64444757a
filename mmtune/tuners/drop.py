"""AdapterDrop: adapters without those of the first layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from mmtune.backbones.base import Backbone, Site, SiteError
from mmtune.tuners.bottleneck import AdapterConfig, AdapterLayer, AdapterModel
from mmtune.tuners.hooks import TrainingHooks
from mmtune.tuners.registry import Method, config_of, options_of

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class AdapterDropConfig(AdapterConfig):
    """Adapters without those of each branch's first n layers, which saves time in both directions.

        layers n and above   y + s (W_up act(W_down y + b_down) + b_up), as in `AdapterConfig`
        layers below n       y

    Below the lowest kept adapter nothing needs a gradient, so the backward pass stops there.

    Trainable parameters: 2 d m + m + d for each kept sublayer.

    Args:
        drop: n of a specialised adapter: those layers have none. T5's layers count from its
            encoder's first.
        robust: keep all, and leave out those of the first n layers in every training step, n
            uniform over 0 .. layers - 1; `set_dropped` then chooses n at inference.
        bottleneck, placement, activation, scale, init, parallel, train_norms: see `AdapterConfig`.
        branches, layers, seed, adapted: see `SitedConfig`.

    Source:
        arXiv 2010.11918, section 3.
    """

    peft_name: ClassVar[str] = "ADAPTER_DROP"

    drop: int = 0
    robust: bool = False

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.drop < 0:
            yield f"adapter_drop.drop must be 0 or more layers, got {self.drop}"
        if self.drop and self.robust:
            yield (
                f"adapter_drop.robust draws the number of layers in every step and needs drop: 0, "
                f"got drop: {self.drop}. Set drop, or robust: true."
            )
        if not self.drop and not self.robust:
            yield (
                "adapter_drop leaves out nothing: set drop to a number of layers, or robust: true"
            )


class AdapterDropModel(AdapterModel):
    """Injects bottlenecks above the first layers."""

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site]:
        chosen = super()._choose(backbone, config)
        kept = [s for s in chosen if s.layer is None or s.layer >= config.drop]
        for branch in dict.fromkeys(s.branch for s in chosen):
            if not any(s.branch == branch and s.layer is not None for s in kept):
                layers = 1 + max(s.layer or 0 for s in chosen if s.branch == branch)
                raise SiteError(
                    f"adapter_drop.drop must be in 0..{layers - 1} to leave an adapter in "
                    f"{branch}, got {config.drop}"
                )
        return kept


def set_dropped(model: nn.Module, n: int) -> None:
    """Leave out the adapters of each branch's first n layers, trained norms included; 0: none.

    Works on any model with adapters. A branch with n layers or fewer loses all of its adapters.

    Raises:
        ValueError: n is negative, or the model has no adapters.
    """
    if n < 0:
        raise ValueError(f"the number of layers without adapters must be 0 or more, got {n}")
    layers = _placed(model)
    if not layers:
        raise ValueError("this model has no adapters to leave out; load an adapter first")
    for layer, depth in layers:
        layer.dropped = depth < n


def _placed(model: nn.Module) -> list[tuple[AdapterLayer, int]]:
    """The adapted modules that belong to a layer, with its number."""
    found = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    return [(layer, layer.depth) for layer in found if layer.depth is not None]


class RobustDrop(TrainingHooks):
    """Leaves out the adapters of the first n layers in every step, n ~ U{0 .. layers - 1}.

    One draw serves all branches, so that of branches with the same number of layers the same
    layers are left out: BLIP's text and fusion layers are the halves of the same layers.
    """

    replayable = False  # layers come and go

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        self.layers: dict[str, int] = {}
        for layer, depth in _placed(model):
            self.layers[layer.branch] = max(self.layers.get(layer.branch, 0), depth + 1)

    def dropped(self, step: int) -> dict[str, int]:
        """Branch -> n in a step; it depends on seed and step alone."""
        share = np.random.default_rng([self.seed, step]).random()
        return {branch: int(share * layers) for branch, layers in self.layers.items()}

    def before_step(self, step: int) -> None:
        dropped = self.dropped(step)
        for layer, depth in _placed(self.model):
            layer.dropped = depth < dropped[layer.branch]

    def after_step(self, step: int) -> None:
        set_dropped(self.model, 0)


def _hooks(model: PeftModel, total_steps: int, seed: int) -> TrainingHooks:
    config: Any = model.active_peft_config
    return RobustDrop(model, seed) if config.robust else TrainingHooks()


PEFT_METHODS = {AdapterDropConfig.peft_name: (AdapterDropConfig, AdapterDropModel)}
METHODS = (
    Method(
        name="adapter_drop",
        summary="adapters without those of the first layers, fixed or drawn in every step",
        source="arXiv 2010.11918 (EMNLP 2021)",
        options=options_of(AdapterDropConfig, leave_out=["adapted"]),
        build=config_of(AdapterDropConfig),
        hooks=_hooks,
    ),
)
