"""What calls of modules gave, kept so that it can be given again, and what it depends on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Call:
    """What a call of a module gave, and what it put into the cache.

    Attributes:
        form: the output, with a `_Leaf` where a tensor is.
        tensors: those tensors; or weak references, as long as it is not known who needs them.
        versions: how often each had been written to.
        updates: arguments of the cache's `update`.
    """

    form: Any = None
    tensors: list[Any] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    updates: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def keep(self, output: Any) -> None:
        """Take an output. Raises NotKeptError: it cannot be given again."""

        def leaf(tensor: Tensor) -> _Leaf:
            if tensor.requires_grad or tensor.is_inference():
                raise NotKeptError
            self.tensors.append(tensor)
            self.versions.append(tensor._version)
            return _Leaf(len(self.tensors) - 1)

        self.form = mapped(output, Tensor, leaf)

    def again(self) -> Any:
        """The output; its containers are new each time, since callers write into them."""
        return mapped(self.form, _Leaf, lambda leaf: self.tensors[leaf.number])

    def weaken(self) -> None:
        """Hold the tensors only as long as somebody else does."""
        self.tensors = [(weakref.ref(tensor), _blank(tensor)) for tensor in self.tensors]

    def settle(self) -> None:
        """Hold again those that somebody does; others become blanks, which nobody looks at."""
        for i, (reference, blank) in enumerate(self.tensors):
            alive = reference()
            self.tensors[i] = blank if alive is None else alive
            self.versions[i] = blank._version if alive is None else self.versions[i]

    def untouched(self) -> bool:
        """Whether nobody has written into the tensors since."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return all(tensor._version == version for tensor, version in pairs)


@dataclass(frozen=True)
class _Leaf:
    number: int


class NotKeptError(Exception):
    """An output that cannot be given again: it needs gradients, or holds more than tensors."""


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A structure with each leaf of a kind changed. Raises NotKeptError: it holds other things."""
    if isinstance(value, kind):
        return change(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):  # an output of transformers, too
        return type(value)(**{key: mapped(part, kind, change) for key, part in value.items()})
    if type(value) in (tuple, list):
        return type(value)(mapped(part, kind, change) for part in value)
    raise NotKeptError


def _blank(tensor: Tensor) -> Tensor:
    """NaN (0 where there is none) of the same shape, in next to no memory."""
    value = float("nan") if tensor.is_floating_point() else 0
    return tensor.new_full((), value).expand(tensor.shape)
