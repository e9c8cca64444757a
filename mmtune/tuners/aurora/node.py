"""A Linear whose weight gets a low-rank update, as one node of the autograd graph.

y = x (W + L R)^T + b, with W frozen, L [o, r] and R [r, i] small. Autograd, given the sum as a
weight, would form its gradient dy^T x, a product as dear as the layer itself, only to project it on
L and R. Here

    dx = dy (W + L R)      dL = dy^T h,  h = x R^T      dR = (dy L)^T x

so that only skinny products are added. Linears that read the same x and share R (an attention's q,
k and v) are one node, their weights below one another. A weight that the caller has formed waits
for backward; so does one formed here, where it is small beside the tokens' own activations, and
else it is formed again. Few tokens are multiplied by W, R and L one after the other instead.
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
    if formed is None and _train([*weights, bias]):
        w = _joined(weights)
        y = F.linear(x, w + (left @ right).to(w.dtype), bias)
        return y.split([len(part) for part in weights], -1)
    given = () if formed is not None else weights
    return _node(_UpdatedLinear, x, left, right, formed, bias, *given)


def updated_tokens(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The same for few tokens, without forming a weight: y = x W^T + (x R^T) L^T + b.

    Args:
        x: [..., i].
        left: L [o, r].
        right: R [r, i].
        weights: the parts of W, as above.
        biases: of each part.

    Returns:
        [..., o_1], ... in `computing_dtype(x)`.
    """
    if _train([*weights, *biases]):
        h = F.linear(x, right.to(x.dtype))
        parts = zip(weights, biases, left.split([len(w) for w in weights]), strict=True)
        return tuple(F.linear(x, w, b) + F.linear(h, part.to(h.dtype)) for w, b, part in parts)
    return _node(_UpdatedTokens, x, left, right, *weights, *biases)


def computing_dtype(x: Tensor) -> torch.dtype:
    """Of a product with x: autocast's, where it is on, else that of x."""
    return torch.get_autocast_dtype(x.device.type) if _casts(x) else x.dtype


def _casts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; torch refuses the question for "meta"."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _train(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _node(
    function: type[torch.autograd.Function], x: Tensor, left: Tensor, right: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    if not _casts(x):
        left, right = left.to(x.dtype), right.to(x.dtype)
        return cast(tuple[Tensor, ...], function.apply(origin_of(x), x, left, right, *rest))
    with torch.autocast(x.device.type, enabled=False):
        return _node(function, x.to(torch.get_autocast_dtype(x.device.type)), left, right, *rest)


# Both forwards have *args alone: where nothing wants a gradient, torch.compile (2.14) takes ctx
# away if there are just as many other arguments as parameters.


class _UpdatedLinear(torch.autograd.Function):
    """Of an origin, x, L, R, the formed weight, the bias, the weights; x, L, R have one dtype."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        origin, x, left, right, formed, bias, *weights = args
        whole = _formed(weights, left, right) if formed is None else formed
        ctx.whole = formed is not None or x.numel() >= KEEP * whole.numel()
        _keep(ctx, origin, x, left, right, *([whole] if ctx.whole else weights))
        bias = None if bias is None else bias.to(x.dtype)
        if len(weights) < 2:
            return (F.linear(x, whole, bias),)
        rows = [w.shape[0] for w in weights]
        biases = [None] * len(rows) if bias is None else bias.split(rows)
        return tuple(
            F.linear(x, part, b) for part, b in zip(whole.split(rows), biases, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        dy = _flat(dys[0] if len(dys) == 1 else torch.cat(dys, -1))
        x, left, right, *weights = _kept(ctx)
        _, needs_x, needs_left, needs_right, *others = ctx.needs_input_grad
        tokens = _flat(x)
        dx = d_left = d_right = None
        if needs_x:
            whole = weights[0] if ctx.whole else _formed(weights, left, right)
            dx = dy.mm(whole).view(x.shape)
        if needs_left:
            d_left = dy.t().mm(tokens.mm(right.t()))
        if needs_right:
            d_right = dy.mm(left).t().mm(tokens)
        return (None, dx, d_left, d_right, *[None] * len(others))


class _UpdatedTokens(torch.autograd.Function):
    """Of an origin, x, L, R, weights, as many biases; x, L, R have one dtype."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        origin, x, left, right, *bases = args
        weights, biases = bases[: len(bases) // 2], bases[len(bases) // 2 :]
        tokens, shape = _flat(x), (*x.shape[:-1], -1)
        h = tokens.mm(right.t())
        _keep(ctx, origin, x, left, right, h, *weights)
        ys = []
        parts = left.split([w.shape[0] for w in weights])
        for part, w, b in zip(parts, weights, biases, strict=True):
            y = F.linear(tokens, w.to(x.dtype), None if b is None else b.to(x.dtype))
            ys.append(y.addmm_(h, part.t()).view(shape))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        dy = _flat(dys[0] if len(dys) == 1 else torch.cat(dys, -1))
        x, left, right, h, *weights = _kept(ctx)
        _, needs_x, needs_left, needs_right, *others = ctx.needs_input_grad
        dh = dy.mm(left)
        dx = d_left = d_right = None
        if needs_x:
            dx = dh.mm(right)
            for part, w in zip(dy.split([w.shape[0] for w in weights], -1), weights, strict=True):
                dx.addmm_(part, w.to(x.dtype))
            dx = dx.view(x.shape)
        if needs_left:
            d_left = dy.t().mm(h)
        if needs_right:
            d_right = dh.t().mm(_flat(x))
        return (None, dx, d_left, d_right, *[None] * len(others))


def _keep(ctx: Any, origin: Origin | None, x: Tensor, *rest: Tensor) -> None:
    """Save for backward x, or in its stead where it comes from, and the rest."""
    ctx.compute = None if origin is None else origin.compute
    ctx.save_for_backward(x if origin is None else origin.source, *rest)


def _kept(ctx: Any) -> tuple[Tensor, ...]:
    """What was saved, x computed again."""
    x, *rest = ctx.saved_tensors
    return (x if ctx.compute is None else ctx.compute(x), *rest)


def _flat(x: Tensor) -> Tensor:
    """[..., i] -> [t, i]."""
    return x.reshape(-1, x.shape[-1])


def _formed(weights: Sequence[Tensor], left: Tensor, right: Tensor) -> Tensor:
    """W + L R in the dtype of L and R, rounded once where W has it, too."""
    return torch.addmm(_joined(weights).to(left.dtype), left, right)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
