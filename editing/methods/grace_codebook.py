"""GRACE's codebook: keys with a radius of influence, and what a new key does to those there are.

Source: Hartvigsen et al., Aging with GRACE, arXiv 2211.11031, section 3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """The entry nearest to each of k queries.

    Attributes:
        index: [k].
        inside: [k] bool, whether the query is within its radius.
        distance: [k] Euclidean.
    """

    index: Tensor
    inside: Tensor
    distance: Tensor


@dataclass(frozen=True)
class Codebook:
    """n entries; tensors are float32, on one device.

    Attributes:
        keys: [n, c].
        values: [n, d].
        radii: [n] within which a query takes the entry's value.
        labels: the target that each value stands for.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: tuple[str, ...]

    @classmethod
    def empty(cls, keys: int, values: int, device: torch.device | str = "cpu") -> Codebook:
        """Without entries, of these widths."""
        made = [torch.zeros(shape, device=device) for shape in ((0, keys), (0, values), (0,))]
        return cls(made[0], made[1], made[2], ())

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Codebook:
        """The same on a device."""
        keys, values, radii = (t.to(device) for t in (self.keys, self.values, self.radii))
        return Codebook(keys, values, radii, self.labels)

    def nearest(self, queries: Tensor) -> Nearest:
        """The entry nearest to each query [k, c]; of equals the earlier. There must be entries."""
        # By differences: products would make a key differ from itself.
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(queries.float(), self.keys, compute_mode=exact)
        distance, index = distances.min(1)
        return Nearest(index, distance <= self.radii[index], distance)

    def placed(
        self, key: Tensor, value: Tensor, label: str, radius: float, same: float = 0.0
    ) -> tuple[Codebook, int]:
        """The codebook with a new edit, and the number of the entry that stands for it.

        Far from all (further than both radii): a new entry. Near an entry of the same label: that
        entry, whose radius grows to reach the key. Near one of another label: a new entry, and the
        radii of both are halves of their distance at most. At the very key of another label: that
        entry with the new label and value, for the latest edit counts.

        Args:
            key: [c].
            value: [d], where a new entry starts.
            label: the target.
            radius: of a new entry.
            same: accuracy to which keys are known, relative to their norm: so near, two are one.
        """
        if not len(self):
            return self._appended(key, value, label, radius)
        near, slack = self.nearest(key[None]), same * float(key.norm())
        index, distance = int(near.index), float(near.distance)
        reach = float(self.radii[index])
        if distance > radius + reach:
            return self._appended(key, value, label, radius)
        if label == self.labels[index]:
            return self._with_radius(index, max(reach, distance + slack)), index
        if distance <= slack:
            return self._relabelled(index, value, label), index
        halved = self._with_radius(index, min(reach, distance / 2))
        return halved._appended(key, value, label, min(radius, distance / 2))

    def joined(self, later: Codebook, same: float = 0.0) -> Codebook:
        """The entries of both. Those of `later` keep their values, so none is merged with another.

        Where labels differ, radii are halved and keys overwritten as in `placed`.
        """
        book = self
        rows = zip(later.keys, later.values, later.radii.tolist(), later.labels, strict=True)
        for key, value, radius, label in rows:
            if not len(book):
                book, _ = book._appended(key, value, label, radius)
                continue
            near = book.nearest(key[None])
            index, distance = int(near.index), float(near.distance)
            if distance <= same * float(key.norm()):
                book = book._relabelled(index, value, label)
                book = book._with_radius(index, max(float(book.radii[index]), radius))
            elif label == book.labels[index] or distance > radius + float(book.radii[index]):
                book, _ = book._appended(key, value, label, radius)
            else:
                book, _ = book.placed(key, value, label, radius, same)
        return book

    def with_values(self, index: Sequence[int], values: Tensor) -> Codebook:
        """With other values [k, d] in some entries."""
        changed = self.values.clone()
        changed[list(index)] = values.to(changed)
        return replace(self, values=changed)

    def _appended(
        self, key: Tensor, value: Tensor, label: str, radius: float
    ) -> tuple[Codebook, int]:
        book = Codebook(
            torch.cat([self.keys, key[None].to(self.keys)]),
            torch.cat([self.values, value[None].to(self.values)]),
            torch.cat([self.radii, self.radii.new_tensor([radius])]),
            (*self.labels, label),
        )
        return book, len(self)

    def _with_radius(self, index: int, radius: float) -> Codebook:
        radii = self.radii.clone()
        radii[index] = radius
        return replace(self, radii=radii)

    def _relabelled(self, index: int, value: Tensor, label: str) -> Codebook:
        labels = (*self.labels[:index], label, *self.labels[index + 1 :])
        return replace(self.with_values([index], value[None]), labels=labels)
