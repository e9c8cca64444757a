"""UniPELT: prefix, adapter and LoRA together, each behind a learned gate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmtune.backbones.base import Backbone, Site, SiteError
from mmtune.tuners.bottleneck import AdaptedLinear, AdapterLayer, Bottleneck, Handover
from mmtune.tuners.registry import Method, config_of, options_of
from mmtune.tuners.sited import SitedConfig, require_linear
from mmtune.tuners.virtual_keys import (
    ATTENTIONS,
    VirtualKeys,
    VirtualKeysTuner,
    choose_attentions,
)

# The Linears with LoRA -> the attention whose gate they take.
LOW_RANK = {
    "q": "attention",
    "v": "attention",
    "cross_q": "cross_attention",
    "cross_v": "cross_attention",
}

# A decoder's token would see, through a mean over all tokens, those that come after it.
WRITERS = ("language",)


@dataclass
class UniPELTConfig(SitedConfig):
    """Prefix, sequential adapter and LoRA, each scaled by a gate of its own input.

        g(x) = mean over the tokens t of sigmoid(w . x_t + c), one number in (0, 1) for each sample

        prefix     Attention(q, [g P_K; K], [g P_V; V]), g of the attention's input
        LoRA       q(x) + g B_q A_q x and v(x) + g B_v A_v x, one g, of the attention's input; it
                   stands where LoRA has alpha / r
        adapter    y + g (W_up relu(W_down y + b_down) + b_up), y the MLP's output, g of y

    Cross-attention has all that attention has; its g is of what the queries are made of. W_up and B
    start at zero, the prefix does not. Nothing can be merged: the gates depend on the input.

    A gate averages over all tokens, padding included: pad texts to one length, or a sample's result
    depends on how long its neighbours are. In a decoder a token would see later ones through its
    gates; so the branch `language` is left out, and refused where it is asked for.

    Trainable parameters of a branch of width d: for each attention 2 p d + 4 r d + 2 (d + 1), for
    each MLP 2 d m + m + d + (d + 1). BERT-base, with three gates a layer, has 1.28 % of its own.

    Args:
        tokens: p, length of the prefix.
        bottleneck: m, units of the adapter.
        rank: r of LoRA on q and v.
        reparameterise: compute the prefix by a perceptron of `prefix_bottleneck` units, as in
            prefix tuning. The published counts are those of the flat prefix.
        prefix_bottleneck: units of that perceptron.
        branches, layers, seed, adapted: see `SitedConfig`.

    Source:
        "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", ACL 2022,
        arXiv 2110.07577, section 3. The gates of prefix and LoRA read the attention's input, which
        in the paper's BERT is the layer's; behind a norm, as in most towers here, it is the norm's
        output. Differs from the released code in one gate for q and v together (the paper's text
        and its count; the code gives each its own), and in a flat prefix.
    """

    peft_name: ClassVar[str] = "UNIPELT"

    tokens: int = 10
    bottleneck: int = 48
    rank: int = 8
    reparameterise: bool = False
    prefix_bottleneck: int = 512

    def problems(self) -> Iterator[str]:
        sizes = {"tokens": 10, "bottleneck": 48, "rank": 8, "prefix_bottleneck": 512}
        for key, usual in sizes.items():
            if getattr(self, key) < 1:
                yield f"unipelt.{key} must be at least 1, got {getattr(self, key)}. Try {usual}."

    def lengths(self) -> dict[str, int]:
        """The prefix is one part of p tokens."""
        return {"prefix": self.tokens}

    def perceptron(self) -> int | None:
        """Units of the prefix's perceptron, or None for a flat prefix."""
        return self.prefix_bottleneck if self.reparameterise else None


def gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean over tokens of sigmoid(w . x + c).

    Shape: x [b, t, d], weight [1, d], bias [1] -> [b, 1, 1].
    """
    return torch.sigmoid(F.linear(x, weight.to(x.dtype), bias.to(x.dtype))).mean(1, keepdim=True)


def _gate_parameters(d: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Weight [1, d] and bias [1] with PyTorch's own start of a Linear."""
    both = (2 * torch.rand(d + 1, generator=generator) - 1) / math.sqrt(d)
    return both[None, :d].clone(), both[d:].clone()


class Gates:
    """The gates of one attention, handed from its q to its v and to its prefix in one pass.

    Attributes:
        low_rank, prefix: adapter -> [b, 1, 1].
    """

    def __init__(self) -> None:
        self.low_rank: dict[str, Tensor] = {}
        self.prefix: dict[str, Tensor] = {}


class UniPELTLayer(BaseTunerLayer):
    """What PEFT visits besides the adapters: gated Linears and the prefixes."""


class GatedPrefixes(VirtualKeys, UniPELTLayer):
    """The prefixes of all attentions, scaled by their gates."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, Gates] = {}

    def scaled(self, name: str, path: str, rows: Tensor) -> Tensor:
        # Attention calls this last, after q and v: nothing of the pass must outlive it.
        self.gates[path].low_rank.pop(name, None)
        return self.gates[path].prefix.pop(name) * rows


class GatedLinear(nn.Module, UniPELTLayer):
    """A q or v Linear with LoRA behind a gate; q computes the gates of its attention.

    Shape: [b, t, in_features] -> [b, t, out_features].
    Parameters of an adapter: A [r, in], B [out, r]; on q also weight and bias of both gates.
    """

    adapter_layer_names = ("mmtune_low_rank", "mmtune_gates")

    def __init__(self, base_layer: nn.Linear, gates: Gates) -> None:
        super().__init__()
        self.base_layer, self.gates = base_layer, gates
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.mmtune_low_rank, self.mmtune_gates = nn.ModuleDict(), nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []

    def add_adapter(
        self, name: str, rank: int, gated: bool, generator: torch.Generator | None
    ) -> None:
        """Make an adapter's matrices and, where this is q (`gated`), its attention's gates."""
        base = cast(nn.Linear, self.get_base_layer())
        a = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(base.out_features, rank)
        self.mmtune_low_rank[name] = _parameters({"A": a, "B": b})
        if gated:
            fresh = {}
            for part in ("low_rank", "prefix"):
                weight, bias = _gate_parameters(base.in_features, generator)
                fresh |= {f"{part}_weight": weight, f"{part}_bias": bias}
            self.mmtune_gates[name] = _parameters(fresh)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.mmtune_gates:
                self._set_gates(name, x)
            if name in self.mmtune_low_rank:
                pair: Any = self.mmtune_low_rank[name]
                low = F.linear(F.linear(x, pair["A"].to(x.dtype)), pair["B"].to(x.dtype))
                y = y + (self.gates.low_rank[name] * low).to(y.dtype)
        return y

    def _set_gates(self, name: str, x: Tensor) -> None:
        at: Any = self.mmtune_gates[name]
        self.gates.low_rank[name] = gate(x, at["low_rank_weight"], at["low_rank_bias"])
        self.gates.prefix[name] = gate(x, at["prefix_weight"], at["prefix_bias"])


class GatedBottleneck(Bottleneck):
    """An adapter whose output is scaled by a gate of its input."""

    def __init__(self, d: int, units: int, generator: torch.Generator | None) -> None:
        super().__init__(d, d, units, generator=generator)
        weight, bias = _gate_parameters(d, generator)
        self.gate_weight, self.gate_bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return gate(x, self.gate_weight, self.gate_bias) * super().forward(x)


class UniPELTModel(VirtualKeysTuner):
    """UniPELT as a PEFT tuner."""

    # PEFT hands it to isinstance.
    tuner_layer_cls = (UniPELTLayer, AdapterLayer)  # pyright: ignore[reportAssignmentType]
    keys_class = GatedPrefixes
    keys_name = "unipelt_prefixes"
    unmergeable = "its gates depend on the input, so no weight can hold what they scale"

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site]:
        branches = config.branches
        if branches is None:
            every = choose_attentions(backbone, None, "all")
            without = (*WRITERS, *backbone.packed)
            branches = [b for b in dict.fromkeys(s.branch for s in every) if b not in without]
        if not branches or set(branches) & set(backbone.packed):
            raise SiteError(
                f"unipelt gates each sample by a mean over its tokens, and {backbone.family} packs "
                f"all samples in one row in {', '.join(backbone.packed)}; nor can it gate a "
                "decoder. Use mam, or lora, prefix and adapter."
            )
        if refused := set(branches) & set(WRITERS):
            raise SiteError(
                f"unipelt gates by a mean over all tokens, through which a decoder's token would "
                f"see later ones: leave {', '.join(sorted(refused))} out of unipelt.branches"
            )
        attentions = self._plan(backbone, branches, config.layers)
        at = {(s.branch, s.layer, s.role): s.path for s in attentions}
        layers = {(s.branch, s.layer) for s in attentions}
        within = [s for s in backbone.sites() if (s.branch, s.layer) in layers]
        linears = [s for s in within if s.role in (*LOW_RANK, "fc2")]
        require_linear(linears, "unipelt")
        # Path of q or v -> path of its attention.
        self._attention = {
            s.path: at[s.branch, s.layer, LOW_RANK[s.role]] for s in linears if s.role in LOW_RANK
        }
        return [s for s in within if s in linears or s in attentions]

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Site) -> nn.Module:
        prefixes = self._attach(self.keys_name, self.keys_class)
        if site.role in ATTENTIONS:
            prefixes.gates.setdefault(site.path, Gates())
            return super()._adapt(config, adapter_name, target, site)
        layer: Any = target
        if site.role == "fc2":
            if not isinstance(target, AdaptedLinear):
                layer = AdaptedLinear(target, Handover())
            d = layer.get_base_layer().out_features
            adapter = GatedBottleneck(d, config.bottleneck, self._generator)
            layer.add_adapter(adapter_name, adapter, parallel=False)
        else:
            gates = prefixes.gates.setdefault(self._attention[site.path], Gates())
            layer = target if isinstance(target, GatedLinear) else GatedLinear(target, gates)
            gated = site.role in ("q", "cross_q")
            layer.add_adapter(adapter_name, config.rank, gated, self._generator)
        self._settle(layer, adapter_name, layer.get_base_layer().weight.device)
        return layer


def _parameters(tensors: dict[str, Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict({key: nn.Parameter(value) for key, value in tensors.items()})


PEFT_METHODS = {UniPELTConfig.peft_name: (UniPELTConfig, UniPELTModel)}
METHODS = (
    Method(
        name="unipelt",
        summary="prefix, adapter and LoRA, each behind a learned gate",
        source="arXiv 2110.07577 (ACL 2022)",
        options=options_of(UniPELTConfig, leave_out=["adapted"]),
        build=config_of(UniPELTConfig),
    ),
)
