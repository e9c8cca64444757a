"""Trained editors that change weights: a network makes the change out of a gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editing.meta.base import TrainedEditor, TrainedOptions
from editing.meta.gradients import matrices_of
from editing.meta.losses import LossWeights, edit_losses
from editing.regions import Region, RegionName
from editing.weight_edits import WeightEdit

if TYPE_CHECKING:
    from editing.changes import Change
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRecord, EditRequest


@dataclass(frozen=True)
class TrainedWeightOptions(TrainedOptions):
    """Settings of every trained editor of weights.

    Attributes:
        region: "vision", "language", or branches, sites and layers; Linears without biases.
        losses: how much each loss of the training counts.
    """

    region: RegionName | Region = "language"
    losses: LossWeights = field(default_factory=LossWeights)


class TrainedWeightEditor(TrainedEditor):
    """The requests of one step of training are one edit, and so are those of `edit`."""

    @abstractmethod
    def changes(
        self, mllm: MLLM, network: nn.Module, requests: Sequence[EditRequest]
    ) -> dict[str, Change]:
        """What the network makes of requests, by weight; differentiable in its parameters."""

    def weights(self, mllm: MLLM) -> Mapping[str, Tensor]:
        return matrices_of(mllm, self.settings.region)

    def losses(
        self,
        mllm: MLLM,
        network: nn.Module,
        records: Sequence[EditRecord],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weights = self.weights(mllm)
        changes = self.changes(mllm, network, [record.request for record in records])
        edited = {name: change.on(weights[name]) for name, change in changes.items()}
        return edit_losses(mllm, records, edited, self.settings.losses)

    @torch.no_grad()
    def edit_with(
        self,
        mllm: MLLM,
        network: nn.Module,
        requests: Sequence[EditRequest],
        generator: torch.Generator,
    ) -> Edit:
        return WeightEdit.of(mllm, self.changes(mllm, network, requests))
