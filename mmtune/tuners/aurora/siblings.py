"""The q, k and v of one attention, which read the same tokens one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmtune.tuners.aurora.node import updated_linears

if TYPE_CHECKING:
    from mmtune.tuners.aurora.layer import AuroraLinear

ROLES = ("q", "k", "v")


class Siblings:
    """Computes all of its members when one of them is called, as one node.

    The others find their result waiting if they are called with the very same tensor, and compute
    by themselves if not. A member whose factors are of another shape (keys and values of fewer
    heads) goes with those that are like it.

    Attributes:
        members: in any order.
    """

    def __init__(self) -> None:
        self.members: list[AuroraLinear] = []
        self._tokens: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def updated(self, member: AuroraLinear, names: Sequence[str], x: Tensor) -> Tensor:
        """The output of a member whose adapters `names` are added to its weight."""
        # Replicas of nn.DataParallel share this object and are no members of it.
        if torch.compiler.is_compiling() or not any(m is member for m in self.members):
            return _together([member], names, x)[0]
        if x is self._tokens and id(member) in self._waiting:
            y = self._waiting.pop(id(member))
            if not self._waiting:
                self._tokens = None
            return y
        others = [m for m in self.members if m is not member and m.joins(member, names)]
        group = [member, *others]
        outputs = _together(group, names, x)
        self._waiting = {id(m): y for m, y in zip(group[1:], outputs[1:], strict=True)}
        self._tokens = x if self._waiting else None
        return outputs[0]


def _together(group: Sequence[AuroraLinear], names: Sequence[str], x: Tensor) -> tuple[Tensor, ...]:
    updates = [m.rounds.update(m, names) for m in group]
    bases = [m.linear for m in group]
    return updated_linears(
        x,
        updates[0].right,
        [update.left for update in updates],
        [base.weight for base in bases],
        [base.bias for base in bases],
    )
