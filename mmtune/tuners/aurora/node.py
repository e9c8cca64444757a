"""A Linear whose weight gets a low-rank update, as one node of the autograd graph.

y = x (W + L R)^T + b, with W frozen, L [o, r] and R [r, i] small. Autograd, given the sum as a
weight, would form its gradient dy^T x, a product as dear as the layer itself, only to project it on
L and R. Here

    dx = dy (W + L R)      dL = dy^T h,  h = x R^T      dR = (dy L)^T x

so that only skinny products are added. Linears that read the same x and share R (an attention's q,
k and v) are one node, their weights below one another. A weight that the caller has formed waits
for backward; so does one formed here, where it is small beside the tokens' own activations, and
else it is formed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmtune.tuners.aurora.origins import Origin, origin_of

# Tokens for each output feature from which a formed weight is kept: it is then below a hundredth of
# what a Transformer layer keeps of these tokens.
KEEP = 8


def updated_linear(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    formed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Apply Linears with a low-rank update that lie below one another.

    Args:
        x: [..., i].
        left: L [o, r].
        right: R [r, i].
        weights: the parts of W, which lie below one another; together [o, i]. Where one of them or
            the bias wants a gradient, everything is left to autograd.
        bias: [o] or None.
        formed: W + L R [o, i] in the dtype of the result, where it is at hand; then `weights` are
            not looked at.

    Returns:
        [..., o_1], ... in `computing_dtype(x)`, a tensor of its own for each weight; [..., o] where
        the formed weight is given.
    """
    trains = any(w.requires_grad for w in weights) or (bias is not None and bias.requires_grad)
    if trains and formed is None:
        w = _joined(weights)
        y = F.linear(x, w + (left @ right).to(w.dtype), bias)
        return y.split([len(part) for part in weights], -1)
    if not _casts(x):
        return _node(x, left, right, weights, bias, formed)
    dtype = computing_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _node(x.to(dtype), left, right, weights, bias, formed)


def computing_dtype(x: Tensor) -> torch.dtype:
    """Of a product with x: autocast's, where it is on, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if _casts(x) else x.dtype


def _casts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; torch refuses the question for "meta"."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _node(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    formed: Tensor | None,
) -> tuple[Tensor, ...]:
    origin = origin_of(x)
    kept = x if origin is None else origin.source
    weights = weights if formed is None else ()
    y = _UpdatedLinear.apply(origin, formed, x, kept.detach(), left, right, bias, *weights)
    return cast(tuple[Tensor, ...], y)


class _UpdatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        origin: Origin | None,
        formed: Tensor | None,
        x: Tensor,
        kept: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        whole = _formed(weights, left, right, x.dtype) if formed is None else formed
        ctx.compute = None if origin is None else origin.compute
        tokens = x.numel() // x.shape[-1]
        ctx.whole = formed is not None or tokens >= KEEP * len(whole)
        ctx.save_for_backward(kept, left, right, *([whole] if ctx.whole else weights))
        rows = [len(w) for w in weights] or [len(whole)]
        biases = [None] * len(rows) if bias is None else bias.to(x.dtype).split(rows)
        return tuple(
            F.linear(x, part, b) for part, b in zip(whole.split(rows), biases, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        dy = dys[0] if len(dys) == 1 else torch.cat(dys, -1)
        x, left, right, *weights = ctx.saved_tensors
        if ctx.compute is not None:
            x = ctx.compute(x)
        needs_x, needs_left, needs_right = (ctx.needs_input_grad[i] for i in (2, 4, 5))
        tokens, dy = x.flatten(0, -2), dy.flatten(0, -2)
        dx = d_left = d_right = None
        if needs_x:
            whole = weights[0] if ctx.whole else _formed(weights, left, right, x.dtype)
            dx = (dy @ whole).view_as(x)
        if needs_left:
            d_left = (dy.T @ F.linear(tokens, right.to(x.dtype))).to(left.dtype)
        if needs_right:
            d_right = ((dy @ left.to(x.dtype)).T @ tokens).to(right.dtype)
        return (
            None,
            None,
            dx,
            None,
            d_left,
            d_right,
            None,
            *[None] * len(ctx.needs_input_grad[7:]),
        )


def _formed(weights: Sequence[Tensor], left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """W + L R in `dtype`, rounded once where W has that dtype."""
    return torch.addmm(_joined(weights).to(dtype), left.to(dtype), right.to(dtype))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
