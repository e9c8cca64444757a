"""Trained editors that change weights: a network makes the change out of a gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editing.meta.apart import each_changed, require_language
from editing.meta.base import TrainedEditor, TrainedOptions
from editing.meta.gradients import Rows, each_gradient_rows, matrices_of
from editing.meta.losses import Apart, LossWeights, Together, edit_losses, hits
from editing.regions import Region, RegionName
from editing.weight_edits import WeightEdit

if TYPE_CHECKING:
    from editing.changes import Change, LowRank
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRecord, EditRequest


@dataclass(frozen=True)
class TrainedWeightOptions(TrainedOptions):
    """Settings of every trained editor of weights.

    Attributes:
        region: "vision", "language", or branches, sites and layers; Linears without biases.
        losses: how much each loss of the training counts.
        apart: in training, each record of a batch is an edit of its own, all computed in one pass;
            else their requests are one edit. For regions in the language model.
    """

    region: RegionName | Region = "language"
    losses: LossWeights = field(default_factory=LossWeights)
    apart: bool = False


class TrainedWeightEditor(TrainedEditor):
    """The requests of `edit` are one edit; those of a batch of training too, or each is one."""

    @abstractmethod
    def changes(
        self, mllm: MLLM, network: nn.Module, requests: Sequence[EditRequest]
    ) -> dict[str, Change]:
        """What the network makes of requests, by weight; differentiable in its parameters."""

    @abstractmethod
    def change(
        self, mllm: MLLM, network: nn.Module, request: EditRequest, rows: Mapping[str, Rows]
    ) -> dict[str, LowRank]:
        """What the network makes of one request, whose rows (see `gradient_rows`) are known."""

    def weights(self, mllm: MLLM) -> Mapping[str, Tensor]:
        found = matrices_of(mllm, self.settings.region)
        if self.settings.apart:
            require_language(mllm.backbone, self.settings.region)
        return found

    def losses(
        self,
        mllm: MLLM,
        network: nn.Module,
        records: Sequence[EditRecord],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weights, requests = self.weights(mllm), [record.request for record in records]
        if self.settings.apart:
            edited = Apart(self._each(mllm, network, requests))
        else:
            changes = self.changes(mllm, network, requests)
            edited = Together({name: c.on(weights[name]) for name, c in changes.items()})
        return edit_losses(mllm, records, edited, self.settings.losses)

    @torch.no_grad()
    def successes(
        self,
        mllm: MLLM,
        network: nn.Module,
        records: Sequence[EditRecord],
        generator: torch.Generator,
    ) -> int:
        if not self.settings.apart:
            return super().successes(mllm, network, records, generator)
        said = 0
        for bare in (False, True):
            same = [r.request for r in records if (r.request.image is None) == bare]
            if same:
                batch, changes = mllm.batch(same), self._each(mllm, network, same)
                with each_changed(mllm.model, changes, [1] * len(same)):
                    said += hits(batch, mllm.answer_logits(batch))
        return said

    def _each(
        self, mllm: MLLM, network: nn.Module, requests: Sequence[EditRequest]
    ) -> list[dict[str, LowRank]]:
        every = each_gradient_rows(mllm, self.weights(mllm), requests)
        return [
            self.change(mllm, network, request, rows)
            for request, rows in zip(requests, every, strict=True)
        ]

    @torch.no_grad()
    def edit_with(
        self,
        mllm: MLLM,
        network: nn.Module,
        requests: Sequence[EditRequest],
        generator: torch.Generator,
    ) -> Edit:
        return WeightEdit.of(mllm, self.changes(mllm, network, requests))
