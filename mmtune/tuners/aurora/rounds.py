"""The factor pairs of all layers, computed together at the start of a forward pass.

Each layer needs L and R with dW = L R, small products of what all layers share and a vector of its
own. Layer by layer they are many small operations, forward and backward, and a fast GPU waits for
their launches; stacked they are a few.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmtune.tuners.aurora.layer import AuroraLinear

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Update:
    """What some adapters together add to a layer's weight.

    Attributes:
        names: of the adapters.
        left: L [out_features, R]; with several adapters their parts lie beside one another.
        right: R [R, in_features].
    """

    names: Sequence[str]
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, pairs: Mapping[str, Pair]) -> Update:
        """Join the pairs of adapters."""
        lefts, rights = zip(*pairs.values(), strict=True)
        if len(pairs) == 1:
            return cls(list(pairs), lefts[0], rights[0])
        return cls(list(pairs), torch.cat(lefts, 1), torch.cat(rights))


class Rounds:
    """Knows the updates of the present forward pass of a model.

    They are computed before its first layer, outside of what activation checkpointing computes
    again, and serve that second computation too, which happens in backward. Calls of parts of the
    model, past its own forward, find nothing here and compute their updates by themselves.

    Attributes:
        layers: the adapted layers.
    """

    def __init__(self) -> None:
        self.layers: list[AuroraLinear] = []
        self._known: dict[int, Update] = {}
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

    def update(self, layer: AuroraLinear, names: Sequence[str]) -> Update:
        """What these adapters of a layer add to its weight."""
        recomputing = torch._C._current_graph_task_id() != -1
        known = self._known.get(id(layer)) if self._open or recomputing else None
        if known is not None and known.names == names:
            return known
        return Update.of({name: layer.pair(name) for name in names})

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._known.clear()
        self._open = not torch.compiler.is_compiling()
        if not self._open:
            return
        added = {id(layer): layer.added() for layer in self.layers}
        groups: dict[Hashable, list[AuroraLinear]] = {}
        for layer in self.layers:
            for name in added[id(layer)]:
                groups.setdefault((name, *layer.kind(name)), []).append(layer)
        found: dict[tuple[int, str], Pair] = {}
        for (name, *_), layers in groups.items():  # type: ignore[misc]
            for layer, pair in zip(layers, layers[0].pairs(name, layers), strict=True):
                found[id(layer), name] = pair
        self._known = {
            key: Update.of({name: found[key, name] for name in names})
            for key, names in added.items()
            if names
        }

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._open = False
        if not torch.is_grad_enabled():
            self._known.clear()


def pairs_of(
    u: Tensor,
    v: Tensor,
    mixers: Tensor,
    columns: bool,
    dtype: torch.dtype,
    readers: Sequence[Hashable],
) -> Sequence[Pair]:
    """L and R of n weights that are cut alike and share U and V.

    Args:
        u: [R, d_in].
        v: [d_out, R].
        mixers: [n, m, R] or [n, m, R, R], those of each weight's m blocks.
        columns: whether the blocks lie beside one another.
        dtype: of the pairs.
        readers: one for each weight; weights with the same one read the same tokens.

    Returns:
        L [m d_out, R] and U, or with columns V and R [R, m d_in], of each. Weights with the same
        reader get the same U.
    """
    dense = mixers.dim() == 4
    if columns:
        own = torch.einsum("nmij,iw->njmw" if dense else "nmr,ri->nrmi", mixers, u).flatten(2)
        return list(zip(_copies(v, len(own), dtype), own.to(dtype).unbind(), strict=True))
    own = torch.einsum("oj,nmij->nmoi" if dense else "or,nmr->nmor", v, mixers).flatten(1, 2)
    kinds = list(dict.fromkeys(readers))
    rights = dict(zip(kinds, _copies(u, len(kinds), dtype), strict=True))
    lefts = own.to(dtype).unbind()
    return [(left, rights[reader]) for left, reader in zip(lefts, readers, strict=True)]


def _copies(shared: Tensor, n: int, dtype: torch.dtype) -> Sequence[Tensor]:
    """A tensor n times, so that its n gradients are added in one operation, in its own dtype."""
    return shared.expand(n, *shared.shape).to(dtype).unbind()
