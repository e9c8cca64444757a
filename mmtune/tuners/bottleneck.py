"""Adapter: a small bottleneck after attention and after the MLP, or beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmtune.backbones.base import Backbone, Site
from mmtune.tuners.registry import Method, config_of, options_of
from mmtune.tuners.sited import SitedConfig, SitedTuner, require_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
# The Linear that ends a sublayer -> the one that its input enters by.
ENTRANCES = {"out": "q", "cross_out": "cross_q", "fc2": "fc1"}
PLACEMENTS = {
    "attention": ("out", "cross_out"),
    "mlp": ("fc2",),
    "both": ("out", "cross_out", "fc2"),
}


@dataclass
class AdapterConfig(SitedConfig):
    """A bottleneck of m units for every sublayer, before the residual addition.

        sequential:  y + s W_up act(W_down y + b_down) + s b_up,    y the sublayer's output
        parallel:    the same with the sublayer's input x inside:  y + s W_up act(W_down x + ...)

    Trainable parameters: 2 d m + m + d for each sublayer.

    Args:
        bottleneck: m, units of a bottleneck.
        placement: "attention" (cross-attention too), "mlp" or "both"; a branch without an MLP of
            its own gets those of its attention.
        activation: "relu", "gelu", "silu" or "tanh".
        scale: s.
        init: "zero" (W_up and biases: a fresh adapter changes nothing) or "near_zero" (both weights
            from a normal distribution of deviation 0.01, cut at two deviations).
        parallel: feed the bottleneck with the sublayer's input.
        train_norms: train the weights and biases of the branches' norms too.
        branches, layers, seed, adapted: see `SitedConfig`.

    Source:
        Sequential: arXiv 1902.00751, section 2.1. Parallel: arXiv 2110.04366, table 1. A zero start
        instead of a near-zero one is this toolkit's choice.
    """

    peft_name: ClassVar[str] = "ADAPTER"

    bottleneck: int = 64
    placement: Literal["attention", "mlp", "both"] = "both"
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    scale: float = 1.0
    init: Literal["zero", "near_zero"] = "zero"
    parallel: bool = False
    train_norms: bool = False

    def problems(self) -> Iterator[str]:
        name = self.peft_name.lower()
        if self.bottleneck < 1:
            yield f"{name}.bottleneck must be at least 1, got {self.bottleneck}. Try 64."
        if not (math.isfinite(self.scale) and self.scale > 0):
            yield f"{name}.scale must be a positive number, got {self.scale}. Try 1.0."
        choices = {"placement": PLACEMENTS, "activation": ACTIVATIONS}
        choices |= {"init": ("zero", "near_zero")}
        for key, known in choices.items():
            value = getattr(self, key)
            if value not in known:
                yield f"{name}.{key} must be one of {', '.join(known)}, got {value!r}"


def squeeze(x: Tensor, weights: Sequence[Tensor], activation: str, scale: float) -> Tensor:
    """S (W_up act(W_down x + b_down) + b_up), computed in x's dtype.

    Args:
        x: [..., d].
        weights: W_down [m, d], b_down [m], W_up [d', m], b_up [d'].
        activation: a key of ACTIVATIONS.
        scale: s.

    Returns:
        [..., d'].
    """
    down, down_bias, up, up_bias = (w.to(x.dtype) for w in weights)
    y = F.linear(ACTIVATIONS[activation](F.linear(x, down, down_bias)), up, up_bias)
    return y if scale == 1 else scale * y


class Bottleneck(nn.Module):
    """S (W_up act(W_down x + b_down) + b_up): what an adapter adds to a sublayer.

    Shape: [..., d] -> [..., d'].
    Parameters: down [m, d], down_bias [m], up [d', m], up_bias [d'], float32.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        units: int,
        activation: str = "relu",
        scale: float = 1.0,
        init: str = "zero",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.scale = activation, scale
        down, up = torch.empty(units, d_in), torch.zeros(d_out, units)
        if init == "near_zero":
            for weight in (down, up):
                nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02, generator=generator)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(torch.zeros(units))
        self.up, self.up_bias = nn.Parameter(up), nn.Parameter(torch.zeros(d_out))

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `squeeze` takes them."""
        return self.down, self.down_bias, self.up, self.up_bias

    def forward(self, x: Tensor) -> Tensor:
        return squeeze(x, self.weights, self.activation, self.scale)

    def extra_repr(self) -> str:
        (m, d), d_out = self.down.shape, self.up.shape[0]
        return f"{d} -> {m} -> {d_out}, {self.activation}, scale={self.scale}"


class Handover:
    """Carries a sublayer's input from its first Linear to its last, within one forward pass.

    torch.compile takes it into its graph, but not inside a checkpoint: those layers stay eager.
    """

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def take(self) -> Tensor:
        """The input, which is forgotten here: it must not outlive the pass."""
        x, self.x = self.x, None
        if x is None:
            raise RuntimeError(
                "a parallel adapter has no input: the sublayer's first Linear was not called "
                "before its last"
            )
        return x


class AdapterLayer(BaseTunerLayer):
    """What PEFT visits, and what knows its place: adapters of low layers can be left out.

    Attributes:
        branch, depth: of the site.
        dropped: leave the adapters out, as if there were none.
    """

    branch: str = ""
    depth: int | None = None
    dropped: bool = False

    def acting(self, group: str) -> list[str]:
        """The adapters that take part, among those in the container called `group`."""
        if self.disable_adapters or self.dropped:
            return []
        have = getattr(self, group)
        return [name for name in self.active_adapters if name in have]


class TappedLinear(nn.Module, AdapterLayer):
    """The first Linear of a sublayer, which hands its input to the adapted last one."""

    other_param_names = ("mmtune_taps",)

    def __init__(self, base_layer: nn.Linear, handover: Handover) -> None:
        super().__init__()
        self.base_layer, self.handover = base_layer, handover
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.mmtune_taps: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters = []

    def add_adapter(self, name: str) -> None:
        self.mmtune_taps[name] = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.acting("mmtune_taps"):
            self.handover.x = x
        return self.base_layer(x, *args, **kwargs)


class AdaptedLinear(nn.Module, AdapterLayer):
    """The last Linear of a sublayer with what its active adapters add to it.

    Shape: [..., in_features] -> [..., out_features].
    """

    adapter_layer_names = ("mmtune_adapter",)
    other_param_names = ("mmtune_parallel",)

    def __init__(self, base_layer: nn.Linear, handover: Handover) -> None:
        super().__init__()
        self.base_layer, self.handover = base_layer, handover
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.mmtune_adapter = nn.ModuleDict()
        self.mmtune_parallel: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters = []

    def add_adapter(self, name: str, adapter: nn.Module, parallel: bool) -> None:
        """Add a module [..., d] -> [..., d'], fed with this layer's output or (parallel) x."""
        self.mmtune_adapter[name] = adapter
        self.mmtune_parallel[name] = parallel

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        names = self.acting("mmtune_adapter")
        entered = self.handover.take() if any(self.mmtune_parallel[n] for n in names) else y
        total = y
        for name in names:
            source = entered if self.mmtune_parallel[name] else y
            total = total + self.added(name, source, y).to(y.dtype)
        return total

    def added(self, name: str, source: Tensor, y: Tensor) -> Tensor:
        """What adapter `name` adds to the Linear's output y; `source` is y or the sublayer's x."""
        return self.mmtune_adapter[name](source)


class TrainedNorm(nn.Module, AdapterLayer):
    """A norm whose weight and bias are trained, as differences from the stock ones."""

    adapter_layer_names = ("mmtune_weight", "mmtune_bias")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mmtune_weight = nn.ParameterDict()
        self.mmtune_bias = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters = []

    def add_adapter(self, name: str) -> None:
        base: Any = self.get_base_layer()
        self.mmtune_weight[name] = nn.Parameter(torch.zeros(base.weight.shape))
        if getattr(base, "bias", None) is not None:
            self.mmtune_bias[name] = nn.Parameter(torch.zeros(base.bias.shape))

    def forward(self, x: Tensor) -> Tensor:
        names = self.acting("mmtune_weight")
        if not names:
            return self.base_layer(x)
        base: Any = self.base_layer
        present = {"weight": base.weight, "bias": getattr(base, "bias", None)}
        for key, deltas in (("weight", self.mmtune_weight), ("bias", self.mmtune_bias)):
            for name in names:
                if name in deltas:
                    present[key] = (present[key] + deltas[name]).to(base.weight.dtype)
        given = {key: value for key, value in present.items() if value is not None}
        return cast(Tensor, torch.func.functional_call(base, given, (x,)))


class AdapterModel(SitedTuner):
    """Injects bottlenecks at the Linears that end the chosen sublayers."""

    tuner_layer_cls = AdapterLayer
    unmergeable = "its bottlenecks are not linear, so no weight can hold them"
    layer_class: ClassVar[type[AdaptedLinear]] = AdaptedLinear

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site]:
        chosen = adapter_sites(backbone, config)
        require_linear([s for s in chosen if s.role != "norm"], config.peft_name.lower())
        at = {(s.branch, s.layer, s.role): s for s in chosen}
        # Path of either end of a sublayer with a parallel adapter -> site of its other end.
        self._other_end: dict[str, Site] = {}
        for last in chosen if config.parallel else ():
            if last.role in ENTRANCES:
                first = at[last.branch, last.layer, ENTRANCES[last.role]]
                self._other_end |= {first.path: last, last.path: first}
        return chosen

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Site) -> nn.Module:
        layer: Any = target
        if site.role == "norm":
            layer = target if isinstance(target, TrainedNorm) else TrainedNorm(target)
            layer.add_adapter(adapter_name)
        elif site.role in ENTRANCES:
            if not isinstance(target, self.layer_class):
                layer = self.layer_class(target, self._handover(site))
            layer.add_adapter(adapter_name, self._fresh(config, site), config.parallel)
        else:
            if not isinstance(target, TappedLinear):
                layer = TappedLinear(target, self._handover(site))
            layer.add_adapter(adapter_name)
        layer.branch, layer.depth = site.branch, site.layer
        self._settle(layer, adapter_name, layer.get_base_layer().weight.device)
        return layer

    def _fresh(self, config: Any, site: Site) -> nn.Module:
        """The adapter of the sublayer that ends at `site`."""
        return Bottleneck(
            *self._widths(site),
            config.bottleneck,
            config.activation,
            config.scale,
            config.init,
            self._generator,
        )

    def _widths(self, site: Site) -> tuple[int, int]:
        """Of what an adapter takes (the sublayer's output, or its input) and of what it gives."""
        d_out = cast(Any, site.module).out_features
        first = self._other_end.get(site.path)
        return (cast(Any, first.module).in_features if first else d_out), d_out

    def _handover(self, site: Site) -> Handover:
        """The one of the sublayer's other end, where that has one already."""
        other = self._other_end.get(site.path)
        present = self.model.get_submodule(other.path) if other else None
        if isinstance(present, AdaptedLinear | TappedLinear):
            return present.handover
        return Handover()


def adapter_sites(backbone: Backbone, config: AdapterConfig) -> list[Site]:
    """The Linears that end the chosen sublayers; their entrances and the norms where asked for.

    Raises:
        SiteError: none of the chosen branches has such a sublayer.
    """
    ends = PLACEMENTS[config.placement]
    branches = config.branches
    have = {s.role for s in backbone.sites() if branches is None or s.branch in branches}
    roles = [role for role in ends if role in have] or list(ends)
    if config.parallel:
        roles += [ENTRANCES[role] for role in roles]
    if config.train_norms:
        roles.append("norm")
    return backbone.select(branches, roles, config.layers)


PEFT_METHODS = {AdapterConfig.peft_name: (AdapterConfig, AdapterModel)}
METHODS = (
    Method(
        name="adapter",
        summary="a bottleneck after (or beside) attention and MLP",
        source="arXiv 1902.00751 (ICML 2019); parallel: arXiv 2110.04366 (ICLR 2022)",
        options=options_of(AdapterConfig, leave_out=["adapted"]),
        build=config_of(AdapterConfig),
    ),
)
