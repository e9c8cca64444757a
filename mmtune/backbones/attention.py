"""Keys and values that a method puts before those of an attention module.

An attention module that a backbone lists may carry an extension in its attribute `kv_extension`.
The attribute is unregistered: who sets it owns the parameters. transformers' modules read it
through an attention implementation of their own name, which delegates to their "sdpa".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# keys [b, h, s, e] of the call -> keys and values [b, h, p, e] to put before them, or None.
Extension = Callable[[Tensor], tuple[Tensor, Tensor] | None]
EXTENSION = "kv_extension"
IMPLEMENTATION = "mmtune"


def extend(module: nn.Module, extension: Extension | None) -> None:
    """Install an extension on an attention module, or remove it.

    Args:
        module: one of this toolkit's split attention modules (`extensible`), or a transformers
            attention module that looks its implementation up by name.
        extension: what to put before its keys and values; None removes it.

    Raises:
        ValueError: the module computes attention in a way that cannot be extended.
    """
    if not getattr(module, "extensible", False):
        _use_own_implementation(module)
    # Past nn.Module.__setattr__: an extension that holds modules must not be registered here.
    object.__setattr__(module, EXTENSION, extension)


def _use_own_implementation(module: nn.Module) -> None:
    """Let a transformers attention module compute through the implementation that extends.

    The choice lies in the config that the module shares with its tower; without an extension the
    implementation is transformers' "sdpa" itself.
    """
    config: Any = getattr(module, "config", None)
    source = sys.modules.get(type(module).__module__)
    if config is None or not hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"{type(module).__name__} takes no virtual keys and values: it is neither a split "
            "attention (call Backbone.prepare() first) nor a transformers attention with "
            "exchangeable implementation"
        )
    current = config._attn_implementation
    if current == IMPLEMENTATION:
        return
    if current not in (None, "sdpa"):
        raise ValueError(
            f"virtual keys and values need attn_implementation='sdpa'; this model was loaded with "
            f"{current!r}. Load it again with attn_implementation='sdpa'."
        )
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _extended_sdpa)
    AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation = IMPLEMENTATION


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """scaled_dot_product_attention over the module's extension and the given keys and values.

    Args:
        module: the attention module, which may carry an extension.
        q: [b, h, t, e].
        k: [b, h, s, e].
        v: [b, h, s, e].
        mask: broadcasts to [b, h, t, s]; float (added) or bool (True takes part).
        causal: hide later keys where there is no mask.
        dropout: probability on the attention weights.
        scale: factor on the scores; None means 1 / sqrt(e).

    Returns:
        [b, h, t, e].
    """
    k, v, mask, causal = extended(module, q, k, v, mask, causal)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
    )


def extended(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Keys, values, mask and causal flag of a call with the module's extension, if it has one."""
    extension: Extension | None = getattr(module, EXTENSION, None)
    extra = None if extension is None else extension(k)
    if extra is None:
        return k, v, mask, causal
    p, t, s = extra[0].shape[2], q.shape[2], k.shape[2]
    if mask is not None:
        mask = F.pad(mask, (p, 0), value=mask.dtype == torch.bool)
    elif causal:
        # Aligned at the upper left, as is_causal of scaled_dot_product_attention is.
        mask = torch.ones(t, p + s, dtype=torch.bool, device=q.device).tril(p)
    k = torch.cat([extra[0].to(k.dtype), k], dim=2)
    v = torch.cat([extra[1].to(v.dtype), v], dim=2)
    return k, v, mask, False


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a transformers module, or None.

    Earlier versions of transformers 5 call it past_key_values.
    """
    return kwargs.get("cache", kwargs.get("past_key_values"))


def _extended_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The "sdpa" of transformers, with the extension before its keys and values."""
    from transformers import AttentionInterface

    sdpa = AttentionInterface()["sdpa"]
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    if getattr(module, EXTENSION, None) is None:
        return sdpa(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    # As in "sdpa": one query, the newest, sees all that the cache holds.
    causal = causal and attention_mask is None and query.shape[2] > 1
    before = key.shape[2]
    key, value, attention_mask, still = extended(module, query, key, value, attention_mask, causal)
    if position_bias is not None and key.shape[2] > before:
        kwargs["position_bias"] = F.pad(position_bias, (key.shape[2] - before, 0))
    if key.shape[2] == before:
        still = is_causal
    return sdpa(module, query, key, value, attention_mask, is_causal=still, **kwargs)
