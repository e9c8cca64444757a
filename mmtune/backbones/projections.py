"""Fused attention shown as q, k, v, out Linears, and put back.

Adapters act on Linears. A fused `in_proj_weight` hides three of them, and adapting it by merging
into the base in every forward pass makes a bf16 base drift. Here the fused module is replaced by
one with real `nn.Linear` q, k, v, out that computes the same, and `restore` rebuilds the stock
module.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mmtune.backbones.attention import attend


class ProjectionError(ValueError):
    """An attention module whose computation cannot be shown as q, k, v, out Linears."""


class SplitLinear(nn.Module):
    """A fused Linear d -> 3 d' shown as three Linears q, k, v; its output is their concatenation.

    Shape: [..., d] -> [..., 3 d'], as the fused Linear.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        self.q, self.k, self.v = _split_rows(fused.weight, fused.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def restored(self) -> nn.Linear:
        """The fused Linear with the present weights."""
        weight, bias = _join_rows(self.q, self.k, self.v)
        return _linear(weight, bias)


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` with visible projections, through scaled_dot_product_attention.

    Shape:
        query [b, t, d], key and value [b, s, d'] (first two axes swapped unless batch_first);
        returns ([b, t, d], None). Attention weights are not available.
    """

    extensible = True

    def __init__(self, stock: nn.MultiheadAttention) -> None:
        super().__init__()
        if stock.bias_k is not None or stock.add_zero_attn:
            raise ProjectionError(
                "attention with add_bias_kv or add_zero_attn has keys that no Linear makes; "
                "such a layer cannot be adapted at q, k, v"
            )
        self.num_heads = stock.num_heads
        self.dropout = stock.dropout
        self.batch_first = stock.batch_first
        self.q, self.k, self.v = _split_stock(stock)
        self.out = stock.out_proj
        self.train(stock.training)
        # The emptied stock module is kept outside the module tree: it knows its class and options.
        object.__setattr__(self, "_stock", stock)
        _empty(stock)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention.forward` with need_weights=False.

        Args:
            query: [b, t, d].
            key: [b, s, d'].
            value: [b, s, d'].
            key_padding_mask: [b, s]; True (bool) or -inf (float, added) hides a key.
            need_weights: must be False.
            attn_mask: [t, s] or [b h, t, s]; True (bool) hides a key, a float is added to the
            scores.
            average_attn_weights: without meaning here.
            is_causal: a hint that attn_mask is causal; needs attn_mask, which is what is applied.

        Raises:
            ProjectionError: need_weights, unbatched input, or is_causal without attn_mask.
        """
        if need_weights:
            raise ProjectionError(
                "this attention computes no weights; call it with need_weights=False, "
                "or restore the stock module with Backbone.restore()"
            )
        if query.dim() != 3:
            raise ProjectionError(
                f"expected query [b, t, d], got {list(query.shape)}: add a batch axis"
            )
        if is_causal and attn_mask is None:
            raise ProjectionError("is_causal needs attn_mask, as in nn.MultiheadAttention")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            _heads(proj(x), self.num_heads)
            for proj, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        mask = _additive_mask(attn_mask, key_padding_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        y = attend(self, q, k, v, mask, dropout=dropout)
        y = self.out(y.transpose(1, 2).flatten(2))
        return (y if self.batch_first else y.transpose(0, 1)), None

    def restored(self) -> nn.MultiheadAttention:
        """The stock module with the present weights."""
        stock = cast(nn.MultiheadAttention, self._stock)
        _refill(stock, self.q, self.k, self.v)
        stock.out_proj = cast(nn.modules.linear.NonDynamicallyQuantizableLinear, self.out)
        return stock.train(self.training)


class SplitFusedAttention(nn.Module):
    """open_clip's own `Attention` (bare in_proj_weight) with visible projections.

    Shape: x [b, t, d], attn_mask [t, t], [b, h, t, t] or [b h, t, t] -> [b, t, d].
    """

    extensible = True

    def __init__(self, stock: Any) -> None:
        super().__init__()
        if (
            getattr(stock, "scaled_cosine", False)
            or getattr(stock, "logit_scale", None) is not None
        ):
            raise ProjectionError(
                "scaled cosine attention has a learned scale that scaled_dot_product_attention "
                "does not take; such a layer cannot be adapted at q, k, v"
            )
        self.num_heads: int = stock.num_heads
        self.q, self.k, self.v = _split_rows(stock.in_proj_weight, stock.in_proj_bias)
        self.out = stock.out_proj
        self.ln_q: nn.Module = getattr(stock, "ln_q", nn.Identity())
        self.ln_k: nn.Module = getattr(stock, "ln_k", nn.Identity())
        self.ln_inner: nn.Module = getattr(stock, "ln_inner", nn.Identity())
        self.attn_drop: nn.Dropout = stock.attn_drop
        self.out_drop: nn.Dropout = stock.out_drop
        self.head_scale = getattr(stock, "head_scale", None)
        self.train(stock.training)
        object.__setattr__(self, "_stock", stock)
        _empty(stock)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = (_heads(proj(x), self.num_heads) for proj in (self.q, self.k, self.v))
        q, k = self.ln_q(q), self.ln_k(k)
        if attn_mask is not None and attn_mask.dim() == 4:
            attn_mask = attn_mask.flatten(0, 1)
        mask = _additive_mask(attn_mask, None, q, k.shape[2])
        dropout = self.attn_drop.p if self.training else 0.0
        y = attend(self, q, k, v, mask, dropout=dropout)
        if self.head_scale is not None:
            y = y * self.head_scale
        return self.out_drop(self.out(self.ln_inner(y.transpose(1, 2).flatten(2))))

    def restored(self) -> nn.Module:
        """The stock module with the present weights."""
        stock = cast(nn.Module, self._stock)
        _refill(stock, self.q, self.k, self.v)
        stock.out_proj = self.out
        return stock.train(self.training)


class SplitTimmAttention(nn.Module):
    """timm's `Attention` (fused qkv Linear) with visible projections.

    Shape: x [b, t, d] -> [b, t, d].
    """

    extensible = True

    def __init__(self, stock: Any) -> None:
        super().__init__()
        if getattr(stock, "gate", None) is not None:
            raise ProjectionError(
                "gated attention multiplies its output by a gate of its own; such a layer cannot "
                "be adapted at q, k, v"
            )
        self.num_heads: int = stock.num_heads
        self.q, self.k, self.v = _split_rows(stock.qkv.weight, stock.qkv.bias)
        self.out = stock.proj
        self.q_norm: nn.Module = stock.q_norm
        self.k_norm: nn.Module = stock.k_norm
        self.norm: nn.Module = stock.norm
        self.attn_drop: nn.Dropout = stock.attn_drop
        self.proj_drop: nn.Module = stock.proj_drop
        self.train(stock.training)
        object.__setattr__(self, "_stock", stock)
        stock.qkv = stock.qkv.to("meta")

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        q, k, v = (_heads(proj(x), self.num_heads) for proj in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        y = attend(self, q, k, v, attn_mask, is_causal, dropout)
        return self.proj_drop(self.out(self.norm(y.transpose(1, 2).flatten(2))))

    def restored(self) -> nn.Module:
        """The stock module with the present weights."""
        stock = cast(Any, self._stock)
        stock.qkv = _linear(*_join_rows(self.q, self.k, self.v), stock.qkv.weight.requires_grad)
        stock.proj = self.out
        return stock.train(self.training)


Split = SplitLinear | SplitAttention | SplitFusedAttention | SplitTimmAttention


def split(parent: nn.Module, name: str) -> Split:
    """Replace `parent.name`, a fused attention or fused qkv Linear, by its split form.

    Returns:
        The split module, which is the present one where it was split before.

    Raises:
        ProjectionError: the module is not fused, or computes what q, k, v, out cannot show.
    """
    module = getattr(parent, name)
    if isinstance(module, Split):
        return module
    if isinstance(module, nn.MultiheadAttention):
        shown: Split = SplitAttention(module)
    elif isinstance(module, nn.Linear):
        shown = SplitLinear(module)
    elif all(hasattr(module, a) for a in ("qkv", "q_norm", "norm", "proj", "fused_attn")):
        shown = SplitTimmAttention(module)
    elif all(hasattr(module, a) for a in ("in_proj_weight", "num_heads", "out_proj", "attn_drop")):
        shown = SplitFusedAttention(module)
    else:
        raise ProjectionError(
            f"{type(module).__name__} is no attention this toolkit can show as q, k, v, out: "
            "expected nn.MultiheadAttention, timm's Attention, a module with in_proj_weight, or a "
            "fused qkv Linear"
        )
    setattr(parent, name, shown)
    return shown


def restore(model: nn.Module) -> int:
    """Put every stock module back where `split` replaced it; returns how many."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Split)
    ]
    for parent, name, child in found:
        setattr(parent, name, child.restored())
    return len(found)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[b, t, d] -> [b, h, t, d / h]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _additive_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int
) -> Tensor | None:
    """Both masks as one float mask that broadcasts to [b, h, t, s], in q's dtype."""
    total: Tensor | None = None
    if attn_mask is not None:
        total = _as_float(attn_mask, q.dtype)
        if total.dim() == 3:
            total = total.unflatten(0, (q.shape[0], -1))
    if key_padding_mask is not None:
        padding = _as_float(key_padding_mask, q.dtype).view(q.shape[0], 1, 1, keys)
        total = padding if total is None else total + padding
    return total


def _as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)


def _linear(weight: Tensor, bias: Tensor | None, requires_grad: bool = False) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=requires_grad)
    return linear


def _split_rows(weight: Tensor, bias: Tensor | None) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Fused [3 d, d'] weight -> q, k, v Linears that own their memory."""
    weights = [w.clone() for w in weight.detach().chunk(3)]
    biases = [None] * 3 if bias is None else [b.clone() for b in bias.detach().chunk(3)]
    grad = weight.requires_grad
    q, k, v = (_linear(w, b, grad) for w, b in zip(weights, biases, strict=True))
    return q, k, v


def _join_rows(q: nn.Module, k: nn.Module, v: nn.Module) -> tuple[Tensor, Tensor | None]:
    parts = [_plain(m) for m in (q, k, v)]
    weight = torch.cat([p.weight.detach() for p in parts])
    biases = [p.bias.detach() for p in parts if p.bias is not None]
    return weight, torch.cat(biases) if len(biases) == 3 else None


def _plain(module: nn.Module) -> nn.Linear:
    if hasattr(module, "base_layer"):
        raise ProjectionError(
            "an adapter still wraps this projection: merge_and_unload() or unload() before restore"
        )
    if not cast(nn.Linear, module).weight.is_floating_point():
        raise ProjectionError(
            "this projection is quantised, which the stock layout cannot hold: load the model "
            "again, without quantising it"
        )
    return cast(nn.Linear, module)


def _split_stock(stock: nn.MultiheadAttention) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    bias = stock.in_proj_bias
    if stock.in_proj_weight is not None:
        return _split_rows(stock.in_proj_weight, bias)
    biases = [None] * 3 if bias is None else [b.clone() for b in bias.detach().chunk(3)]
    separate = (stock.q_proj_weight, stock.k_proj_weight, stock.v_proj_weight)
    q, k, v = (
        _linear(w.detach().clone(), b, w.requires_grad)
        for w, b in zip(separate, biases, strict=True)
    )
    return q, k, v


_FUSED_NAMES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


def _empty(stock: nn.Module) -> None:
    """Drop the fused weights' memory; their places stay, on the meta device."""
    for name in _FUSED_NAMES:
        old = getattr(stock, name, None)
        if old is not None:
            meta = torch.empty_like(old, device="meta")
            setattr(stock, name, nn.Parameter(meta, requires_grad=old.requires_grad))


def _refill(stock: nn.Module, q: nn.Module, k: nn.Module, v: nn.Module) -> None:
    def fill(name: str, value: Tensor) -> None:
        grad = getattr(stock, name).requires_grad
        setattr(stock, name, nn.Parameter(value, requires_grad=grad))

    parts = [_plain(m) for m in (q, k, v)]
    if getattr(stock, "in_proj_weight", None) is not None:
        fill("in_proj_weight", torch.cat([p.weight.detach() for p in parts]))
    else:
        for letter, part in zip("qkv", parts, strict=True):
            fill(f"{letter}_proj_weight", part.weight.detach())
    if getattr(stock, "in_proj_bias", None) is not None:
        fill("in_proj_bias", torch.cat([p.bias.detach() for p in parts]))
