"""One adapted Linear."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtune.backbones.base import hooked
from mmtune.tuners.aurora.config import AuroraConfig
from mmtune.tuners.aurora.factors import AuroraLayer, Blocks, ModeFactors, mixers
from mmtune.tuners.aurora.node import computing_dtype
from mmtune.tuners.aurora.rounds import Rounds
from mmtune.tuners.aurora.siblings import Siblings
from mmtune.tuners.aurora.stacks import Stack


@dataclass(frozen=True)
class Placed:
    """How one adapter sits on one layer of a branch; `key` names the factors that it shares."""

    branch: str
    key: str
    blocks: Blocks
    rank: int
    alpha: float
    dropout: float
    interleaved: bool
    compute: str


class AuroraLinear(nn.Module, AuroraLayer):
    """y = x (W + sum over active adapters of dW)^T + b.

    Shape: [..., in_features] -> [..., out_features].
    Parameters: aurora_modes[adapter] [m, R]: one mode vector for each of the weight's m blocks.
    """

    adapter_layer_names = ("aurora_modes",)
    other_param_names = ("aurora_placed",)
    role = ""  # of its site

    def __init__(self, base_layer: nn.Linear, factors: ModeFactors) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.aurora_modes = nn.ParameterDict()
        self.aurora_placed: dict[str, Placed] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        # Unregistered on purpose: the factors would otherwise be saved once per layer.
        object.__setattr__(self, "factors", factors)
        self.siblings, self.rounds = Siblings(), Rounds()
        self.siblings.members.append(self)

    @property
    def linear(self) -> nn.Linear:
        """The stock layer."""
        base = self._modules["base_layer"]
        return base if type(base) is nn.Linear else cast(nn.Linear, self.get_base_layer())

    def joins(self, other: AuroraLinear, names: Sequence[str]) -> bool:
        """Whether just these adapters act, and are added, with the U that `other` has."""
        mine, its = self.aurora_placed, other.aurora_placed
        return (
            self.added() == list(names)
            and not self.others()
            and all((mine[n].key, mine[n].rank) == (its[n].key, its[n].rank) for n in names)
        )

    def add_adapter(
        self,
        name: str,
        key: str,
        blocks: Blocks,
        rank: int,
        config: AuroraConfig,
        generator: torch.Generator | None,
        branch: str = "",
    ) -> bool:
        """Give the layer an adapter.

        Args:
            name: of the adapter.
            key: of the factors that it shares; see `sharing_key`.
            blocks: how the weight is cut.
            rank: components that it uses.
            config: of the adapter.
            generator: of the random start.
            branch: in which the layer is.

        Returns:
            Whether factors were made, which no layer had yet.
        """
        factors = cast(ModeFactors, self.factors)
        # What all branches share must hold the largest of their ranks.
        r = config.rank if config.sharing == "all" else rank
        made = factors.require(name, key, blocks, r, config.core, generator)
        modes = torch.randn(blocks.count, rank, generator=generator)
        self.aurora_modes[name] = nn.Parameter(modes)
        self.aurora_placed[name] = Placed(
            branch,
            key,
            blocks,
            rank,
            config.alpha,
            config.dropout,
            config.block_layout == "interleaved",
            config.compute if self._can_form(config) else "separate",
        )
        return made

    def _can_form(self, config: AuroraConfig) -> bool:
        """Whether the update may be added to the weight. ValueError where it must be and cannot."""
        plain = is_plain(self.base_layer)
        if config.compute == "materialise" and not plain:
            found = type(self.base_layer).__name__
            dtype = getattr(getattr(self.base_layer, "weight", None), "dtype", None)
            raise ValueError(
                f"aurora.compute is materialise, but this {found} (weight: {dtype}) is no plain "
                "Linear, to whose weight an update can be added. Set compute: auto, or separate."
            )
        return config.forms() and plain

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._disable_adapters:  # what waits has all that acts
            y = self.siblings.take(self, x)
            if y is not None:
                return y
        few = self._few(x)
        known = self.rounds.known(self, few)
        if known is None and self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if known is None:
            added, update, others = self.added(), None, self.others()
        else:
            added, update, others = known.unit.names, known.update, known.unit.others
        if added:
            y = self.siblings.output(self, x, added, update, few)
        else:
            y = self.base_layer(x, *args, **kwargs)
        for name in others:
            y = y + self._token_delta(name, x).to(y.dtype)
        return y

    def _few(self, x: Tensor) -> bool:
        """Whether forming dW = L R multiplies more numbers than applying R and L to tokens."""
        tokens = x.numel() // self.in_features
        return tokens * (self.in_features + self.out_features) < (
            self.in_features * self.out_features
        )

    def active(self) -> list[str]:
        """Adapters that act and are not in the weight already."""
        return [] if self.merged else self.acting("aurora_modes")

    def added(self) -> list[str]:
        """Active adapters whose updates are added to the weight, or to few tokens' outputs."""
        return [name for name in self.active() if self.aurora_placed[name].compute != "separate"]

    def others(self) -> list[str]:
        """The rest of the active adapters."""
        return [name for name in self.active() if self.aurora_placed[name].compute == "separate"]

    def _token_delta(self, name: str, x: Tensor) -> Tensor:
        """The update applied to tokens, without forming dW: [..., in] -> [..., out]."""
        placed = self.aurora_placed[name]
        blocks = placed.blocks
        u, v, m = self._factors(name, x.dtype)
        tokens = x.unflatten(-1, (blocks.columns, blocks.d_in)) if blocks.columns > 1 else x
        h = F.linear(tokens, u)  # [..., (columns,) R]
        if placed.dropout:
            h = F.dropout(h, placed.dropout, self.training)
        if blocks.columns > 1:
            h = _mix_columns(h, m)
        elif blocks.rows > 1:
            h = _mix_rows(h, m)
        else:
            h = h * m[0] if m.dim() == 2 else h @ m[0]
        y = F.linear(h, v)
        return y.flatten(-2) if blocks.rows > 1 else y

    def stack(
        self,
        name: str,
        units: Sequence[Sequence[AuroraLinear]],
        dtype: torch.dtype | None = None,
        whole: bool = False,
    ) -> Stack:
        """An adapter's updates of layers of the kind of this one; see `Stack`.

        Args:
            name: of the adapter.
            units: of layers that compute together.
            dtype: None means that in which the layers compute.
            whole: whether weights are formed at once.
        """
        placed = self.aurora_placed[name]
        columns = placed.blocks.columns > 1
        factors = cast(ModeFactors, self.factors)
        u, v, core = factors.of(name, placed.key, placed.rank)
        own = [[layer.aurora_modes[name] for layer in unit] for unit in units]
        modes = [vector for of_unit in own for vector in of_unit]
        if placed.interleaved:  # mixes the mode vectors of one layer
            m = torch.stack([mixers(core, of_one, True, not columns) for of_one in modes])
        else:
            m = mixers(core, torch.cat(modes), False, True).unflatten(0, (len(modes), -1))
        dtype = dtype or computing_dtype(self.linear.weight)
        stack = Stack(units, u, v, _scaled(m, placed.alpha), columns, dtype, whole)
        shared = factors.parts(name, placed.key)
        stack.parts = [(*shared, *of_unit) for of_unit in own]
        stack.always = placed.compute == "materialise"
        return stack

    def trains(self) -> bool:
        """Whether the stock layer's weight or bias wants a gradient."""
        base = self.linear
        return _trains(base.weight, base.bias)

    def state(self) -> tuple[Hashable, ...]:
        """Equal as long as the layer's adapters act in the same way."""
        base = self.linear
        weight = base.weight
        return (
            self._disable_adapters,
            tuple(self.active_adapters),
            tuple(self.merged_adapters),
            tuple(self.aurora_placed.items()),
            weight.dtype,
            weight.device,
            _trains(weight, base.bias),
        )

    def kind(self, name: str) -> tuple[Hashable, ...]:
        """Equal for layers whose updates can be computed together."""
        weight = self.linear.weight
        return (self.aurora_placed[name], weight.device, weight.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """DW of an adapter, [out_features, in_features], in the dtype of its factors."""
        left, right = self.stack(adapter, [[self]], self.aurora_modes[adapter].dtype).pairs[0]
        return left @ right

    def _factors(self, name: str, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """U, V and the scaled mixers of this layer, in `dtype` (None: as they are)."""
        placed = self.aurora_placed[name]
        factors = cast(ModeFactors, self.factors)
        u, v, core = factors.of(name, placed.key, placed.rank)
        modes, rows = self.aurora_modes[name], placed.blocks.columns == 1
        m = _scaled(mixers(core, modes, placed.interleaved, rows), placed.alpha)
        return (u, v, m) if dtype is None else (u.to(dtype), v.to(dtype), m.to(dtype))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the update into the base weight.

        Args:
            safe_merge: check the result for non-finite values and leave the weight as it was if
            any.
            adapter_names: adapters to fold; None means the active ones.

        Raises:
            ValueError: safe_merge found non-finite values.
            TypeError: the base weight is quantised.
        """
        base = cast(nn.Linear, self.get_base_layer())
        for name in adapter_names if adapter_names is not None else self.active_adapters:
            if name not in self.aurora_modes or name in self.merged_adapters:
                continue
            if not base.weight.is_floating_point():
                raise TypeError(
                    f"cannot merge adapter {name!r} into a quantised weight ({base.weight.dtype}); "
                    "load the base model in float32 or bfloat16 to merge"
                )
            # The sum is taken in the factors' float32 and rounded once.
            merged = (base.weight.data + self.get_delta_weight(name).detach()).to(base.weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter {name!r} would give non-finite weights")
            base.weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what `merge` added; equal to the base up to rounding of its dtype."""
        base = cast(nn.Linear, self.get_base_layer())
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.aurora_modes:
                restored = base.weight.data - self.get_delta_weight(name).detach()
                base.weight.data = restored.to(base.weight.dtype)

    def extra_repr(self) -> str:
        return f"aurora={self.aurora_placed}"


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b with a stock weight and nothing else."""
    stock = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    weight = getattr(module, "weight", None)
    return (
        type(module) in stock
        and type(weight) is nn.Parameter
        and weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        and not hooked(module)
    )


def _trains(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _scaled(mixers: Tensor, alpha: float) -> Tensor:
    return mixers if alpha == 1 else mixers * alpha


def _mix_rows(h: Tensor, m: Tensor) -> Tensor:
    """[..., R] -> [..., rows, R], one mixture a block."""
    return h.unsqueeze(-2) * m if m.dim() == 2 else torch.einsum("...i,mij->...mj", h, m)


def _mix_columns(h: Tensor, m: Tensor) -> Tensor:
    """[..., columns, R] -> [..., R]: each block's part mixed, then summed."""
    return (h * m).sum(-2) if m.dim() == 2 else torch.einsum("...mi,mij->...j", h, m)
