"""Where virtual tokens enter a branch, and where they leave it.

Virtual tokens join the hidden states after the position embeddings and are taken out again after
the last layer. So words and patches keep the positions they were trained with, a class token or an
end-of-text token stays at the index at which the model pools, and a caption is never cut to make
room. (A learned position added to a learned vector would be one learned vector.) Hidden states of
inner layers, where a model is asked for them, contain the virtual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtune.constants import constant


@dataclass(frozen=True)
class Trunk:
    """The layers of a branch as one module: hidden states in, hidden states out.

    Attributes:
        branch: one of `BRANCHES`.
        path: dotted path of the module inside the unwrapped model.
        module: the module; its first argument, or the one called `hidden`, is [b, t, d].
        width: d.
        start: index at which tokens "at the start" enter: 1 after a class or begin token, else 0.
        context: tokens the branch was trained to take, or None where there is no such number.
        causal: whether tokens see only those before them.
        hidden: keyword of the hidden states.
        mask: keyword of the attention mask, [.., t, t] or [.., 1, t], float (added) or bool (True
            takes part); None where the branch has no masks.
        mask_position: its index among positional arguments.
        exit: tokens leave from this module's input; None means from the output of `module`.
        embed: ids [n] -> what the trunk would receive for them, [n, d] (their positions included);
            None where the branch has no vocabulary.
    """

    branch: str
    path: str
    module: nn.Module = field(repr=False, compare=False)
    width: int
    start: int = 0
    context: int | None = None
    causal: bool = False
    hidden: str = "inputs_embeds"
    mask: str | None = None
    mask_position: int = 1
    embed: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)
    exit: nn.Module | None = field(default=None, repr=False, compare=False)

    def batch_size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """B of a call."""
        return self._hidden(args, kwargs).shape[0]

    def entering(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether virtual tokens enter in this call (a cached continuation has them already)."""
        return True

    def enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor, at: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with `tokens` [b, p, d] put before the hidden states `at` [p]."""
        x = self._hidden(args, kwargs)
        args, kwargs = self._replaced(args, kwargs, self.hidden, 0, insert(x, tokens.to(x), at))
        mask = self._argument(args, kwargs, self.mask, self.mask_position)
        if mask is not None:
            widened = widen(mask, x.shape[1], at, self.causal)
            args, kwargs = self._replaced(args, kwargs, self.mask, self.mask_position, widened)
        return args, kwargs

    def carry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], at: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a cached continuation, whose cache holds tokens that entered `at`."""
        return args, kwargs

    def leave(self, output: Any, at: Sequence[int]) -> Any:
        """The module's output without the virtual tokens."""
        if isinstance(output, Tensor):
            return remove(output, at)
        if isinstance(output, tuple):
            return (remove(output[0], at), *output[1:])
        output.last_hidden_state = remove(output.last_hidden_state, at)
        return output

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs[self.hidden]

    @staticmethod
    def _argument(
        args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None, position: int
    ) -> Any:
        if name is None:
            return None
        return args[position] if len(args) > position else kwargs.get(name)

    @staticmethod
    def _replaced(
        args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None, position: int, value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > position:
            return (*args[:position], value, *args[position + 1 :]), kwargs
        assert name is not None
        return args, {**kwargs, name: value}


def insert(x: Tensor, tokens: Tensor, at: Sequence[int]) -> Tensor:
    """Put token j before position at[j] of x; positions beyond the end mean the end.

    Shape: x [b, t, d], tokens [b, p, d] -> [b, t + p, d].
    """
    t = x.shape[1]
    if len(set(at)) == 1:
        k = min(at[0], t)
        return torch.cat([x[:, :k], tokens, x[:, k:]], dim=1)
    order = constant(_order(t, at), x.device)
    return torch.cat([x, tokens], dim=1).index_select(1, order)


def remove(x: Tensor, at: Sequence[int]) -> Tensor:
    """Undo `insert`: [b, t + p, d] -> [b, t, d]."""
    p = len(at)
    t = x.shape[1] - p
    if len(set(at)) == 1:
        k = min(at[0], t)
        return torch.cat([x[:, :k], x[:, k + p :]], dim=1)
    real = [new for new, old in enumerate(_order(t, at)) if old < t]
    return x.index_select(1, constant(real, x.device))


def widen(mask: Tensor, t: int, at: Sequence[int], causal: bool) -> Tensor:
    """A mask over t tokens as a mask over t + p, of which p are virtual.

    A virtual token is seen by all (causal: by all that come after it) and sees what its preceding
    token sees (not causal: what any token sees).

    Args:
        mask: [.., t, t], or [.., 1, t]; float (added) or bool (True takes part).
        t: tokens before insertion.
        at: as in `insert`.
        causal: whether the mask is.
    """
    p, order = len(at), _order(t, at)
    visible = mask.dtype == torch.bool
    indices = partial(constant, device=mask.device)
    wide = F.pad(mask, (0, p), value=visible).index_select(-1, indices(order))
    if mask.shape[-2] == 1 and t != 1:
        return wide
    # The row of each real token, for a virtual one of the real token before it; -1: there is none.
    rows = [i if i < t else min(at[i - t], t) - 1 for i in order]
    wide = wide.index_select(-2, indices([max(r, 0) for r in rows]))
    if not causal:
        return wide
    virtual, first = indices([i >= t for i in order]), indices([r < 0 for r in rows])
    place = torch.arange(t + p, device=mask.device)
    later = place[None, :] > place[:, None]
    # Later virtual tokens are hidden, and all real ones from a virtual token ahead of them.
    hidden = False if visible else torch.finfo(mask.dtype).min
    return wide.masked_fill(later & (virtual[None, :] | first[:, None]), hidden)


def _order(t: int, at: Sequence[int]) -> list[int]:
    """New order of t real tokens (0..t-1) and p virtual ones (t..t+p-1)."""
    keys = [(i, 1, i) for i in range(t)]
    keys += [(min(k, t), 0, t + j) for j, k in enumerate(at)]
    return [index for _, _, index in sorted(keys)]


def embedded(embeddings: Any, first: int, ids: Tensor) -> Tensor:
    """Token and position embeddings [n, d] of ids [n] at the positions from `first` on."""
    positions = torch.arange(first, first + len(ids), device=ids.device)
    return embeddings(input_ids=ids[None], position_ids=positions[None])[0]
