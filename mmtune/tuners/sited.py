"""What every tuner of this toolkit shares: it is injected at sites, and checks that it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from mmtune.backbones import backbone_of
from mmtune.backbones.base import Site, SiteError


class AdapterMismatchError(ValueError):
    """An adapter that was made for another backbone, or for other sites of it."""


class SitedTuner(BaseTuner):
    """A PEFT tuner whose targets are sites of a backbone rather than module-name patterns.

    The config has `branches`, `sites`, `layers` and `adapted` (recorded paths).
    """

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own declaration)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> PeftConfig:
        backbone = backbone_of(self.model)
        backbone.prepare()
        chosen = backbone.select(peft_config.branches, peft_config.sites, peft_config.layers)
        self._check_sites(chosen)
        paths = [site.path for site in chosen]
        if peft_config.adapted is not None and list(peft_config.adapted) != paths:
            raise AdapterMismatchError(_mismatch(list(peft_config.adapted), paths))
        peft_config.adapted = paths
        self._sites = {site.path: site for site in chosen}
        return peft_config

    def _check_sites(self, sites: Sequence[Site]) -> None:
        """Raise for sites that the method cannot adapt; nothing has been replaced yet."""

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return key in self._sites

    def _replace(self, parent: nn.Module, name: str, new: nn.Module, device: torch.device) -> None:
        """Put `new` at its place with its adapter parameters on `device`."""
        setattr(parent, name, new)
        for parameter in new.parameters():
            if parameter.device != device and parameter.device.type != "meta":
                parameter.data = parameter.data.to(device)


def require_linear(sites: Sequence[Site], method: str) -> None:
    """Raise SiteError where a site holds no Linear, before anything is replaced."""
    for site in sites:
        if not hasattr(site.module, "in_features"):
            raise SiteError(
                f"{method} adapts Linear layers; {site.path} ({site.role}) is a "
                f"{type(site.module).__name__}. Choose sites among q, k, v, out, fc1, fc2."
            )


def _mismatch(recorded: list[str], found: list[str]) -> str:
    missing = [p for p in recorded if p not in found]
    extra = [p for p in found if p not in recorded]
    return (
        f"this adapter sits on {len(recorded)} modules of the model it was trained on; this model "
        f"offers {len(found)} at the same sites. Only in the adapter: {_some(missing)}. Only in "
        f"this model: {_some(extra)}. Load the adapter onto the backbone it was trained on."
    )


def _some(names: list[str], limit: int = 3) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
