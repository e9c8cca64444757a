"""AlphaEdit: MEMIT whose change is projected onto what the layers' usual keys do not reach.

D = R K^T P (Kp Kp^T P + K K^T P + l)^-1 with P the projection onto the eigenvectors of C whose
eigenvalues are small: D k = 0 for every key k that was well seen. Kp are the keys of earlier edits,
whose outputs D is to leave alone: it is least in |D K - R|^2 + |D Kp|^2 + l |D|^2 among D = D P.

Source: Fang et al., AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, arXiv
2410.02355, equations 13 and 14. It differs from the released code in how values are sought, see
`editing.closed_form.values`, and in units: there the threshold is 0.02 and l is 10 whatever the
size of the keys. The same system is solved with a matrix as large as there are keys of edits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from editing.changes import Change
from editing.edits import Edit, applied_to
from editing.fingerprints import Fingerprint
from editing.methods.memit import Spread, SpreadOptions
from editing.ranges import Positive
from editing.weight_edits import WeightEdit

if TYPE_CHECKING:
    from editing.changes import LowRank
    from editing.closed_form.covariances import Covariance
    from editing.mllm import MLLM

KEYS = "keys"


@dataclass(frozen=True)
class AlphaEditOptions(SpreadOptions):
    """Settings of AlphaEdit.

    Attributes:
        threshold: eigenvalues of C below it, in units of their mean, count as zero.
        ridge: l in units of the usual key's squared norm.
    """

    threshold: Positive = 0.02
    ridge: Positive = 0.01


class NullSpaceEdit(WeightEdit):
    """A change of weights, and the keys that were written: later edits are to leave them alone.

    Attributes:
        keys: parameter name -> [m, d].
    """

    kind: ClassVar[str] = "null_space"

    def __init__(
        self,
        changes: Mapping[str, Change],
        made_on: Fingerprint,
        about: Mapping[str, Any] | None = None,
        keys: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(changes, made_on, about)
        self.keys = dict(keys or {})

    def then(self, later: Edit) -> Edit:
        """Both changes and the keys of both."""
        both = super().then(later)
        if not isinstance(both, WeightEdit):
            return both
        keys = dict(self.keys)
        for name, rows in later.keys.items() if isinstance(later, NullSpaceEdit) else ():
            keys[name] = torch.cat([keys[name], rows.to(keys[name])]) if name in keys else rows
        return NullSpaceEdit(both.changes, both.made_on, both.about, keys)

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"{name}/{KEYS}": rows for name, rows in self.keys.items()}
        return super().tensors() | kept

    @classmethod
    def restored(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> NullSpaceEdit:
        end = f"/{KEYS}"
        rest = {name: t for name, t in tensors.items() if not name.endswith(end)}
        kept = {n.removesuffix(end): t for n, t in tensors.items() if n.endswith(end)}
        plain = WeightEdit.restored(settings, rest, about)
        return cls(plain.changes, plain.made_on, about, kept)


def projected(keys: Tensor, covariance: Covariance, threshold: float) -> Tensor:
    """[n, d]: P k of each key [n, d], in float64 on the CPU.

    Args:
        keys: on the CPU.
        covariance: whose eigenvectors are left out where their eigenvalues are not small.
        threshold: of eigenvalues, in units of their mean.

    Raises:
        ValueError: no eigenvalue is small.
    """
    values, vectors = covariance.spectrum
    seen = vectors[:, values >= threshold * covariance.scale]
    if seen.shape[1] == len(values):
        least = float(values[0]) / covariance.scale
        raise ValueError(
            f"no direction of the {len(values)} is free of the keys that were seen: the least "
            f"eigenvalue is {least:.3g} of their mean, and threshold is {threshold}. Raise it, or "
            "choose a layer of another depth"
        )
    exact = keys.double()
    return exact - exact @ seen @ seen.T


def null_space(new: Tensor, earlier: Tensor, ridge: float) -> Tensor:
    """[n, d]: K^T P (Kp Kp^T P + K K^T P + ridge)^-1, by which R is multiplied.

    Args:
        new: (P K)^T [n, d].
        earlier: (P Kp)^T [m, d].
        ridge: l.
    """
    every = torch.cat([new, earlier])
    gram = every @ every.T
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, every)[: len(new)]


class AlphaEdit(Spread):
    """AlphaEdit: the keys of all AlphaEdit edits that are applied while one is made are kept.

        W <- W + R K^T P (Kp Kp^T P + K K^T P + l)^-1,    R = (z - h) / (layers left)

    Numbers changed: all of each layer's fc2, by a matrix of rank n for n requests.
    """

    name: ClassVar[str] = "alphaedit"
    summary: ClassVar[str] = "MEMIT within the null space of what the model usually looks up"
    source: ClassVar[str] = "AlphaEdit, arXiv 2410.02355"
    options: ClassVar[type] = AlphaEditOptions

    def right(self, mllm: MLLM, name: str, covariance: Covariance, keys: Tensor) -> Tensor:
        earlier = [
            edit.keys[name].to(keys)
            for edit in applied_to(mllm)
            if isinstance(edit, NullSpaceEdit) and name in edit.keys
        ]
        threshold = self.settings.threshold
        before = torch.cat([keys[:0], *earlier])
        usual = covariance.scale * keys.shape[1]  # E|k|^2
        return null_space(
            projected(keys, covariance, threshold),
            projected(before, covariance, threshold),
            self.settings.ridge * usual,
        )

    def built(
        self,
        mllm: MLLM,
        changes: dict[str, LowRank],
        keys: dict[str, Tensor],
        about: dict[str, object],
    ) -> Edit:
        plain = WeightEdit.of(mllm, changes, about)
        return NullSpaceEdit(plain.changes, plain.made_on, plain.about, keys)


EDITORS = (AlphaEdit,)
