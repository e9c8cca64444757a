"""The updates of all layers, computed together at the start of a forward pass.

Each layer needs L and R with dW = L R, small products of what all layers share and a vector of its
own, and then W + dW. Layer by layer they are many small operations, forward and backward, and a
fast GPU waits for their launches; stacked they are a few.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmtune.tuners.aurora.stacks import Stack
from mmtune.tuners.aurora.updates import Update

if TYPE_CHECKING:
    from mmtune.tuners.aurora.layer import AuroraLinear


# Bytes of weights that are formed at once. They are together in memory from the first of their
# layers' forward to the last of their backward; products with larger ones hide their launches.
AT_ONCE = 2**29


@dataclass(frozen=True)
class Unit:
    """Layers that compute together.

    Attributes:
        names: of the adapters that are added to their weights.
        members: the layers.
        active: of each, by its identity, all active adapters.
        others: those of them that are not added; where there is any, the unit is one layer.
        places: for each name, which stack has the update, and where in it.
    """

    names: Sequence[str]
    members: Sequence[AuroraLinear]
    active: Mapping[int, Sequence[str]]
    others: Sequence[str]
    places: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Known:
    """What layers that compute together do in the present forward pass.

    Attributes:
        unit: the layers.
        update: what is added to their weights.
        parts: the parameters that it was computed from.
        marks: of these, as they were.
    """

    unit: Unit
    update: Update
    parts: Sequence[Tensor]
    marks: object

    def holds(self, layer: AuroraLinear) -> bool:
        """Whether the layer's adapters and their parameters are those of the pass's start."""
        same = not layer.disable_adapters and layer.active_adapters == self.unit.active[id(layer)]
        return same and _marks(self.parts) == self.marks


class Plan:
    """Which layers compute together, and which updates are computed together.

    Attributes:
        units: all of them.
        stacks: of each stack the adapter, its units' members, and whether their weights are formed
            at once: there is room, and none of them trains.
    """

    def __init__(self, layers: Iterable[AuroraLinear]) -> None:
        self.units: list[Unit] = []
        self.stacks: list[tuple[str, list[Sequence[AuroraLinear]], bool]] = []
        alike_of: list[tuple[str, list[Sequence[AuroraLinear]]]] = []
        kinds: dict[Hashable, int] = {}
        seen: set[int] = set()
        for layer in layers:
            names = [] if id(layer) in seen else layer.added()
            if not names:
                continue
            members = layer.siblings.group(layer, names)
            seen.update([id(m) for m in members])
            active = {id(m): list(m.active_adapters) for m in members}
            places: list[tuple[int, int]] = []
            self.units.append(Unit(names, members, active, layer.others(), places))
            for name in names:
                kind = (name, *members[0].kind(name))
                if kind not in kinds:
                    kinds[kind] = len(alike_of)
                    alike_of.append((name, []))
                alike = alike_of[kinds[kind]][1]
                places.append((kinds[kind], len(alike)))
                alike.append(members)
        room = AT_ONCE
        for name, alike in alike_of:
            layers = [m for members in alike for m in members]
            size = sum(m.linear.weight.nbytes for m in layers)
            whole = size <= room and not any(m.trains() for m in layers)
            self.stacks.append((name, alike, whole))
            room -= size if whole else 0


class Rounds:
    """Knows what the layers of a model do in the present forward pass.

    It is computed before the first layer, outside of what activation checkpointing computes again,
    and serves that second computation too, which happens in backward. A layer computes by itself
    where that may not hold: parts of the model are called past its own forward; their parameters or
    active adapters were exchanged for a while; gradients are off for a part of the pass (as in
    reentrant checkpointing, whose layers have graphs of their own that end with each).

    Attributes:
        layers: the adapted layers.
    """

    def __init__(self) -> None:
        self.layers: list[AuroraLinear] = []
        self._plan: tuple[object, Plan] | None = None  # and the state for which it was made
        self._known: dict[int, Known] = {}
        self._served: set[int] = set()  # layers of the last pass with gradients that took part
        self._before: tuple[dict[int, Known], set[int]] | None = None  # of a pass without them
        self._stacks: list[Stack] = []
        self._open = self._late = self._graded = False
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no forward pass."""
        copied = {name: vars(self)[name] for name in ("layers", "_handles")}
        return {**vars(Rounds()), **copied}

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

    def known(self, layer: AuroraLinear, few: bool = False) -> Known | None:
        """What is known of a layer in this pass, or in its recomputation; None: compute alone.

        Args:
            layer: which.
            few: whether it asks for few tokens, for which not all layers' updates are computed
                where there was none yet (without gradients).
        """
        if not self._open and (not self._known or not _recomputing()):
            self._served.discard(id(layer))
            return None
        if self._open and self._graded and not torch.is_grad_enabled():
            return None
        if self._late:
            if few:
                return None
            self._compute()
        found = self._known.get(id(layer))
        if found is None or (not self._open and id(layer) not in self._served):
            return None
        if self._open:
            if not found.holds(layer):
                return None
            self._served.update(found.unit.active)
        return found

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._open, self._graded = True, torch.is_grad_enabled()
        if not self._graded:  # a backward pass of before may yet come
            self._before = self._known, self._served
        self._known, self._served = {}, set()
        # Without gradients there is time until a layer asks; few tokens may ask for nothing.
        self._late = not self._graded
        if not self._late:
            self._compute()

    def _compute(self) -> None:
        self._late = False
        plan = self._planned()
        self._stacks = [
            units[0][0].stack(name, units, whole=whole) for name, units, whole in plan.stacks
        ]
        for unit in plan.units:
            places = [(self._stacks[stack], place) for stack, place in unit.places]
            update = Update.of(unit.members, places)
            parts = [part for stack, place in places for part in stack.parts[place]]
            known = Known(unit, update, parts, _marks(parts))
            self._known.update((id(m), known) for m in unit.members)

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
        for layer in self.layers:
            layer.siblings.forget()
        if self._before is not None:
            self._known, self._served = self._before
            self._before = None


def _marks(parts: Sequence[Tensor]) -> object:
    """Other ones where a parameter got other numbers, or other memory."""
    if torch.compiler.is_compiling() or isinstance(parts[0], FakeTensor):
        return None
    return [mark for part in parts for mark in (part.data_ptr(), part._version)]


def _recomputing() -> bool:
    """Whether this is a backward pass, in which activation checkpointing computes again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
