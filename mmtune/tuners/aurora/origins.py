"""Where cheap activations come from, so that they are computed again rather than kept.

The input of an adapted Linear is wanted in backward, for the gradient of the factor that multiplies
it. Often it comes from a norm or an activation function, which keeps its own input anyway: then it
need not be kept a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmtune.backbones.base import Backbone, Site
from mmtune.tuners.sited import Attached

ATTRIBUTE = "mmtune_origin"
# What has no parameters and is no function of its input alone, or hands it through.
OTHERS = (nn.Dropout, nn.Identity, nn.ModuleList)


@dataclass(frozen=True)
class Origin:
    """`compute(source)` gives a tensor again, bit for bit, unless it was changed in place since."""

    compute: Callable[[Tensor], Tensor]
    source: Tensor
    version: int


def origin_of(x: Tensor) -> Origin | None:
    """Where a tensor comes from, if that was remembered and still holds."""
    found: Origin | None = getattr(x, ATTRIBUTE, None)
    return found if found is not None and found.version == x._version else None


class Origins(Attached):
    """Lets modules mark what they give, as long as an adapter is on the model."""

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self._handles: dict[int, Any] = {}

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Let these mark what they give, too."""
        for module in modules:
            if id(module) not in self._handles:
                self._handles[id(module)] = module.register_forward_hook(_mark)

    def detach(self) -> None:
        for handle in self._handles.values():
            handle.remove()


def _mark(module: Any, args: tuple[Any, ...], output: Any) -> None:
    # A compiler chooses by itself what it computes again.
    if not torch.compiler.is_compiling() and isinstance(output, Tensor) and len(args) == 1:
        kind, compute = output.device.type, module.forward
        # Backward runs outside of autocast, where norms refuse inputs of another dtype than theirs.
        if kind != "meta" and torch.is_autocast_enabled(kind):
            compute = partial(_cast, compute, kind, torch.get_autocast_dtype(kind))
        setattr(output, ATTRIBUTE, Origin(compute, args[0], output._version))


def _cast(compute: Callable[[Tensor], Tensor], kind: str, dtype: torch.dtype, x: Tensor) -> Tensor:
    with torch.autocast(kind, dtype, cache_enabled=False):
        return compute(x)


def cheap(backbone: Backbone, chosen: Sequence[Site]) -> list[nn.Module]:
    """The norms and activation functions before the Linears of chosen sites."""
    layers = {(site.branch, site.layer) for site in chosen}
    norms = [s for s in backbone.sites() if s.role == "norm" and (s.branch, s.layer) in layers]
    found = [site.module for site in norms]
    for site in chosen:
        if site.role == "fc2":
            parent = backbone.model.get_submodule(site.path.rpartition(".")[0])
            found += [
                m
                for m in parent.children()
                if not isinstance(m, OTHERS) and next(m.parameters(), None) is None
            ]
    return found
