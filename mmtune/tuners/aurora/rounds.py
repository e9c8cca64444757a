"""The factor pairs of all layers, computed together at the start of a forward pass.

Each layer needs L and R with dW = L R, small products of what all layers share and a vector of its
own. Layer by layer they are many small operations, forward and backward, and a fast GPU waits for
their launches; stacked they are a few.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmtune.tuners.aurora.layer import AuroraLinear

Pair = tuple[Tensor, Tensor]


class Rounds:
    """Knows the pairs of the present forward pass of a model.

    They are computed before its first layer, outside of what activation checkpointing computes
    again, and serve that second computation too, which happens in backward. Calls of parts of the
    model, past its own forward, find nothing here and compute their pairs by themselves.

    Attributes:
        layers: the adapted layers.
    """

    def __init__(self) -> None:
        self.layers: list[AuroraLinear] = []
        self._known: dict[tuple[str, int], Pair] = {}
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

    def pair(self, layer: AuroraLinear, name: str) -> Pair:
        """L and R of a layer's adapter."""
        recomputing = torch._C._current_graph_task_id() != -1
        known = self._known.get((name, id(layer))) if self._open or recomputing else None
        return layer.pair(name) if known is None else known

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._known.clear()
        self._open = not torch.compiler.is_compiling()
        if not self._open:
            return
        groups: dict[Hashable, list[AuroraLinear]] = {}
        for layer in self.layers:
            for name in layer.added():
                groups.setdefault((name, *layer.kind(name)), []).append(layer)
        for (name, *_), layers in groups.items():  # type: ignore[misc]
            for layer, pair in zip(layers, layers[0].pairs(name, layers), strict=True):
                self._known[name, id(layer)] = pair

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._open = False
        if not torch.is_grad_enabled():
            self._known.clear()


def pairs_of(
    u: Tensor, v: Tensor, mixers: Tensor, columns: bool, dtype: torch.dtype
) -> Sequence[Pair]:
    """L and R of n weights that are cut alike and share U and V.

    Args:
        u: [R, d_in].
        v: [d_out, R].
        mixers: [n, m, R] or [n, m, R, R], those of each weight's m blocks.
        columns: whether the blocks lie beside one another.
        dtype: of the side that is each weight's own, in which the layer computes.

    Returns:
        L [m d_out, R] and U, or with columns V and R [R, m d_in], of each.
    """
    dense = mixers.dim() == 4
    if columns:
        own = torch.einsum("nmij,iw->njmw" if dense else "nmr,ri->nrmi", mixers, u).flatten(2)
        return [(v, right) for right in own.to(dtype).unbind()]
    own = torch.einsum("oj,nmij->nmoi" if dense else "or,nmr->nmor", v, mixers).flatten(1, 2)
    return [(left, u) for left in own.to(dtype).unbind()]
