"""Which model an edit was made on, told cheaply: its class and size, and the weights to change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

WHOLE = 1 << 20  # elements up to which a weight is hashed whole
SAMPLED = 1 << 16  # elements hashed of a larger one, evenly spaced


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        shape: of the parameter.
        dtype: float32, bfloat16, ...
        sha256: of its bytes, or of 65536 evenly spaced elements where it has more than 2 ** 20.
    """

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @classmethod
    def of(cls, weight: Tensor) -> Weight:
        """Of a parameter's present values."""
        flat = weight.detach().flatten()
        if flat.numel() > WHOLE:
            flat = flat[:: flat.numel() // SAMPLED][:SAMPLED]
        data = flat.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        dtype = str(weight.dtype).removeprefix("torch.")
        return cls(tuple(weight.shape), dtype, hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Fingerprint:
    """A model, as an edit of some of its parameters knows it.

    Attributes:
        model: class of the stock model.
        parameters: how many numbers it holds.
        weights: the edited parameters by name.
    """

    model: str
    parameters: int
    weights: Mapping[str, Weight]

    @classmethod
    def of(cls, model: nn.Module, weights: Mapping[str, Tensor]) -> Fingerprint:
        """Of a stock model and the unedited values of some parameters."""
        return cls(
            type(model).__name__,
            sum(p.numel() for p in model.parameters()),
            {name: Weight.of(weight) for name, weight in weights.items()},
        )

    @classmethod
    def read(cls, value: Any) -> Fingerprint:
        """From JSON. Raises TypeError, KeyError or ValueError where it is no fingerprint."""
        weights = {
            str(name): Weight(tuple(map(int, w["shape"])), str(w["dtype"]), str(w["sha256"]))
            for name, w in value["weights"].items()
        }
        return cls(str(value["model"]), int(value["parameters"]), weights)

    def json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def differences(self, other: Fingerprint) -> Iterator[str]:
        """What tells `other`, the model at hand, from this one; its weights cover these."""
        if (self.model, self.parameters) != (other.model, other.parameters):
            yield (
                f"it is a {other.model} with {other.parameters} parameters, the edit was made on a "
                f"{self.model} with {self.parameters}"
            )
        yield from named("has another shape", self._unequal(other, "shape"))
        yield from named("has another dtype", self._unequal(other, "dtype"))
        if all(w.dtype == other.weights[n].dtype for n, w in self.weights.items()):
            yield from named("has other values", self._unequal(other, "sha256"))

    def _unequal(self, other: Fingerprint, what: str) -> list[str]:
        return [
            f"{name} ({getattr(other.weights[name], what)!s:.20}, was {getattr(own, what)!s:.20})"
            for name, own in self.weights.items()
            if getattr(other.weights[name], what) != getattr(own, what)
        ]


def named(what: str, names: Iterable[str]) -> Iterator[str]:
    """One sentence for all: "a, b, c and 4 more: ..."; none for none."""
    every = list(names)
    if every:
        more = f" and {len(every) - 3} more" if len(every) > 3 else ""
        yield f"{', '.join(every[:3])}{more} {what}"
