"""The projections of one attention that read the same tokens one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmtune.tuners.aurora.updates import Update

if TYPE_CHECKING:
    from mmtune.tuners.aurora.layer import AuroraLinear

# Roles of projections that read the same tokens; what cross_q reads is another branch.
TOGETHER = (("q", "k", "v"), ("cross_k", "cross_v"))


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

    def __getstate__(self) -> dict[str, Any]:
        """Nothing waits for the members of a copy."""
        return {**vars(self), "_tokens": None, "_waiting": {}}

    def group(self, member: AuroraLinear, names: Sequence[str]) -> list[AuroraLinear]:
        """The members that compute together with one whose adapters `names` are added."""
        # Replicas of nn.DataParallel share this object and are no members of it.
        if member.others() or not any(m is member for m in self.members):
            return [member]
        return [m for m in self.members if m is member or m.joins(member, names)]

    def take(self, member: AuroraLinear, x: Tensor) -> Tensor | None:
        """The output of a member, if it waits because a sibling was called with this tensor."""
        if x is not self._tokens or id(member) not in self._waiting:
            return None
        y = self._waiting.pop(id(member))
        if not self._waiting:
            self._tokens = None
        return y

    def output(
        self,
        member: AuroraLinear,
        x: Tensor,
        names: Sequence[str],
        update: Update | None,
        few: bool,
    ) -> Tensor:
        """The output of a member.

        Args:
            member: whose.
            x: [..., in_features].
            names: the adapters that are added to it.
            update: of its group, where it is known.
            few: whether the update is applied to the tokens, without forming a weight.
        """
        y = self.take(member, x)
        if y is not None:
            return y
        update = update or Update.now(self.group(member, names), names)
        waiting = update.on_tokens(x) if few and not update.always else update.outputs(x)
        y = waiting.pop(id(member))
        self._tokens, self._waiting = (x, waiting) if waiting else (None, {})
        return y

    def forget(self) -> None:
        """Let nothing wait any longer."""
        self._tokens, self._waiting = None, {}
