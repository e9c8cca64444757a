"""What a model, edited or not, makes of a record: answers, and a score for every definition.

Locality compares distributions at the tokens of the answer that the data gives, under teacher
forcing, as the published definitions do. That answer is the same for every model and editor, so
numbers can be compared; what the unedited model itself writes would measure each model on texts of
its own, and where it writes nothing sensible, on nonsense. Whether that text changed is counted
beside it, by `UNCHANGED`, and both texts are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch

from editing.batches import probe_of
from editing.datasets import StandIn
from editing.metrics import mmedit
from editing.metrics.aggregate import Score, joined_score
from editing.metrics.answers import AnswerTokens, answer_scores, generated_match
from editing.metrics.definitions import (
    GENERATED,
    MMEDIT_ACCURACY,
    MMEDIT_IMAGE_LOCALITY,
    MMEDIT_TEXT_LOCALITY,
    TOKEN_ACCURACY,
    Compat,
    Definition,
    Kind,
    definitions_of,
)
from editing.metrics.locality import locality_scores
from editing.requests import EditRecord, Probe
from editing.weight_edits import WeightEdit
from mmtune.data.records import ImageFile
from mmtune.metrics.vqa import processed

if TYPE_CHECKING:
    from torch import Tensor

    from editing.batches import Batch
    from editing.edits import Edit
    from editing.mllm import MLLM
    from mmtune.data.records import MediaRef

KINDS: tuple[Kind, ...] = get_args(Kind)
LOCALITY: tuple[Kind, ...] = ("text_locality", "image_locality")
UNCHANGED = Definition(
    "unchanged answer",
    "the greedily written answer is the same before and after, apart from case, punctuation and "
    "articles",
)
Found = dict[Kind, list[dict[str, Any]]]


@dataclass(frozen=True)
class Asked:
    """A probe of a record, and the kind of metric that it is for."""

    kind: Kind
    probe: Probe


@dataclass(frozen=True)
class Said:
    """What a model made of some probes.

    Attributes:
        written: its answers; None where they are known already.
        tokens: the answers' tokens with the scores from which each is predicted.
        sequences: number of a probe of locality -> [1, s, v] scores of its whole sequence, where
            they are asked for and there are any.
    """

    written: list[str] | None
    tokens: AnswerTokens
    sequences: Mapping[int, Tensor]


def definitions_for(kind: Kind, compat: Sequence[Compat] = ()) -> tuple[Definition, ...]:
    """The definitions that a kind of metric is scored in, the one to quote first."""
    extra = (UNCHANGED,) if kind in LOCALITY else ()
    return (*definitions_of(kind), *extra, *(d for c in compat for d in definitions_of(kind, c)))


def asked_of(record: EditRecord) -> list[Asked]:
    """The probes of a record: the request itself first; answers are stripped, as targets are."""
    found = [Asked("reliability", probe_of(record.request))]
    for kind in KINDS[1:]:
        for probe in getattr(record, kind):
            found.append(Asked(kind, replace(probe, answer=probe.answer.strip())))
    return found


def image_key(record: EditRecord) -> str:
    """Names the image that a record edits: records that share it are drawn together."""
    return media_key(record.request.image) or f"record {record.id}"


def media_key(ref: MediaRef | None) -> str:
    """Names an image: its path, or a hash of its bytes; empty for none."""
    if ref is None:
        return ""
    if isinstance(ref, ImageFile):
        return ref.stands_for if isinstance(ref, StandIn) else ref.name
    return hashlib.sha256(ref.read()).hexdigest()[:16]  # type: ignore[union-attr]


def base_outcomes(
    mllm: MLLM, records: Sequence[EditRecord], compat: Sequence[Compat] = ()
) -> list[Found]:
    """What the unedited model makes of records, in one batch; one outcome each, as JSON has it.

    Locality is that of the model against itself: everything agrees.
    """
    return _outcomes(mllm, records, None, None, compat)


def edited_outcomes(
    mllm: MLLM,
    records: Sequence[EditRecord],
    edit: Edit | None,
    before: Sequence[Found],
    compat: Sequence[Compat] = (),
) -> list[Found]:
    """What the model makes of records under an edit, in one batch.

    Args:
        mllm: the model, without the edit.
        records: what is asked.
        edit: what is applied meanwhile; None for none.
        before: of the unedited model, as `base_outcomes` gives it.
        compat: definitions to add.

    Returns:
        record by record, kind -> probes with question, answer, what was written before and after,
        and definition -> [total, n] or None.

    Raises:
        ValueError: the edited model's scores are no numbers; a prompt that the model cannot read.
    """
    return _outcomes(mllm, records, edit, before, compat)


def kind_scores(found: Mapping[str, Any], kind: Kind, definition: Definition) -> Score | None:
    """A record's score: over the tokens, or the answers, of all of its probes of that kind."""
    pairs = [probe["scores"].get(definition.name) for probe in found.get(kind, ())]
    return joined_score([Score(*pair) if pair else None for pair in pairs])


@torch.no_grad()
def _outcomes(
    mllm: MLLM,
    records: Sequence[EditRecord],
    edit: Edit | None,
    before: Sequence[Found] | None,
    compat: Sequence[Compat],
) -> list[Found]:
    asked = [one for record in records for one in asked_of(record)]
    probes = [one.probe for one in asked]
    batch = mllm.batch(probes)
    if isinstance(edit, WeightEdit):  # the same prompts: computed once below what it changes
        batch = mllm.cached(batch, edit.changes)
    untouched = _said(mllm, batch, asked, compat, write=before is None)
    after = untouched
    if before is not None:
        with nullcontext() if edit is None else edit.applied(mllm):
            if not isinstance(edit, WeightEdit):
                batch = mllm.batch(probes)  # it may put text in front of the questions
            after = _said(mllm, batch, asked, compat, write=True)
    assert after.written is not None
    earlier = after.written
    if before is not None:
        earlier = [p["after"] for found in before for kind in found for p in found[kind]]
    scores = _scores(asked, untouched, after, earlier, compat)
    lines = [
        {
            "question": one.probe.question,
            "answer": one.probe.answer,
            "before": earlier[i],
            "after": after.written[i],
            "scores": {d.name: [s.total, s.n] if s else None for d, s in scores[i].items()},
        }
        for i, one in enumerate(asked)
    ]
    return list(_by_record(records, asked, lines))


def _said(
    mllm: MLLM, batch: Batch, asked: Sequence[Asked], compat: Sequence[Compat], write: bool
) -> Said:
    logits = mllm.answer_logits(batch)
    tokens = AnswerTokens.of_targets(logits, batch.target_ids, batch.answer_mask)
    if bool(tokens.logits.isnan().any()):
        raise ValueError("the model's scores are no numbers (NaN): the edit broke it")
    sequences = {}
    if compat:
        for number, one in enumerate(asked):
            if one.kind in LOCALITY:
                try:
                    own = mllm.sequences(mllm.batch([one.probe]))
                except TypeError:
                    continue
                sequences[number] = own.logits
    return Said(mllm.answer(batch) if write else None, tokens, sequences)


def _scores(
    asked: Sequence[Asked],
    untouched: Said,
    after: Said,
    earlier: Sequence[str],
    compat: Sequence[Compat],
) -> list[dict[Definition, Score | None]]:
    quality = answer_scores(after.tokens)
    local = locality_scores(untouched.tokens, after.tokens)
    assert after.written is not None
    found: list[dict[Definition, Score | None]] = []
    for number, one in enumerate(asked):
        written, answer = after.written[number], one.probe.answer
        own: dict[Definition, Score | None] = {}
        if one.kind in LOCALITY:
            own |= {d: scores[number] for d, scores in local.items()}
            own[UNCHANGED] = Score(float(_same(written, earlier[number])), 1)
        own[GENERATED] = generated_match(written, answer)
        own |= {d: scores[number] for d, scores in quality.items()}
        if compat:
            own |= _compatible(one.kind, number, untouched, after, own[TOKEN_ACCURACY])
        found.append(own)
    return found


def _compatible(
    kind: Kind, number: int, untouched: Said, after: Said, accuracy: Score | None
) -> dict[Definition, Score | None]:
    """Published definitions; locality is missing where an edit has no whole sequences."""
    if kind not in LOCALITY:
        return {MMEDIT_ACCURACY: accuracy}
    first, second = untouched.sequences.get(number), after.sequences.get(number)
    text = kind == "text_locality"
    definition = MMEDIT_TEXT_LOCALITY if text else MMEDIT_IMAGE_LOCALITY
    if first is None or second is None:
        return {definition: None}
    top = mmedit.TEXT_TOP if text else mmedit.IMAGE_TOP
    return {definition: mmedit.ordered_top(first, second, top)[0]}


def _same(first: str, second: str) -> bool:
    """Whether two written answers are compared as one; those of punctuation alone as they are."""
    return first == second or ("" != processed(first) == processed(second))


def _by_record(
    records: Sequence[EditRecord], asked: Sequence[Asked], lines: Sequence[dict[str, Any]]
) -> Iterator[Found]:
    at = 0
    for record in records:
        found: Found = {}
        count = len(asked_of(record))
        for one, line in zip(asked[at : at + count], lines[at : at + count], strict=True):
            found.setdefault(one.kind, []).append(line)
        at += count
        yield found
