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
from typing import TYPE_CHECKING, Any

import torch

from editing.datasets import StandIn
from editing.evaluation.asking import (
    KINDS,
    LOCALITY,
    Asked,
    Chunk,
    Said,
    Unedited,
    asked_of,
    said_of,
)
from editing.metrics import mmedit
from editing.metrics.aggregate import Score, joined_score
from editing.metrics.answers import answer_scores, generated_match
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
from editing.requests import EditRecord
from editing.weight_edits import WeightEdit
from mmtune.data.records import ImageFile
from mmtune.metrics.vqa import processed

if TYPE_CHECKING:
    from editing.edits import Edit
    from editing.mllm import MLLM
    from mmtune.data.records import MediaRef

__all__ = ["KINDS", "LOCALITY", "asked_of"]
UNCHANGED = Definition(
    "unchanged answer",
    "the greedily written answer is the same before and after, apart from case, punctuation and "
    "articles",
)
Found = dict[Kind, list[dict[str, Any]]]


def definitions_for(kind: Kind, compat: Sequence[Compat] = ()) -> tuple[Definition, ...]:
    """The definitions that a kind of metric is scored in, the one to quote first."""
    extra = (UNCHANGED,) if kind in LOCALITY else ()
    return (*definitions_of(kind), *extra, *(d for c in compat for d in definitions_of(kind, c)))


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
    mllm: MLLM,
    records: Sequence[EditRecord],
    compat: Sequence[Compat] = (),
    unedited: Unedited | None = None,
) -> list[Found]:
    """What the unedited model makes of records, in one batch; one outcome each, as JSON has it.

    Locality is that of the model against itself: everything agrees.

    Args:
        mllm: the model.
        records: what is asked.
        compat: definitions to add.
        unedited: keeps what is needed of it again, for `edited_outcomes`.
    """
    chunk = (unedited or Unedited(mllm, bool(compat))).about(records)
    said = chunk.answered()
    return _outcomes(chunk, said, said, None, compat)


@torch.no_grad()
def edited_outcomes(
    mllm: MLLM,
    records: Sequence[EditRecord],
    edit: Edit | None,
    before: Sequence[Found],
    compat: Sequence[Compat] = (),
    unedited: Unedited | None = None,
) -> list[Found]:
    """What the model makes of records under an edit, in one batch.

    Args:
        mllm: the model, without the edit.
        records: what is asked.
        edit: what is applied meanwhile; None for none.
        before: of the unedited model, as `base_outcomes` gives it.
        compat: definitions to add.
        unedited: what several editors share; None where this is the only one.

    Returns:
        record by record, kind -> probes with question, answer, what was written before and after,
        and definition -> [total, n] or None.

    Raises:
        ValueError: the edited model's scores are no numbers; a prompt that the model cannot read.
    """
    chunk = (unedited or Unedited(mllm, bool(compat))).about(records)
    changed = edit.changes if isinstance(edit, WeightEdit) else ()
    with nullcontext() if edit is None else edit.applied(mllm):
        hooked = mllm.hooked
        # An edit that is no change of weights may put text in front of the questions.
        fresh = edit is not None and not isinstance(edit, WeightEdit)
        batch = mllm.batch(chunk.probes).packed() if fresh else chunk.batch(changed)
        after = said_of(mllm, batch, chunk.asked, bool(compat))
    untouched = chunk.untouched(changed, hooked)
    return _outcomes(chunk, untouched, after, before, compat)


def kind_scores(found: Mapping[str, Any], kind: Kind, definition: Definition) -> Score | None:
    """A record's score: over the tokens, or the answers, of all of its probes of that kind."""
    pairs = [probe["scores"].get(definition.name) for probe in found.get(kind, ())]
    return joined_score([Score(*pair) if pair else None for pair in pairs])


def _outcomes(
    chunk: Chunk,
    untouched: Said,
    after: Said,
    before: Sequence[Found] | None,
    compat: Sequence[Compat],
) -> list[Found]:
    assert after.written is not None
    earlier = after.written
    if before is not None:
        earlier = [p["after"] for found in before for kind in found for p in found[kind]]
    scores = _scores(chunk.asked, untouched, after, earlier, compat)
    lines = [
        {
            "question": one.probe.question,
            "answer": one.probe.answer,
            "before": earlier[i],
            "after": after.written[i],
            "scores": {d.name: [s.total, s.n] if s else None for d, s in scores[i].items()},
        }
        for i, one in enumerate(chunk.asked)
    ]
    return list(_by_record(chunk.records, chunk.asked, lines))


def _scores(
    asked: Sequence[Asked],
    untouched: Said,
    after: Said,
    earlier: Sequence[str],
    compat: Sequence[Compat],
) -> list[dict[Definition, Score | None]]:
    assert after.tokens is not None
    quality = answer_scores(after.tokens)
    local = locality_scores(untouched.local, after.local)
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
