"""Virtual keys and values: the parameters of prefix tuning, P-tuning v2, MAM and UniPELT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtune.backbones.attention import EXTENSION, extend
from mmtune.backbones.base import Backbone, Site, SiteError
from mmtune.tuners.sited import Attached, SitedTuner

ATTENTIONS = {"attention": "k", "cross_attention": "cross_k"}


@dataclass(frozen=True)
class Slot:
    """Where the keys and values of one attention lie in its branch's table.

    Attributes:
        branch: the attention's branch.
        start: first of its 2 * width columns: keys, then values.
        width: of its keys: heads times size of a head, which grouped-query attention and T5 make
            smaller or larger than the branch's width.
        source: d, the branch's width.
    """

    branch: str
    start: int
    width: int
    source: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + 2 * self.width)


class VirtualKeys(Attached):
    """Keys and values before those of every chosen attention, registered once in the model.

    An adapter has one or more parts (a prefix; or the prompts of several tasks), and per part and
    branch a table [p, n], n the sum over the branch's attentions of 2 * the width of their keys:

        flat            table
        reparameterised table = tanh(embed down^T + down_bias) up^T + up_bias

    with embed [p, d], down [m, d], up [n, m]. Each attention computes its own columns alone.
    """

    adapter_layer_names = ("mmtune_keys",)
    other_param_names = ("slots", "parts")

    def __init__(self) -> None:
        super().__init__()
        self.mmtune_keys = nn.ModuleDict()
        # Adapter -> path of an attention -> where its columns are.
        self.slots: dict[str, dict[str, Slot]] = {}
        # Adapter -> the parts in use, in the order in which attention sees them.
        self.parts: dict[str, list[str]] = {}
        self._extended: dict[str, nn.Module] = {}

    def add_adapter(
        self,
        name: str,
        slots: Mapping[str, Slot],
        lengths: Mapping[str, int],
        bottleneck: int | None,
        generator: torch.Generator | None,
    ) -> None:
        """Make the parameters of an adapter.

        Args:
            name: of the adapter.
            slots: path of each attention -> its slot.
            lengths: part -> p; all parts are in use at first.
            bottleneck: m; None makes flat tables.
            generator: draws the random start.
        """
        self.slots[name] = dict(slots)
        self.parts[name] = list(lengths)
        table: dict[str, nn.Parameter] = {}
        for part, p in lengths.items():
            for branch in dict.fromkeys(slot.branch for slot in slots.values()):
                ours = [slot for slot in slots.values() if slot.branch == branch]
                n, d = sum(2 * slot.width for slot in ours), ours[0].source
                fresh = (
                    {"table": 0.02 * torch.randn(p, n, generator=generator)}
                    if bottleneck is None
                    else _perceptron(p, d, bottleneck, n, generator)
                )
                for kind, value in fresh.items():
                    table[_key(part, branch, kind)] = nn.Parameter(value)
        self.mmtune_keys[name] = nn.ParameterDict(table)

    def install(self, path: str, module: nn.Module) -> None:
        """Let the attention at `path` see its virtual keys and values."""
        extend(module, partial(self.at, path))
        self._extended[path] = module

    def detach(self) -> None:
        for module in self._extended.values():
            extend(module, None)

    def at(self, path: str, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the attention at `path` puts before its keys [b, h, s, e] and values.

        Returns:
            Keys and values [b, h, p, e] in the keys' dtype; None where no active adapter sits here.
        """
        if self.disable_adapters:
            return None
        found = [
            self.scaled(name, path, self._rows(name, part, self.slots[name][path]))
            for name in self.active_adapters
            if path in self.slots.get(name, ())
            for part in self.parts[name]
        ]
        if not found:
            return None
        b, h, _, e = keys.shape
        table = torch.cat(found, dim=-2).to(keys.dtype).unflatten(-1, (2, h, e))
        k, v = table.expand(b, -1, -1, -1, -1).permute(2, 0, 3, 1, 4)
        return k, v

    def scaled(self, name: str, path: str, rows: Tensor) -> Tensor:
        """What attention sees of an adapter's rows [p, 2 * width]: [p, ...] or [b, p, ...]."""
        return rows

    def _rows(self, name: str, part: str, slot: Slot) -> Tensor:
        """[p, 2 * width] of one attention."""
        parameters = cast(nn.ParameterDict, self.mmtune_keys[name])
        flat = _key(part, slot.branch, "table")
        if flat in parameters:
            return parameters[flat][:, slot.columns]
        embed, down, down_bias, up, up_bias = (
            parameters[_key(part, slot.branch, kind)] for kind in _KINDS
        )
        hidden = torch.tanh(F.linear(embed, down, down_bias))
        return F.linear(hidden, up[slot.columns], up_bias[slot.columns])

    @torch.no_grad()
    def flatten(self, name: str) -> None:
        """Replace an adapter's perceptrons by the tables that they compute."""
        old = cast(nn.ParameterDict, self.mmtune_keys[name])
        slots = self.slots[name].values()
        flat: dict[str, nn.Parameter] = {}
        for part, branch in dict.fromkeys(tuple(key.split("__")[:2]) for key in old):
            rows = [self._rows(name, part, slot) for slot in slots if slot.branch == branch]
            grad = next(iter(old.values())).requires_grad
            flat[_key(part, branch, "table")] = nn.Parameter(torch.cat(rows, 1), grad)
        self.mmtune_keys[name] = nn.ParameterDict(flat)


_KINDS = ("embed", "down", "down_bias", "up", "up_bias")


def _key(part: str, branch: str, kind: str) -> str:
    return f"{part}__{branch}__{kind}"


def _perceptron(
    p: int, d: int, m: int, n: int, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """A fresh embedding N(0, 1) and two Linears with PyTorch's own start."""

    def uniform(*shape: int, fan_in: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(fan_in)

    return {
        "embed": torch.randn(p, d, generator=generator),
        "down": uniform(m, d, fan_in=d),
        "down_bias": uniform(m, fan_in=d),
        "up": uniform(n, m, fan_in=m),
        "up_bias": uniform(n, fan_in=m),
    }


def choose_attentions(
    backbone: Backbone, branches: Sequence[str] | None, layers: Any
) -> list[Site]:
    """Every attention, self and cross, of the chosen branches and layers, in forward order."""
    sites = [site for site in backbone.sites() if site.role in ATTENTIONS]
    if branches is None:
        branches = list(dict.fromkeys(site.branch for site in sites))
    roles = {site.role for site in sites if site.branch in branches} or {"attention"}
    return backbone.select(branches, sorted(roles), layers)


def slots_of(backbone: Backbone, chosen: Sequence[Site]) -> dict[str, Slot]:
    """Path of each attention -> its columns in its branch's table, in the order of `chosen`."""
    keys: dict[tuple[str, int | None, str], Any] = {
        (s.branch, s.layer, s.role): s.module for s in backbone.sites()
    }
    used: dict[str, int] = {}
    slots = {}
    for site in chosen:
        width = keys[site.branch, site.layer, ATTENTIONS[site.role]].out_features
        start = used.get(site.branch, 0)
        slots[site.path] = Slot(site.branch, start, width, site.width)
        used[site.branch] = start + 2 * width
    return slots


class VirtualKeysTuner(SitedTuner):
    """Injects one `VirtualKeys` in the model and lets the chosen attentions see it.

    Its config has `lengths()`, part -> p, and `perceptron()`, m or None.
    """

    # `inject_adapter_in_model` is refused: only get_peft_model knows to remove the keys on unload.
    uses_shared_state = True
    unmergeable = "no weight makes its virtual keys and values; load the adapter beside the model"
    keys_class: ClassVar[type[VirtualKeys]]
    # Of the attached layer. PEFT must visit it, so it must not hold the methods' common prefix.
    keys_name: ClassVar[str]

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Site]:
        return self._plan(backbone, config.branches, config.layers)

    def _plan(self, backbone: Backbone, branches: Sequence[str] | None, layers: Any) -> list[Site]:
        """The attentions that get virtual keys; raises where one cannot take them.

        Raises:
            SiteError: another method has put virtual keys there.
            ValueError: the model was loaded with an attention that takes none.
        """
        chosen = choose_attentions(backbone, branches, layers)
        mine = getattr(self.model, self.keys_name, None)
        for site in chosen:
            present = getattr(site.module, EXTENSION, None)
            if present is not None and getattr(present, "func", None) != getattr(mine, "at", None):
                raise SiteError(
                    f"{site.path} has virtual keys of another method already; an attention takes "
                    "those of one method. Unload that adapter first."
                )
            extend(site.module, present)
        self._slots = slots_of(backbone, chosen)
        return chosen

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Site) -> nn.Module:
        keys = self._attach(self.keys_name, self.keys_class)
        if adapter_name not in keys.slots:
            keys.add_adapter(
                adapter_name, self._slots, config.lengths(), config.perceptron(), self._generator
            )
            self._settle(keys, adapter_name, next(target.parameters()).device)
        keys.install(site.path, target)
        return target
