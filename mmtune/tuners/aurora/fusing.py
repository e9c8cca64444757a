"""Gate and context in a layer with cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmtune.backbones.base import Backbone, SiteError
from mmtune.backbones.fusions import Fusion
from mmtune.tuners.aurora.config import AuroraConfig
from mmtune.tuners.aurora.context import PooledContext, TokenContext
from mmtune.tuners.aurora.factors import AuroraLayer
from mmtune.tuners.aurora.gate import ReferenceGate, TanhGate
from mmtune.tuners.sited import Attached


class FusedLayer(Attached, AuroraLayer):
    """The gates and contexts of one layer with cross-attention, and the hooks by which they act.

    With s and y the layer's self- and cross-attention outputs, y becomes y plus what the active
    adapters' contexts and tanh gates add, each computed from s and the stock y; reference gates add
    to the layer's output, with the changed y. A call that gives the layer nothing to read (text
    alone) does not reach cross-attention, and nothing changes.

    The hooks sit on modules inside the layer, never on the layer: what transformers recomputes
    under activation checkpointing is the layer's forward, with or without its own hooks by version.

    Parameters of an adapter: those of aurora_gate[adapter] and aurora_context[adapter].
    """

    adapter_layer_names = ("aurora_gate", "aurora_context")
    other_param_names = ()

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.width, self.words = fusion.width, fusion.words
        self.aurora_gate = nn.ModuleDict()
        self.aurora_context = nn.ModuleDict()
        # Of the present call: the mask of self-attention; s, until the reference gate has it all.
        self._mask: Tensor | None = None
        self._queries: Tensor | None = None
        self._handles = [
            fusion.begin.register_forward_pre_hook(self._begin, with_kwargs=True),
            fusion.module.register_forward_hook(self._cross, with_kwargs=True),
            fusion.end.register_forward_hook(self._end),
        ]

    def add_adapter(
        self, name: str, config: AuroraConfig, pooled: bool, generator: torch.Generator | None
    ) -> None:
        """Give the layer an adapter's gate and context.

        Args:
            name: of the adapter.
            config: of the adapter, with `gate` and `context` settled.
            pooled: whether this layer holds the adapter's pooled context, if it has one.
            generator: of the reference gate's start.
        """
        if config.gate == "tanh":
            self.aurora_gate[name] = TanhGate(self.width)
        elif config.gate == "reference":
            self.aurora_gate[name] = ReferenceGate(self.width, generator)
        if config.context == "tokens" and self.words:
            self.aurora_context[name] = TokenContext()
        elif config.context in ("batch", "reference") and pooled:
            self.aurora_context[name] = PooledContext(config.context)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._queries = None
        self._mask = kwargs.get("attention_mask")

    def _cross(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        gates, contexts = self._present("aurora_gate"), self._present("aurora_context")
        s = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        mask = None if self._mask is None else self._mask[:, 0]
        added = [c(y, s, mask) for c in contexts if isinstance(c, TokenContext)]
        added += [g(s) for g in gates if isinstance(g, TanhGate)]
        self._mask = None
        if any(isinstance(g, ReferenceGate) for g in gates):
            self._queries = s
        for term in added:
            y = y + term.to(y.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._queries is None:
            return output
        # A feed-forward that runs in chunks ends once for each; s goes along. It must not be kept.
        n = output.shape[1]
        s, rest = self._queries[:, :n], self._queries[:, n:]
        self._queries = rest if rest.shape[1] else None
        total = output
        for gate in self._present("aurora_gate"):
            if isinstance(gate, ReferenceGate):
                total = total + gate(s, args[1]).to(output.dtype)
        return total

    def _present(self, group: str) -> list[nn.Module]:
        return [getattr(self, group)[name] for name in self.acting(group)]


def settle(backbone: Backbone, config: AuroraConfig) -> list[Fusion]:
    """Decide on gate and context where the config leaves them open.

    Args:
        backbone: of the model to adapt.
        config: its `gate` and `context` are settled here, never None afterwards.

    Returns:
        The layers that get a gate or a context, in forward order.

    Raises:
        SiteError: they were asked for, and no chosen layer can have them.
    """
    branches = config.branches
    if branches is None and isinstance(config.sites, dict):
        branches = list(config.sites)
    fusions = backbone.fusions()
    if fusions:
        sites = backbone.select(branches, None, config.layers)
        layers = {(site.branch, site.layer) for site in sites}
        fusions = [f for f in fusions if (f.branch, f.layer) in layers]
    reading = [f for f in fusions if f.words]
    if config.gate is None:
        config.gate = "tanh" if fusions else "off"
    elif config.gate != "off" and not fusions:
        raise SiteError(
            f"aurora.gate is {config.gate}, but {_where(backbone, branches)} has no layer whose "
            "cross-attention reads another branch. Set gate: off."
        )
    if config.context is None:
        config.context = "tokens" if reading else "off"
    elif config.context != "off" and not reading:
        raise SiteError(
            f"aurora.context is {config.context}, but {_where(backbone, branches)} has no layer in "
            "which words that all see one another read an image. Set context: off."
        )
    pooled = config.context in ("batch", "reference")
    if pooled and not any(s.branch == "fusion" and s.role == "head" for s in backbone.sites()):
        raise SiteError(
            f"aurora.context is {config.context}, which acts before the match head; this "
            f"{backbone.family} has none. Set context: tokens, or off."
        )
    if config.gate != "off":
        return fusions
    return {"off": [], "tokens": reading}.get(config.context, reading[-1:])


def _where(backbone: Backbone, branches: list[str] | None) -> str:
    """The family, with the chosen branches where they were chosen."""
    return f"{backbone.family} in {', '.join(branches)}" if branches else backbone.family
