"""Linears whose weights get a low-rank update, as one node of the autograd graph.

y_i = x (W_i + L_i R)^T + b_i, with W_i frozen, L_i [o_i, r] and R [r, i] small. Autograd, given the
sum as a weight, would form its gradient dy^T x, a product as dear as the layer itself, only to
project it on L and R. Here the weight is formed on the fly, and

    dx = sum_i dy_i (W_i + L_i R)      dL_i = dy_i^T h,  h = x R^T      dR = (sum_i dy_i L_i)^T x

so that only skinny products are added. Linears that read the same x and share R (an attention's q,
k and v) are one node: h and dR are computed once, and dx is summed as it is computed. The formed
weight waits for backward where it is small beside the tokens' own activations; else it is formed
again.
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


def updated_linears(
    x: Tensor,
    right: Tensor,
    lefts: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Apply n Linears with low-rank updates to the same tokens.

    Args:
        x: [..., i].
        right: R [r, i]; n Linears share it.
        lefts: L [o, r] of each.
        weights: W [o, i] of each. Where one of them or of the biases wants a gradient, everything
            is left to autograd.
        biases: [o] of each, or None.

    Returns:
        [..., o] of each, in the dtype of x; under autocast in autocast's.
    """
    if any(p is not None and p.requires_grad for p in (*weights, *biases)):
        return tuple(
            F.linear(x, w + (left @ right).to(w.dtype), b)
            for w, left, b in zip(weights, lefts, biases, strict=True)
        )
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return _node(x, right, lefts, weights, biases)
    return _node(x, right, lefts, weights, biases)


def _node(x: Tensor, right: Tensor, *rest: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    lefts, weights, biases = rest
    origin = origin_of(x)
    kept = x if origin is None else origin.source
    outputs = _UpdatedLinears.apply(
        len(lefts), origin, x, kept.detach(), right, *lefts, *weights, *biases
    )
    return cast(tuple[Tensor, ...], outputs)


class _UpdatedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        n: int,
        origin: Origin | None,
        x: Tensor,
        kept: Tensor,
        right: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        lefts, weights, biases = rest[:n], rest[n : 2 * n], rest[2 * n :]
        formed = [_updated(w, left, right, x.dtype) for w, left in zip(weights, lefts, strict=True)]
        ctx.n, ctx.compute = n, None if origin is None else origin.compute
        ctx.formed = x.numel() // x.shape[-1] >= KEEP * max(len(w) for w in weights)
        ctx.save_for_backward(kept, right, *lefts, *(formed if ctx.formed else weights))
        return tuple(
            F.linear(x, w, None if b is None else b.to(x.dtype))
            for w, b in zip(formed, biases, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        n = ctx.n
        x, right, *rest = ctx.saved_tensors
        if ctx.compute is not None:
            x = ctx.compute(x)
        lefts, weights = rest[:n], rest[n:]
        needs_x, needs_right = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        needs_left = ctx.needs_input_grad[5 : 5 + n]
        tokens = x.flatten(0, -2)
        r = right.to(x.dtype)
        h = F.linear(tokens, r) if any(needs_left) else None
        dx, g = None, None
        d_lefts: list[Tensor | None] = []
        for dy, left, w, needed in zip(dys, lefts, weights, needs_left, strict=True):
            dy = dy.flatten(0, -2)
            if needs_x:
                whole = w if ctx.formed else _updated(w, left, right, x.dtype)
                dx = _plus_product(dx, dy, whole)
            if needs_right:
                g = _plus_product(g, dy, left.to(x.dtype))
            d_lefts.append((dy.T @ h).to(left.dtype) if needed and h is not None else None)
        d_right = (g.T @ tokens).to(right.dtype) if g is not None else None
        d_x = dx.view_as(x) if dx is not None else None
        return (None, None, d_x, None, d_right, *d_lefts, *[None] * (2 * n))


def _updated(weight: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """W + L R in `dtype`, rounded once where W has that dtype."""
    return torch.addmm(weight.to(dtype), left.to(dtype), right.to(dtype))


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if total is None else total.addmm_(a, b)
