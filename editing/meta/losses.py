"""What an edit of a few records loses: targets that are not said, answers that moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editing.batches import probe_of
from editing.metrics.locality import kl
from editing.ranges import NotNegative

if TYPE_CHECKING:
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


def edit_losses(
    mllm: MLLM,
    records: Sequence[EditRecord],
    edited: Mapping[str, Tensor],
    counts: LossWeights,
) -> dict[str, Tensor]:
    """The weighted losses of one edit that is made of all these records' requests.

    Each is a mean over probes of a mean over the answer's tokens and its end token. The released
    code takes the KL over all positions, of prompt and image too.

    Args:
        mllm: the model, unedited.
        records: whose requests the edit answers.
        edited: the parameters that it changes, after it; differentiated through.
        counts: see `LossWeights`.

    Returns:
        Loss by kind; kinds that no record has, or that count nothing, are left out.
    """

    def changed(probes: Sequence[Probe]) -> Tensor:
        return mllm.nll(mllm.batch(probes), edited)

    def kept(probes: Sequence[Probe]) -> Tensor:
        batch = mllm.cached(mllm.batch(probes), edited)
        with torch.no_grad():
            before = mllm.answer_logits(batch)
        apart = kl(before, mllm.answer_logits(batch, edited)) * batch.target_mask
        return apart.sum(1) / batch.target_mask.sum(1)

    return {
        kind: getattr(counts, kind) * value
        for kinds, measure in ((CHANGED, changed), (KEPT, kept))
        for kind, value in _means(_probes(records, kinds, counts), measure).items()
    }


def _probes(
    records: Sequence[EditRecord], kinds: Sequence[str], counts: LossWeights
) -> list[tuple[str, Probe]]:
    """(kind, probe), sorted by kind."""
    return [
        (kind, probe)
        for kind in kinds
        if getattr(counts, kind)
        for record in records
        for probe in ([probe_of(record.request)] if kind == "edit" else getattr(record, kind))
    ]


def _means(
    probes: Sequence[tuple[str, Probe]], measure: Callable[[Sequence[Probe]], Tensor]
) -> dict[str, Tensor]:
    """The mean of what is measured, [n] for all probes at once, by kind."""
    if not probes:
        return {}
    values = measure([probe for _, probe in probes])
    sizes = {kind: len(list(group)) for kind, group in groupby(probes, lambda one: one[0])}
    parts = values.split(list(sizes.values()))
    return {kind: part.mean() for kind, part in zip(sizes, parts, strict=True)}
