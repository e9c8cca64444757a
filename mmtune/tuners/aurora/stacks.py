"""The updates of layers of one kind in few operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmtune.tuners.aurora.layer import AuroraLinear

Pair = tuple[Tensor, Tensor]
Formed = tuple[Tensor, "Tensor | None"]


class Stack:
    """The updates dW = L R of layers that are cut alike and share U and V.

    Attributes:
        pairs: of each unit of layers that compute together: L [o, R], o their out_features
            together, and R [R, in_features].
        parts: of each unit, the parameters that its update is made of.
        always: whether weights are formed for few tokens, too.
    """

    parts: Sequence[Sequence[Tensor]] = ()
    always = False

    def __init__(
        self,
        units: Sequence[Sequence[AuroraLinear]],
        u: Tensor,
        v: Tensor,
        mixers: Tensor,
        columns: bool,
        dtype: torch.dtype,
        whole: bool,
    ) -> None:
        """Compute the pairs.

        Args:
            units: of n layers.
            u: [R, d_in].
            v: [d_out, R].
            mixers: [n, m, R] or [n, m, R, R], those of each weight's m blocks.
            columns: whether the blocks lie beside one another; then a unit has one layer.
            dtype: of the pairs and the formed weights.
            whole: whether the weights are formed at once.
        """
        self._units, self._whole, self._closed = units, whole, False
        self._formed: list[Formed] | None = None
        dense, n = mixers.dim() == 4, len(mixers)
        if columns:
            own = torch.einsum("nmij,iw->njmw" if dense else "nmr,ri->nrmi", mixers, u)
            own = own.flatten(2).to(dtype)
            shared = _copies(v, n, dtype)
            self.pairs: list[Pair] = list(zip(shared.unbind(), own.unbind(), strict=True))
            self._left, self._right = shared.detach(), own.detach()
            return
        own = torch.einsum("oj,nmij->nmoi" if dense else "or,nmr->nmor", v, mixers)
        own = own.flatten(0, 2).to(dtype)
        shared = _copies(u, len(units), dtype)
        lefts = own.split([len(unit) * (own.shape[0] // n) for unit in units])
        self.pairs = list(zip(lefts, shared.unbind(), strict=True))
        self._left = own.detach().unflatten(0, (n, -1))
        self._right = shared[:1].detach().expand(n, -1, -1)

    def formed(self, unit: int) -> Formed | None:
        """W + L R and the bias of a unit, in the pairs' dtype; None where it has to form them."""
        if not self._whole:
            return None
        if self._closed:
            return self._form(unit, unit + 1)[0]
        if self._formed is None:
            self._formed = self._form(0, len(self._units))
        return self._formed[unit]

    def close(self) -> None:
        """Keep no formed weight any longer; who asks yet, recomputing, gets one of its own."""
        self._formed, self._closed = None, True

    def _form(self, first: int, end: int) -> list[Formed]:
        units = self._units[first:end]
        layers = [layer for unit in units for layer in unit]
        start = sum(map(len, self._units[:first]))
        own = slice(start, start + len(layers))
        dtype = self._left.dtype
        with torch.no_grad():
            stacked = torch.stack([layer.linear.weight for layer in layers]).to(dtype)
            wholes = stacked.baddbmm_(self._left[own], self._right[own])
            bias = joined_bias(layers)
            rows = [len(unit) * stacked.shape[1] for unit in units]
            biases = [None] * len(rows) if bias is None else bias.to(dtype).split(rows)
            return list(zip(wholes.flatten(0, 1).split(rows), biases, strict=True))


def joined_bias(layers: Sequence[AuroraLinear]) -> Tensor | None:
    """The biases of layers in one; None where none has any."""
    bases = [layer.linear for layer in layers]
    if all(base.bias is None for base in bases):
        return None
    biases = [base.weight.new_zeros(len(base.weight)) if base.bias is None else base.bias
              for base in bases]  # fmt: skip
    return biases[0] if len(biases) == 1 else torch.cat(biases)


def _copies(shared: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """A tensor n times, so that its n gradients are added in one operation, in its own dtype."""
    return shared.expand(n, *shared.shape).to(dtype)
