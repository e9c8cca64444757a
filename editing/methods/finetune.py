"""Fine-tuning as an edit: gradient steps on a region until the model says the target.

The steps are taken on a change beside the model, whose parameters are never written to; the change
is kept in float32, so that steps too small for a bf16 weight add up.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from editing.changes import Change, Delta, LowRank, exact_dtype
from editing.methods.base import Editor
from editing.ranges import Count, Positive
from editing.regions import Region, RegionName, parameters_of
from editing.weight_edits import WeightEdit
from mmtune.backbones.base import SiteError
from mmtune.backbones.generation import log_probabilities
from mmtune.batched import batched
from mmtune.replayed import Steps

if TYPE_CHECKING:
    from editing.batches import Batch
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRequest

Leaves = tuple[Tensor, ...]  # what is trained in place of one parameter


@dataclass(frozen=True)
class FineTuneOptions:
    """Settings of FT.

    Attributes:
        region: "vision", "language", or branches, sites and layers.
        steps: of the optimiser at most; it stops as soon as every target is what the model writes.
        lr: AdamW's.
        weight_decay: AdamW's, which pulls the change, not the weights, towards zero.
        batch_size: requests computed at once; a step always follows the gradient of all.
        seed: of what is drawn where no generator is given.
    """

    region: RegionName | Region = "language"
    steps: Count = 25
    lr: Positive = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Count = 16
    seed: int = 0


@dataclass(frozen=True)
class ConstrainedOptions(FineTuneOptions):
    """Settings of FT-L.

    Attributes:
        bound: no number of the region changes by more than this.
    """

    bound: Positive = 5e-4


@dataclass(frozen=True)
class LoraOptions(FineTuneOptions):
    """Settings of the LoRA edit.

    Attributes:
        rank: of the change of each matrix.
        alpha: the change is alpha / rank times the product of the factors.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    lr: Positive = 5e-3


class _Editing(Editor):
    """Steps of AdamW on the mean of -log p over the targets' tokens, averaged over requests.

    Attributes:
        replays: whether steps on a CUDA device are replayed where they can be, see `Steps`.
    """

    replays: bool = True

    @abstractmethod
    def factors(
        self, weights: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Leaves]:
        """Parameter name -> the leaf tensors that are trained for it, the change being zero."""

    @abstractmethod
    def change(self, leaves: Leaves) -> Change:
        """The change that leaf tensors stand for; differentiable."""

    def after_step(self, leaves: Leaves) -> None:
        """Where a constraint puts leaf tensors back to what it allows."""

    def make(self, mllm: MLLM, requests: Sequence[EditRequest], generator: torch.Generator) -> Edit:
        weights = dict(parameters_of(mllm.backbone, self.settings.region))
        trained = self.factors(weights, generator)
        leaves = [leaf for part in trained.values() for leaf in part]
        optimiser = torch.optim.AdamW(
            leaves,
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
            fused=leaves[0].is_cuda or None,
            capturable=leaves[0].is_cuda,
        )
        size = self.settings.batch_size
        batches = [mllm.cached(mllm.batch(part), weights) for part in batched(requests, size)]
        scores: list[Tensor] = []  # of each batch, in the last pass

        def gradients() -> Tensor:
            optimiser.zero_grad()
            with torch.enable_grad():
                found = [
                    self._gradients(mllm, batch, self._edited(weights, trained), len(requests))
                    for batch in batches
                ]
            scores[:] = [logits for logits, *_ in found]
            return torch.stack([loss for _, loss, _ in found] + [hit for *_, hit in found])

        def update() -> None:
            optimiser.step()
            with torch.no_grad():
                for part in trained.values():
                    self.after_step(part)

        steps, loss = 0, 0.0
        with Steps(gradients, update, leaves[0].device, self.replays) as taken:
            while True:
                numbers = taken.gradients()
                loss = _total(numbers[: len(batches)])
                # Likeliest tokens alone are not written, see `MLLM.answers`.
                said = all(numbers[len(batches) :]) and all(
                    self._says(mllm, batch, logits, weights, trained)
                    for batch, logits in zip(batches, scores, strict=True)
                )
                if said or steps == self.settings.steps:
                    break
                taken.update()
                steps += 1
        changes = {name: _detached(self.change(part)) for name, part in trained.items()}
        return WeightEdit.of(mllm, changes, {"steps": steps, "loss": loss, "said": said})

    def _edited(
        self, weights: Mapping[str, Tensor], trained: Mapping[str, Leaves]
    ) -> dict[str, Tensor]:
        return {name: self.change(trained[name]).on(weight) for name, weight in weights.items()}

    @staticmethod
    def _gradients(
        mllm: MLLM, batch: Batch, edited: Mapping[str, Tensor], count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add a batch's gradients to the leaves'.

        Returns:
            Its scores, its part of the loss, and 1 where every target's tokens are the likeliest.
        """
        logits = mllm.answer_logits(batch, edited)
        logs = log_probabilities(logits, batch.target_ids, batch.target_mask)
        loss = -(logs.sum(1) / batch.target_mask.sum(1)).sum() / count
        loss.backward()
        hit = (logits.argmax(-1) == batch.target_ids) | (batch.target_mask == 0)
        return logits.detach(), loss.detach(), hit.all().to(loss.dtype)

    @torch.no_grad()
    def _says(
        self,
        mllm: MLLM,
        batch: Batch,
        logits: Tensor,
        weights: Mapping[str, Tensor],
        trained: Mapping[str, Leaves],
    ) -> bool:
        edited = self._edited(weights, trained)
        return mllm.answers(batch, logits, edited) == mllm.target_texts(batch)


class FineTune(_Editing):
    """FT: every number of the region is free.

        W <- W + D,    D by AdamW, from 0, on the mean over requests and tokens of their targets of
                       -log p(y_t | x, y_1 .. y_t-1; W + D)

    Numbers changed: all of the region's, each of its own.
    """

    name: ClassVar[str] = "ft"
    summary: ClassVar[str] = "fine-tuning of a region, until the target is what the model writes"
    source: ClassVar[str] = "baseline of MMEdit, arXiv 2310.08475"
    options: ClassVar[type] = FineTuneOptions

    def factors(
        self, weights: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Leaves]:
        zeros = {n: torch.zeros_like(w, dtype=exact_dtype(w)) for n, w in weights.items()}
        return {name: (zero.requires_grad_(),) for name, zero in zeros.items()}

    def change(self, leaves: Leaves) -> Change:
        return Delta(*leaves)


class ConstrainedFineTune(FineTune):
    """FT-L: no number moves further than a bound (the L-infinity norm of the change).

        W <- W + D,    D as FT has it, and D <- min(max(D, -bound), bound) after every step

    Numbers changed: all of the region's, each of its own.
    """

    name: ClassVar[str] = "ft-l"
    summary: ClassVar[str] = "fine-tuning in which no number moves further than a bound"
    source: ClassVar[str] = "FT+L of ROME, arXiv 2202.05262; Zhu et al., arXiv 2012.00363"
    options: ClassVar[type] = ConstrainedOptions

    def after_step(self, leaves: Leaves) -> None:
        for leaf in leaves:
            leaf.clamp_(-self.settings.bound, self.settings.bound)


class LoraEdit(_Editing):
    """A change of low rank: the factors are trained, and the edit keeps them.

        W <- W + (alpha / rank) B A,    A drawn, B from 0; both by AdamW on the loss of FT

    Numbers changed: all of the region's matrices, by rank (d_in + d_out) numbers for each.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "fine-tuning of a region by a change of low rank"
    source: ClassVar[str] = "LoRA, arXiv 2106.09685, as an editor in EasyEdit, arXiv 2308.07269"
    options: ClassVar[type] = LoraOptions

    def factors(
        self, weights: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Leaves]:
        """Left [out, r] of zeros, right [r, in] drawn uniformly within 1 / sqrt(in), as PEFT's."""
        found = {}
        for name, weight in weights.items():
            if weight.dim() != 2:
                raise SiteError(
                    f"a lora edit changes matrices, and {name} has shape {list(weight.shape)}: "
                    "choose sites that are Linears, without biases"
                )
            (rows, columns), dtype = weight.shape, exact_dtype(weight)
            drawn = torch.rand(self.settings.rank, columns, generator=generator, dtype=dtype)
            right = ((2 * drawn - 1) / columns**0.5).to(weight.device)
            left = torch.zeros(rows, self.settings.rank, dtype=dtype, device=weight.device)
            found[name] = (left.requires_grad_(), right.requires_grad_())
        return found

    def change(self, leaves: Leaves) -> Change:
        left, right = leaves
        return LowRank(left * (self.settings.alpha / self.settings.rank), right)


def _total(losses: Sequence[float]) -> float:
    total = 0.0
    for loss in losses:  # in this order, whatever `sum` does
        total += loss
    return total


def _detached(change: Change) -> Change:
    return type(change)(**{n: t.detach().clone() for n, t in change.tensors().items()})


EDITORS = (FineTune, ConstrainedFineTune, LoraEdit)
