"""The updates of all layers, computed together at the start of a forward pass.

Each layer needs L and R with dW = L R, small products of what all layers share and a vector of its
own, and then W + dW. Layer by layer they are many small operations, forward and backward, and a
fast GPU waits for their launches; stacked they are a few.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
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
        self._known: dict[int, Known] = {}
        self._stacks: list[Stack] = []
        self._open = False
        self._handles: list[Any] = []

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
        if not self._known or torch.compiler.is_compiling():
            return None
        recomputing = torch._C._current_graph_task_id() != -1
        return self._known.get(id(layer)) if self._open or recomputing else None

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._known.clear()
        self._open = not torch.compiler.is_compiling()
        if not self._open:
            return
        units = list(self._units())
        kinds: dict[Hashable, list[Sequence[AuroraLinear]]] = {}
        for names, members in units:
            for name in names:
                kinds.setdefault((name, *members[0].kind(name)), []).append(members)
        found: dict[tuple[int, str], tuple[Stack, int]] = {}
        for (name, *_), alike in kinds.items():  # type: ignore[misc]
            stack = alike[0][0].stack(name, alike, whole=True)
            self._stacks.append(stack)
            for place, members in enumerate(alike):
                found[id(members[0]), name] = stack, place
        for names, members in units:
            update = Update.of(members, [found[id(members[0]), name] for name in names])
            for m in members:
                others = [name for name in m.active() if name not in names]
                self._known[id(m)] = Known(names, others, update)

    def _units(self) -> Iterator[tuple[Sequence[str], Sequence[AuroraLinear]]]:
        """The layers that compute together, with the adapters that are added to their weights."""
        seen: set[int] = set()
        for layer in self.layers:
            names = [] if id(layer) in seen else layer.added()
            if names:
                members = layer.siblings.group(layer, names)
                seen.update(map(id, members))
                yield names, members

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._open = False
        for stack in self._stacks:
            stack.close()
        self._stacks.clear()
        if not torch.is_grad_enabled():
            self._known.clear()
