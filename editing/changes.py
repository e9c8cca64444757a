"""What an edit does to one parameter: adds to it, adds a product of factors, or replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor


def exact_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which changes of a weight are summed: float32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)


def added(weight: Tensor, delta: Tensor) -> Tensor:
    """`weight` + `delta`, summed exactly enough, in the weight's dtype; differentiable."""
    exact = exact_dtype(weight)
    return (weight.to(exact) + delta.to(exact)).to(weight.dtype)


@dataclass(frozen=True)
class Change:
    """A change of one parameter; its fields are the tensors that a file holds."""

    form: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def shape(self) -> torch.Size:
        """Of the parameter."""
        raise NotImplementedError

    def on(self, weight: Tensor) -> Tensor:
        """A new tensor: the parameter after the change, in its dtype and on its device."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """What is added, of the parameter's shape."""
        raise NotImplementedError

    def then(self, later: Change) -> Change:
        """One change that does this and then `later`, summed before it is rounded."""
        if isinstance(later, Replacement):
            return later
        return Delta(added(self.dense(), later.dense().to(self.dense().device)))


@dataclass(frozen=True)
class Delta(Change):
    """Adds `delta`, of the parameter's shape."""

    form: ClassVar[str] = "delta"
    delta: Tensor

    def shape(self) -> torch.Size:
        return self.delta.shape

    def dense(self) -> Tensor:
        return self.delta

    def on(self, weight: Tensor) -> Tensor:
        return added(weight, self.delta.to(weight.device))


@dataclass(frozen=True)
class LowRank(Change):
    """Adds `left` [out, r] @ `right` [r, in] to a matrix [out, in]."""

    form: ClassVar[str] = "low_rank"
    left: Tensor
    right: Tensor

    def shape(self) -> torch.Size:
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    def dense(self) -> Tensor:
        return self.left @ self.right

    def then(self, later: Change) -> Change:
        """Factors side by side while that is smaller than the parameter."""
        if isinstance(later, LowRank):
            joint = self.left.shape[1] + later.left.shape[1]
            rows, columns = self.shape()
            if joint * (rows + columns) < rows * columns:
                left = torch.cat([self.left, later.left.to(self.left)], dim=1)
                return LowRank(left, torch.cat([self.right, later.right.to(self.right)]))
        return super().then(later)

    def on(self, weight: Tensor) -> Tensor:
        return added(weight, self.left.to(weight.device) @ self.right.to(weight.device))


@dataclass(frozen=True)
class Replacement(Change):
    """Replaces the parameter by `value`, whatever it is."""

    form: ClassVar[str] = "value"
    value: Tensor

    def shape(self) -> torch.Size:
        return self.value.shape

    def then(self, later: Change) -> Change:
        return later if isinstance(later, Replacement) else Replacement(later.on(self.value))

    def on(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device, weight.dtype, copy=True)


FORMS: dict[str, type[Change]] = {c.form: c for c in (Delta, LowRank, Replacement)}


def change_of(form: str, tensors: Mapping[str, Tensor]) -> Change:
    """A change from its form and tensors.

    Raises:
        ValueError: an unknown form, or tensors that are not its own.
    """
    if form not in FORMS:
        raise ValueError(f"no form {form!r} of a change; there are {', '.join(FORMS)}")
    names = {f.name for f in fields(FORMS[form])}
    if set(tensors) != names:
        raise ValueError(f"a change of form {form} holds {sorted(names)}, got {sorted(tensors)}")
    return FORMS[form](**tensors)
