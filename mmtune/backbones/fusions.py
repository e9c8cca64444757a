"""Where the tokens of one branch read another branch: the layers with cross-attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Fusion:
    """Cross-attention of one layer, with its neighbours, all [b, t, d] -> [b, t, d].

    In the layer's forward, `begin` (self-attention) gives s; `module` takes s and gives y; `end`
    takes (its inner activation, y) and gives the layer's output. Each includes its residual and its
    norm. Where the layer is given nothing to read, `module` is not called and y = s.

    Attributes:
        branch: one of `BRANCHES`.
        layer: index in the branch.
        path: of `module` inside the unwrapped model.
        module: cross-attention; returns y, or a tuple that begins with it.
        begin: the self-attention before it, called with the keyword attention_mask: None or
            [b, 1, 1 or t, t], float (added) or bool (True takes part).
        end: what ends the layer; runs once, or chunk by chunk along t.
        width: d.
        words: whether the tokens are words that all see one another (no decoder, no learned
            queries).
    """

    branch: str
    layer: int
    path: str
    module: nn.Module = field(repr=False, compare=False)
    begin: nn.Module = field(repr=False, compare=False)
    end: nn.Module = field(repr=False, compare=False)
    width: int
    words: bool
