"""Tensors that are fitted to requests, each to its own: what memories put in an edit's place.

The requests of a batch have nothing to do with each other: each entry follows the gradient of its
own requests, and stays as it was when the model was certain of their targets. So what comes out
does not depend on which requests are computed together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmtune.backbones.generation import log_probabilities
from mmtune.batched import batched

if TYPE_CHECKING:
    from editing.batches import Batch
    from editing.edits import Edit
    from editing.mllm import MLLM
    from editing.requests import EditRequest


@dataclass(frozen=True)
class Stopping:
    """When fitting ends.

    Attributes:
        steps: at most.
        certainty: probability that every token of a target must reach, besides being the likeliest,
            by which it is what is written.
    """

    steps: int
    certainty: float


@dataclass(frozen=True)
class Fitted:
    """Entries after fitting.

    Attributes:
        tensors: as they were given, with the values found.
        steps: [u] taken for each entry.
        loss: [u] of each entry's requests, the mean over their targets' tokens, nats, summed.
    """

    tensors: list[Tensor]
    steps: Tensor
    loss: Tensor


def fit(
    mllm: MLLM,
    batch: Batch,
    leaves: Sequence[Tensor],
    owner: Tensor,
    lr: float,
    stopping: Stopping,
) -> Fitted:
    """Adam on tensors that what is in place reads, until each entry's targets are certain.

    An entry whose targets never are keeps the values of its least loss.

    Args:
        mllm: the model, with something in place that computes with the leaves.
        batch: the requests.
        leaves: [u, ...] each, one row for each entry; they are written to.
        owner: [n] the entry of each request.
        lr: of Adam.
        stopping: when it ends.
    """
    optimiser = torch.optim.Adam(leaves, lr=lr)
    kept = [leaf.detach().clone() for leaf in leaves]
    count = len(leaves[0])
    unsure = torch.ones(count, dtype=torch.bool, device=owner.device)
    least = torch.full((count,), math.inf, device=owner.device)
    taken = torch.zeros(count, dtype=torch.int64, device=owner.device)
    for step in range(stopping.steps + 1):
        with torch.enable_grad():
            losses, sure = target_losses(mllm, batch, stopping.certainty)
            losses.sum().backward()
        sums = torch.zeros_like(least).index_add(0, owner, losses.detach().to(least))
        # An entry that got certain is not looked at any more, so certainty wins over loss.
        better = unsure & (sums < least)
        for value, leaf in zip(kept, leaves, strict=True):
            value[better] = leaf.detach()[better]
        least, taken = torch.where(better, sums, least), torch.where(better, step, taken)
        unsure &= torch.zeros_like(unsure).index_fill(0, owner[~sure], True)
        if step == stopping.steps or not unsure.any():
            break
        optimiser.step()
        optimiser.zero_grad()
    return Fitted(kept, taken, least)


def target_losses(
    mllm: MLLM, batch: Batch, certainty: float, weights: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """How far requests are from their targets.

    Args:
        mllm: the model.
        batch: of requests.
        certainty: see `Stopping`.
        weights: see `MLLM.answer_logits`.

    Returns:
        [n] -log p of each target, the mean over its tokens, nats, differentiable; and [n] bool,
        whether each of its tokens is the likeliest and certain.
    """
    logits = mllm.answer_logits(batch, weights)
    logs = log_probabilities(logits, batch.target_ids, batch.target_mask)
    sure = (logits.argmax(-1) == batch.target_ids) & (logs.exp() >= certainty)
    losses = -logs.sum(1) / batch.target_mask.sum(1)
    return losses, (sure | (batch.target_mask == 0)).all(1)


@torch.no_grad()
def says(mllm: MLLM, edit: Edit, requests: Sequence[EditRequest], size: int) -> bool:
    """Whether the model writes every target where the edit is applied."""
    with edit.applied(mllm):
        return all(
            mllm.answer(batch) == mllm.target_texts(batch)
            for batch in (mllm.batch(part) for part in batched(requests, size))
        )
