"""The updates of all layers, computed together at the start of a forward pass.

Each layer needs L and R with dW = L R, small products of what all layers share and a vector of its
own, and then W + dW. Layer by layer they are many small operations, forward and backward, and a
fast GPU waits for their launches; stacked they are a few.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmtune.tuners.aurora.stacks import Stack
from mmtune.tuners.aurora.updates import Update

if TYPE_CHECKING:
    from mmtune.tuners.aurora.layer import AuroraLinear


@dataclass(frozen=True)
class Known:
    """What a layer does in the present forward pass.

    Attributes:
        added: active adapters that are added to its weight.
        others: the rest of them.
        update: what is added to the weights of its group.
    """

    added: Sequence[str]
    others: Sequence[str]
    update: Update


@dataclass
class Unit:
    """Layers that compute together.

    Attributes:
        names: of the adapters that are added to their weights.
        members: the layers.
        others: of each, the other active adapters.
        places: for each name, which stack has the update, and where in it.
    """

    names: Sequence[str]
    members: Sequence[AuroraLinear]
    others: Sequence[Sequence[str]]
    places: list[tuple[int, int]]


class Plan:
    """Which layers compute together, and which updates are computed together.

    Attributes:
        units: all of them.
        stacks: of each stack the adapter and its units' members.
    """

    def __init__(self, layers: Iterable[AuroraLinear]) -> None:
        self.units: list[Unit] = []
        self.stacks: list[tuple[str, list[Sequence[AuroraLinear]]]] = []
        kinds: dict[Hashable, int] = {}
        seen: set[int] = set()
        for layer in layers:
            names = [] if id(layer) in seen else layer.added()
            if not names:
                continue
            members = layer.siblings.group(layer, names)
            seen.update([id(m) for m in members])
            others = [[name for name in m.active() if name not in names] for m in members]
            unit = Unit(names, members, others, [])
            self.units.append(unit)
            for name in names:
                kind = (name, *members[0].kind(name))
                if kind not in kinds:
                    kinds[kind] = len(self.stacks)
                    self.stacks.append((name, []))
                alike = self.stacks[kinds[kind]][1]
                unit.places.append((kinds[kind], len(alike)))
                alike.append(members)


class Rounds:
    """Knows what the layers of a model do in the present forward pass.

    It is computed before the first layer, outside of what activation checkpointing computes again,
    and serves that second computation too, which happens in backward. Calls of parts of the model,
    past its own forward, find nothing here and compute by themselves.

    Attributes:
        layers: the adapted layers.
    """

    def __init__(self) -> None:
        self.layers: list[AuroraLinear] = []
        self._plan: tuple[object, Plan] | None = None  # and the state for which it was made
        self._known: dict[int, Known] = {}
        self._stacks: list[Stack] = []
        self._open = self._late = self._graded = self._alone = False
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no forward pass."""
        fresh = {"_plan": None, "_known": {}, "_stacks": [], "_open": False, "_late": False}
        return {**vars(self), **fresh}

    def watch(self, model: nn.Module) -> None:
        """Begin a round with each forward pass of a model, once however often it is called."""
        if not self._handles:
            self._handles = [
                model.register_forward_pre_hook(self._begin),
                model.register_forward_hook(self._end, always_call=True),
            ]

    def leave(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def known(self, layer: AuroraLinear) -> Known | None:
        """What is known of a layer in this pass, or in its recomputation."""
        if self._late:
            self._compute()
        if self._open:
            # Reentrant checkpointing: this layer's graph is built anew in backward, and gone with
            # it, so that its updates cannot be shared by layers that are computed again later.
            self._alone = self._alone or (self._graded and not torch.is_grad_enabled())
            return self._known.get(id(layer))
        if self._known and not self._alone and _recomputing():
            return self._known.get(id(layer))
        return None

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._known.clear()
        self._open, self._alone = True, False
        self._graded = torch.is_grad_enabled()
        # Without gradients there is time until a layer asks; few tokens may ask for nothing.
        self._late = not self._graded
        if not self._late:
            self._compute()

    def _compute(self) -> None:
        self._late = False
        plan = self._planned()
        self._stacks = [units[0][0].stack(name, units, whole=True) for name, units in plan.stacks]
        for unit in plan.units:
            places = [(self._stacks[stack], place) for stack, place in unit.places]
            update = Update.of(unit.members, places)
            for m, others in zip(unit.members, unit.others, strict=True):
                self._known[id(m)] = Known(unit.names, others, update)

    def _planned(self) -> Plan:
        state = [layer.state() for layer in self.layers]
        if self._plan is None or self._plan[0] != state:
            self._plan = state, Plan(self.layers)
        return self._plan[1]

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._open = self._late = False
        for stack in self._stacks:
            stack.close()
        self._stacks = []
        if not torch.is_grad_enabled():
            self._known.clear()


def _recomputing() -> bool:
    """Whether this is a backward pass, in which activation checkpointing computes again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
