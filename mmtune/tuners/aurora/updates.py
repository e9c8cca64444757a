"""What adapters add to the weights of layers that compute together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmtune.tuners.aurora.node import computing_dtype, updated_linear, updated_tokens
from mmtune.tuners.aurora.stacks import Stack, joined_bias

if TYPE_CHECKING:
    from mmtune.tuners.aurora.layer import AuroraLinear


@dataclass(frozen=True)
class Update:
    """dW = L R of several layers, whose outputs lie beside one another.

    Attributes:
        members: the layers.
        left: L [o, R], o the members' out_features together.
        right: R [R, in_features].
        places: in the stacks that it was made of, one an adapter.
    """

    members: Sequence[AuroraLinear]
    left: Tensor
    right: Tensor
    places: Sequence[tuple[Stack, int]]

    @classmethod
    def of(cls, members: Sequence[AuroraLinear], places: Sequence[tuple[Stack, int]]) -> Update:
        """Join the updates of several adapters."""
        if len(places) == 1:
            stack, place = places[0]
            return cls(members, *stack.pairs[place], places)
        lefts, rights = zip(*(stack.pairs[place] for stack, place in places), strict=True)
        return cls(members, torch.cat(lefts, 1), torch.cat(rights), places)

    @classmethod
    def now(cls, members: Sequence[AuroraLinear], names: Sequence[str]) -> Update:
        """For these members alone."""
        return cls.of(members, [(members[0].stack(name, [members]), 0) for name in names])

    @property
    def always(self) -> bool:
        """Whether an adapter wants weights formed for few tokens, too."""
        return any(stack.always for stack, _ in self.places)

    def outputs(self, x: Tensor) -> dict[int, Tensor]:
        """[..., in_features] -> [..., out_features] of each member, by its identity."""
        stack, place = self.places[0]
        formed = stack.formed(place) if len(self.places) == 1 else None
        if formed is not None and formed[0].dtype == computing_dtype(x):
            whole, bias = formed
            (y,) = updated_linear(x, self.left, self.right, (), bias, whole)
            if len(self.members) == 1:
                return {id(self.members[0]): y}
            return self._named(y.split([m.out_features for m in self.members], -1))
        weights = [m.linear.weight for m in self.members]
        bias = joined_bias(self.members)
        return self._named(updated_linear(x, self.left, self.right, weights, bias))

    def on_tokens(self, x: Tensor) -> dict[int, Tensor]:
        """The same for few tokens, to which L and R are applied themselves."""
        bases = [m.linear for m in self.members]
        weights, biases = [base.weight for base in bases], [base.bias for base in bases]
        return self._named(updated_tokens(x, self.left, self.right, weights, biases))

    def _named(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        return {id(m): part for m, part in zip(self.members, parts, strict=True)}
