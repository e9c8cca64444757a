"""Cached edits: what each says, and the features of what it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from editing.features import Features

SAME = 1e-2  # relative difference of two images' features up to which the image is the same
PARTS = ("words", "image", "seen")


class Asked(Protocol):
    """Anything that is asked about by a question."""

    @property
    def question(self) -> str: ...


F = TypeVar("F", bound=Asked)


@dataclass(frozen=True)
class Memory(Generic[F]):
    """Edits in the order in which they were made, one for each question about an image.

    Attributes:
        facts: n of them.
        features: of their questions and images, on the CPU.
    """

    facts: tuple[F, ...]
    features: Features

    @classmethod
    def of(cls, facts: Sequence[F], features: Features) -> Memory[F]:
        """Of edits of which a later one replaces an earlier one that asks the same."""
        every = cls(tuple(facts), on(features, torch.device("cpu")))
        numbers = range(len(facts))
        return every.rows([i for i in numbers if not every.repeated(i, every, numbers[i + 1 :])])

    def rows(self, rows: Sequence[int]) -> Memory[F]:
        """Some of them."""
        at, f = torch.tensor(rows, dtype=torch.long), self.features
        features = Features(f.words[at], f.image[at], f.seen[at])
        return Memory(tuple(self.facts[i] for i in rows), features)

    def then(self, later: Memory[F]) -> Memory[F]:
        """Both; of two edits that ask the same the later one holds."""
        new = range(len(later.facts))
        rows = [i for i in range(len(self.facts)) if not self.repeated(i, later, new)]
        kept = self.rows(rows)
        parts = (torch.cat([getattr(kept.features, n), getattr(later.features, n)]) for n in PARTS)
        return Memory(kept.facts + later.facts, Features(*parts))

    def repeated(self, number: int, other: Memory[F], among: Sequence[int]) -> bool:
        """Whether one of these edits of `other` asks what edit `number` asks."""
        question, f, g = self.facts[number].question, self.features, other.features
        alike = [
            i
            for i in among
            if other.facts[i].question == question and bool(g.seen[i] == f.seen[number])
        ]
        if not alike:
            return False
        apart = torch.linalg.vector_norm(g.image[alike] - f.image[number], dim=-1)
        return bool((apart <= SAME * torch.linalg.vector_norm(f.image[number])).any())

    def tensors(self) -> dict[str, Tensor]:
        """The features by name, for a file."""
        return {f"memory/{name}": getattr(self.features, name) for name in PARTS}

    @classmethod
    def restored(cls, facts: Sequence[F], tensors: Mapping[str, Tensor]) -> Memory[F]:
        """From facts and `tensors`. Raises KeyError, ValueError: they are not of these facts."""
        features = Features(*(tensors[f"memory/{name}"] for name in PARTS))
        lengths = {len(getattr(features, name)) for name in PARTS}
        if lengths != {len(facts)}:
            raise ValueError(f"{len(facts)} facts have features of {sorted(lengths)}")
        return cls(tuple(facts), features)


def on(features: Features, device: torch.device) -> Features:
    """The same on a device."""
    return Features(*(getattr(features, name).to(device) for name in PARTS))
