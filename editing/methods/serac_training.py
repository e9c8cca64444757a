"""What SERAC is trained on: which questions are about an edit, and saying what the edit says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editing.batches import probe_of
from editing.features import Features, features_of
from editing.methods.serac_memory import Fact, Read, read_by_scope, told
from editing.methods.serac_network import SeracNetwork, TrainedScope
from editing.metrics.locality import kl
from editing.requests import EditRecord, EditRequest, Probe

if TYPE_CHECKING:
    from editing.mllm import MLLM

NEAREST = 1e-6  # distance of something out of scope below which its loss grows no more
CHANGED = ("edit", "text_generality", "image_generality")
KEPT = ("text_locality", "image_locality")
WORDED, SEEN, NEAR, OTHER, SKIPPED = range(5)  # of questions to the scope, see `_classes`
INSIDE, OUTSIDE = (WORDED, SEEN), (NEAR, OTHER)


@dataclass
class _Questions:
    """Questions to the scope, each in words of one of some probes and with the image of another.

    Attributes:
        words: numbers among the probes.
        images: the same.
        owner: number of the record that a question comes from.
        kind: WORDED or SEEN, in scope of its owner's edit, in other words or of another image;
            NEAR, out of it though the record has it for that; OTHER, two edits' words and image;
            SKIPPED, the edit itself.
    """

    words: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)

    def add(self, words: int, image: int, owner: int, kind: int) -> None:
        self.words.append(words)
        self.images.append(image)
        self.owner.append(owner)
        self.kind.append(kind)


def scope_loss(
    mllm: MLLM, scope: TrainedScope, records: Sequence[EditRecord], read: Read = "question"
) -> Tensor:
    """Binary cross-entropy of every question with every edit of these records.

    In scope of an edit: its other wordings and other images of its thing. Out of scope: its
    locality questions, what belongs to other edits, its words about another edit's image, and
    another edit's words about its image. What is in scope and what is not count the same, and so do
    the kinds of each: other words and other images, the record's own and the rest. The edit itself
    is in scope whatever is learned.

    Args:
        mllm: the model.
        scope: in training mode its statistics take in what is seen.
        records: several, so that there are others.
        read: what the scope reads, see `SeracOptions`.
    """
    probes: list[Probe | EditRequest] = [record.request for record in records]
    asked = _own_questions(records, probes)
    _crossed(records, asked)
    features = features_of(mllm, read_by_scope(probes, read))
    if scope.training:
        scope.observe(features)
    words, images = (torch.tensor(rows, device=mllm.device) for rows in (asked.words, asked.images))
    questions = Features(features.words[words], features.image[images], features.seen[images])
    found = scope(questions, _first(features, len(records)))
    return _cross_entropy(found, _classes(records, probes, asked).to(found.device))


def _own_questions(records: Sequence[EditRecord], probes: list[Probe | EditRequest]) -> _Questions:
    """Those that the records hold; adds their probes to `probes`."""
    asked = _Questions()
    kinds = dict(zip(CHANGED[1:], INSIDE, strict=True)) | dict.fromkeys(KEPT, NEAR)
    for number, record in enumerate(records):
        asked.add(number, number, number, SKIPPED)
        for name, kind in kinds.items():
            for probe in getattr(record, name):
                asked.add(len(probes), len(probes), number, kind)
                probes.append(probe)
    return asked


def _crossed(records: Sequence[EditRecord], asked: _Questions) -> None:
    """The words of each edit about the image of each other one that has one."""
    for a, first in enumerate(records):
        for b, second in enumerate(records):
            if a != b and first.request.image is not None and second.request.image is not None:
                asked.add(a, b, a, OTHER)


def _classes(
    records: Sequence[EditRecord], probes: Sequence[Probe | EditRequest], asked: _Questions
) -> Tensor:
    """[m, n] by question and edit: how it counts, SKIPPED for what is an edit itself."""
    edits = [(record.request.question, record.request.image) for record in records]
    found = torch.full((len(asked.words), len(edits)), OTHER)
    for row, (w, i, owner, kind) in enumerate(
        zip(asked.words, asked.images, asked.owner, asked.kind, strict=True)
    ):
        what = probes[w].question, probes[i].image
        for column, edit in enumerate(edits):
            # Two records may hold one edit, or words that many edits share (captions).
            if what == edit:
                found[row, column] = SKIPPED
            elif kind in INSIDE and edits[owner] == edit:
                found[row, column] = kind
        if kind == NEAR and found[row, owner] == OTHER:
            found[row, owner] = NEAR
    return found


def _cross_entropy(log_similarity: Tensor, classes: Tensor) -> Tensor:
    distance = -log_similarity
    # log(1 - exp(-d)) has no gradient at d = 0, which two equal questions would have.
    outside = -torch.log(-torch.expm1(-distance.clamp(min=NEAREST)))
    sides = []
    for kinds, losses in ((INSIDE, distance), (OUTSIDE, outside)):
        found = [losses[classes == one].mean() for one in kinds if bool((classes == one).any())]
        if found:
            sides.append(torch.stack(found).mean())
    return torch.stack(sides).mean() if sides else distance.sum() * 0


def counterfactual_losses(
    mllm: MLLM, network: SeracNetwork, records: Sequence[EditRecord], locality: float
) -> dict[str, Tensor]:
    """What the counterfactual model, told the edit first, fails to say, and what else it changes.

    Args:
        mllm: the model.
        network: with an adapter.
        records: each asked about its own edit.
        locality: weight of KL(model || counterfactual model) on locality questions, nats; 0
            computes none.

    Returns:
        Loss by kind; kinds that no record has are left out.
    """
    found = {}
    for kind in CHANGED:
        if asked := _with_facts(records, kind):
            with told(mllm, *asked) as batch, network.counterfactual(mllm.model):
                found[kind] = mllm.nll(batch).mean()
    for kind in KEPT if locality else ():
        if asked := _with_facts(records, kind):
            plain = mllm.batch(asked[0])
            with torch.no_grad():
                before = mllm.answer_logits(plain)
            with told(mllm, *asked) as batch, network.counterfactual(mllm.model):
                apart = kl(before, mllm.answer_logits(batch)) * plain.target_mask
            found[kind] = locality * (apart.sum(1) / plain.target_mask.sum(1)).mean()
    return found


def _with_facts(records: Sequence[EditRecord], kind: str) -> tuple[list[Probe], list[str]] | None:
    """The probes of one kind, and what the counterfactual model is told before each."""
    probes, texts = [], []
    for record in records:
        own = [probe_of(record.request)] if kind == "edit" else list(getattr(record, kind))
        probes += own
        texts += [Fact(record.request.question, record.request.target).context] * len(own)
    return (probes, texts) if probes else None


def _first(features: Features, count: int) -> Features:
    return Features(features.words[:count], features.image[:count], features.seen[:count])
