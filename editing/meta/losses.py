"""What an edit of a few records loses: targets that are not said, answers that moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from editing.batches import Batch, probe_of
from editing.meta.apart import each_changed
from editing.metrics.locality import kl
from editing.ranges import NotNegative

if TYPE_CHECKING:
    from editing.changes import LowRank
    from editing.mllm import MLLM
    from editing.requests import EditRecord, Probe


@dataclass(frozen=True)
class LossWeights:
    """How much each loss counts; one that counts nothing is not computed.

    The released code of MMEdit has 0.1 for both kinds of generality, 1.0 for both kinds of
    locality, and does not count the edit itself (`cedit`, `iedit` and `cloc` there).

    Attributes:
        edit: -log p of the target, asked as the request asks.
        text_generality: the same, asked in other words.
        image_generality: the same, about another image of the same thing.
        text_locality: KL(before || after) of answers to questions without an image, nats.
        image_locality: the same for questions about other images.
    """

    edit: NotNegative = 0.1
    text_generality: NotNegative = 0.1
    image_generality: NotNegative = 0.1
    text_locality: NotNegative = 1.0
    image_locality: NotNegative = 1.0

    def __post_init__(self) -> None:
        if not any(getattr(self, kind) for kind in (*CHANGED, *KEPT)):
            raise ValueError("at least one loss must have a weight above 0")


CHANGED = ("edit", "text_generality", "image_generality")
KEPT = ("text_locality", "image_locality")


class _Asked(NamedTuple):
    """A probe of one kind, of the record of that number."""

    kind: str
    owner: int
    probe: Probe


@dataclass(frozen=True)
class Together:
    """One edit of all records.

    Attributes:
        weights: the parameters that it changes, after it; differentiated through.
    """

    weights: Mapping[str, Tensor]

    @property
    def names(self) -> list[str]:
        """Of the parameters that change."""
        return list(self.weights)

    def batches(self, asked: Sequence[_Asked]) -> list[list[_Asked]]:
        """What is computed at once."""
        return [list(asked)] if asked else []

    def around(self, model: nn.Module, asked: Sequence[_Asked]) -> AbstractContextManager[None]:
        """Inside, a batch of these is edited but for `weights`."""
        return nullcontext()


@dataclass(frozen=True)
class Apart:
    """An edit of each record alone, see `each_changed`.

    Attributes:
        changes: of each record; differentiated through.
    """

    changes: Sequence[Mapping[str, LowRank]]
    weights: None = None

    @property
    def names(self) -> list[str]:
        """Of the parameters that change."""
        return list(self.changes[0])

    def batches(self, asked: Sequence[_Asked]) -> list[list[_Asked]]:
        """What is computed at once: with an image or without, by record."""
        ordered = sorted(asked, key=lambda one: one.owner)
        split = [[a for a in ordered if (a.probe.image is None) == bare] for bare in (False, True)]
        return [some for some in split if some]

    def around(self, model: nn.Module, asked: Sequence[_Asked]) -> AbstractContextManager[None]:
        """Inside, a batch of these is edited, each row by its own record's edit."""
        owners = [one.owner for one in asked]
        return each_changed(model, self.changes, [*map(owners.count, range(len(self.changes)))])


def edit_losses(
    mllm: MLLM, records: Sequence[EditRecord], edited: Together | Apart, counts: LossWeights
) -> dict[str, Tensor]:
    """The weighted losses of records under one edit of them all, or each under its own.

    Each is a mean over probes of a mean over the answer's tokens and its end token. The released
    code takes the KL over all positions, of prompt and image too.

    Args:
        mllm: the model, unedited.
        records: whose requests are edited.
        edited: by what.
        counts: see `LossWeights`.

    Returns:
        Loss by kind; kinds that no record has, or that count nothing, are left out.
    """

    def changed(asked: Sequence[_Asked]) -> Tensor:
        batch = mllm.batch([one.probe for one in asked])
        with edited.around(mllm.model, asked):
            return mllm.nll(batch, edited.weights)

    def kept(asked: Sequence[_Asked]) -> Tensor:
        batch = mllm.cached(mllm.batch([one.probe for one in asked]), edited.names)
        if edited.weights is None:
            batch = batch.in_rows()  # which both passes then share
        with torch.no_grad():
            before = mllm.answer_logits(batch)
        with edited.around(mllm.model, asked):
            after = mllm.answer_logits(batch, edited.weights)
        apart = kl(before, after) * batch.target_mask
        return apart.sum(1) / batch.target_mask.sum(1)

    found: dict[str, list[Tensor]] = {}
    for kinds, measure in ((CHANGED, changed), (KEPT, kept)):
        for asked in edited.batches(_asked(records, kinds, counts)):
            for one, value in zip(asked, measure(asked), strict=True):
                found.setdefault(one.kind, []).append(value)
    order = [kind for kind in (*CHANGED, *KEPT) if kind in found]
    return {kind: getattr(counts, kind) * torch.stack(found[kind]).mean() for kind in order}


def hits(batch: Batch, logits: Tensor) -> int:
    """How many targets are written greedily: each token is the likeliest behind those before."""
    right = logits.argmax(-1) == batch.target_ids
    return int((right | (batch.target_mask == 0)).all(1).sum())


def _asked(
    records: Sequence[EditRecord], kinds: Sequence[str], counts: LossWeights
) -> list[_Asked]:
    return [
        _Asked(kind, number, probe)
        for kind in kinds
        if getattr(counts, kind)
        for number, record in enumerate(records)
        for probe in ([probe_of(record.request)] if kind == "edit" else getattr(record, kind))
    ]
