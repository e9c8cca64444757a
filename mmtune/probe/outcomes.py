"""What became of one item in one style, as a line of the journal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mmtune.metrics.vqa import processed
from mmtune.probe.clients import Reply, Sent
from mmtune.probe.items import Item
from mmtune.probe.parsing import FINAL, PARSERS, parsed


@dataclass(frozen=True)
class Outcome:
    """One reply, read and scored.

    Attributes:
        client, style, item: who was asked what, and how.
        text: that was sent, without examples.
        sent: names the whole request (`Sent.digest`).
        reply: as it came.
        error: why there is none.
        note: what could not be sent as it was meant.
        tries: requests made.
        answer: what the reply was taken to say; None where nothing could be made of it.
        parser: its name.
        right: whether that is the right answer; 0 where there is none; None after an error.
        errors: character error rate of a text that is to be read, in [0, 1] (CER, cut at 1).
        likeness: its normalised Levenshtein similarity, 0 below a half (ANLS).
        contradicts: whether the reasoning before the answer says another answer; None where there
            is none, or it says nothing.
    """

    client: str
    style: str
    item: str
    text: str
    sent: str
    reply: str
    error: str = ""
    note: str = ""
    tries: int = 1
    answer: str | None = None
    parser: str = ""
    right: int | None = None
    errors: float | None = None
    likeness: float | None = None
    contradicts: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """As a line of the journal has it."""
        return asdict(self)


def outcome_of(client: str, style: str, item: Item, sent: Sent, reply: Reply) -> Outcome:
    """Read and score a reply."""
    known: dict[str, Any] = {
        "client": client, "style": style, "item": item.id, "text": sent.text,
        "sent": sent.digest(),
        "reply": reply.text, "error": reply.error, "note": reply.note, "tries": reply.tries,
    }  # fmt: skip
    if reply.error:
        return Outcome(**known)
    found = parsed(item, reply.text)
    known |= {
        "answer": found.answer,
        "parser": found.parser,
        "right": int(_right(item, found.answer)),
    }
    if item.kind == "text":
        distances = [distance(found.answer or "", one) for one in (item.answer, *item.answers)]
        sizes = [max(len(one), 1) for one in (item.answer, *item.answers)]
        longest = [max(len(found.answer or ""), n) for n in sizes]
        near = 1 - min(d / n for d, n in zip(distances, longest, strict=True))
        known["errors"] = min(min(d / n for d, n in zip(distances, sizes, strict=True)), 1.0)
        known["likeness"] = near if near >= 0.5 else 0.0
    known["contradicts"] = _contradicts(item, reply.text, found.answer)
    return Outcome(**known)


def _right(item: Item, answer: str | None) -> bool:
    if answer is None:
        return False
    wanted = (item.answer, *item.answers)
    if item.kind == "text":
        return answer.casefold() in {one.casefold() for one in wanted}
    if item.kind == "choice":
        return answer == item.answer
    return processed(answer) in {processed(one) for one in wanted}


def _contradicts(item: Item, reply: str, answer: str | None) -> bool | None:
    """Whether what stands before the last "Answer:" ends in another answer."""
    ends = [match.start() for match in FINAL.finditer(reply)]
    if not ends or answer is None or item.kind in ("text", "words"):
        return None
    sentences = [s for s in reply[: ends[-1]].replace("\n", ". ").split(".") if s.strip()]
    parse = PARSERS[item.kind][1]
    said = next((s for s in (parse(item, t) for t in reversed(sentences)) if s), None)
    return None if said is None else said != answer


def distance(first: str, second: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions that make one text of another."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]
