"""MEMIT: many keys and values written at once, spread over several layers' fc2.

The values z are sought for what the last of these layers puts out. Then, from the lowest layer up,
each takes its share R = (z - h) / (layers left) of what is still missing there:
D = R K^T (l C + K K^T)^-1, which is least in |D K - R|^2 + l tr(D C D^T); K, R hold a request a
column.

Source: Meng et al., Mass-Editing Memory in a Transformer, arXiv 2210.07229, equations 14 to 20 and
algorithm 1. It differs from the released code in how values are sought, see
`editing.closed_form.values`, in the unit of l, and in how the same system is solved: through
C^-1 K, for which C is factorised once, and a matrix as large as there are requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from editing.changes import LowRank, exact_dtype
from editing.closed_form.base import SPREAD, ClosedForm, ClosedFormOptions
from editing.closed_form.covariances import Covariance, covariances
from editing.closed_form.values import (
    Contexts,
    NotNegative,
    Positive,
    ValueOptions,
    contexts_of,
    in_contexts,
    read_at,
    values_of,
)
from editing.weight_edits import WeightEdit

if TYPE_CHECKING:
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRequest
    from mmtune.backbones.base import Site


@dataclass(frozen=True)
class SpreadValueOptions(ValueOptions):
    """The search for what a whole layer puts out, as published for GPT-J and Llama-3.

    A layer puts out more than its MLP does, so that less of it may change.
    """

    clamp: Positive = 0.75
    decay: NotNegative = 0.5


@dataclass(frozen=True)
class SpreadOptions(ClosedFormOptions):
    """Settings of what is spread over layers.

    Attributes:
        layers: of the language branch: "all", "first:N", "last:N" or indices; None takes five by
            their depth, see `ClosedForm.places`.
        value: the search for values.
    """

    layers: str | tuple[int, ...] | None = None
    value: SpreadValueOptions = field(default_factory=SpreadValueOptions)


@dataclass(frozen=True)
class MemitOptions(SpreadOptions):
    """Settings of MEMIT.

    Attributes:
        preservation: l in units of the keys' width d. As k^T C^-1 k is d for a usual key, at 1 such
            a key takes half of its share. The published 15000 is 0.92 for GPT-J, 1.05 for Llama-3.
    """

    preservation: Positive = 1.0


def least_squares(keys: Tensor, solved: Tensor, weight: float) -> Tensor:
    """[n, d]: K^T (weight C + K K^T)^-1, by which R is multiplied.

    Args:
        keys: K^T [n, d].
        solved: [n, d], C^-1 k of each key.
        weight: l.
    """
    gram = keys @ solved.T
    gram.diagonal().add_(weight)
    return torch.linalg.solve(gram, solved)


class Spread(ClosedForm):
    """Values for the last of several layers, met by all of them."""

    def right(self, mllm: MLLM, name: str, covariance: Covariance, keys: Tensor) -> Tensor:
        """[n, d] what the residuals R [e, n] of one layer are multiplied by, in float64 on the CPU.

        Args:
            mllm: the model.
            name: of the weight.
            covariance: of its keys.
            keys: [n, d] of the requests, in float64 on the CPU.
        """
        raise NotImplementedError

    def built(
        self,
        mllm: MLLM,
        changes: dict[str, LowRank],
        keys: dict[str, Tensor],
        about: dict[str, object],
    ) -> Edit:
        """The edit, from its changes and the keys [n, d] that were written into each weight."""
        return WeightEdit.of(mllm, changes, about)

    def make(self, mllm: MLLM, requests: Sequence[EditRequest], generator: torch.Generator) -> Edit:
        options = self.settings
        chosen = self.places(mllm, options.layers, SPREAD)
        sites = [site for site, _ in chosen.values()]
        known = covariances(mllm, sites, options.covariance)
        number = sites[-1].layer
        assert number is not None  # fc2 is in a layer
        (top,) = mllm.backbone.select(["language"], ["layer"], [number])
        prefixes, size = self.prefixes(mllm, generator), options.value.batch_size
        changes: dict[str, LowRank] = {}
        written: dict[str, Tensor] = {}
        starts = range(0, len(requests), size)

        def read(start: int) -> Contexts:
            part = requests[start : start + size]
            return contexts_of(mllm, part, options.place, prefixes, list(chosen))

        with in_contexts(mllm):
            # Many requests' images and states would not fit side by side: they are read anew.
            only = [read(0)] if len(starts) == 1 else []
            found = [
                values_of(mllm, part, top, options.value, {}) for part in only or map(read, starts)
            ]
            goal = torch.cat([values.before + values.shift for values in found]).double()
            for i, (name, (site, weight)) in enumerate(chosen.items()):
                with torch.no_grad():
                    weights = {n: change.on(chosen[n][1]) for n, change in changes.items()}
                asked = only or map(read, starts)
                keys, now = _at_present(mllm, asked, site, top, weights)
                right = self.right(mllm, name, known[i], keys.cpu()).to(goal)
                exact, left = exact_dtype(weight), (goal - now).T / (len(chosen) - i)
                changes[name] = LowRank(left.to(exact), right.to(exact))
                written[name] = keys.to(exact)
        about = {
            "layers": [site.layer for site in sites],
            "covariance_tokens": min(covariance.tokens for covariance in known),
            "loss": [loss for values in found for loss in values.loss],
            "steps": [steps for values in found for steps in values.steps],
        }
        return self.built(mllm, changes, written, about)


def _at_present(
    mllm: MLLM,
    asked: Iterable[Contexts],
    site: Site,
    top: Site,
    weights: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Mean keys [n, d] at `site` and outputs [n, e] of `top`, in float64, with these weights."""
    keys, now = [], []
    for part in asked:
        read = read_at(mllm, part, [site, top], weights)
        keys.append(part.mean(read[site.path][0].double()))
        now.append(read[top.path][1][part.plain].double())
    return torch.cat(keys), torch.cat(now)


class Memit(Spread):
    """MEMIT, one layer after the other.

        W <- W + R K^T (l C + K K^T)^-1,    R = (z - h) / (layers left)

    Numbers changed: all of each layer's fc2, by a matrix of rank n for n requests.
    """

    name: ClassVar[str] = "memit"
    summary: ClassVar[str] = "many keys and values written into several layers in closed form"
    source: ClassVar[str] = "MEMIT, arXiv 2210.07229"
    options: ClassVar[type] = MemitOptions

    def right(self, mllm: MLLM, name: str, covariance: Covariance, keys: Tensor) -> Tensor:
        weight = self.settings.preservation * keys.shape[1]
        return least_squares(keys, covariance.solved(keys), weight)


EDITORS = (Memit,)
