"""Edits to look at: what was asked, what came back, and what became of their neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editing.evaluation.outcomes import LOCALITY, UNCHANGED, asked_of, media_key
from editing.metrics.definitions import GENERATED
from mmtune.data.images import load_image
from mmtune.data.records import ImageProblem
from mmtune.report.pictures import Pictures, is_wide

if TYPE_CHECKING:
    from editing.evaluation.journal import Line
    from editing.requests import EditRecord

BLOCKS = 24  # edits of one editor each that a page shows
LABELS = {
    "reliability": "the edit itself",
    "text_generality": "in other words",
    "image_generality": "another image of it",
    "text_locality": "no image: must stay",
    "image_locality": "other image: must stay",
    "portability": "what follows from it",
}


def gallery(
    records: Sequence[EditRecord], rows: Mapping[str, Sequence[Line]], pictures: Pictures
) -> list[dict[str, Any]]:
    """What `report/edit.html` shows of some records, chosen so that outcomes of every kind appear.

    Args:
        records: of the run.
        rows: name of a row -> its lines; those after the most edits are shown.
        pictures: makes pictures into text.
    """
    last = max((line["count"] for lines in rows.values() for line in lines), default=1)
    by_record = {
        name: {line["record"]: line for line in lines if line["count"] == last}
        for name, lines in rows.items()
    }
    known = {record.id: record for record in records}
    first = next(iter(by_record.values()), {})
    chosen = _varied(list(first.values()), max(3, BLOCKS // max(len(rows), 1)))
    return [
        _item(known[line["record"]], by_record, pictures)
        for line in chosen
        if line["record"] in known
    ]


def right(kind: str, probe: Mapping[str, Any]) -> bool:
    """Whether the written answer after the edit is what it should be: the target, or as before."""
    wanted = UNCHANGED if kind in LOCALITY else GENERATED
    return probe["scores"][wanted.name][0] == 1


def _varied(lines: Sequence[Line], most: int) -> list[Line]:
    """Some lines, taking turns between those with the same outcome; in their order."""
    alike: dict[Any, list[int]] = {}
    for number, line in enumerate(lines):
        kinds = line.get("probes", {})
        outcome = tuple((k, all(right(k, p) for p in probes)) for k, probes in kinds.items())
        alike.setdefault(outcome, []).append(number)
    turns = sorted((turn, number) for group in alike.values() for turn, number in enumerate(group))
    return [lines[number] for number in sorted(number for _, number in turns[:most])]


def _item(
    record: EditRecord, rows: Mapping[str, Mapping[str, Line]], pictures: Pictures
) -> dict[str, Any]:
    image, shown = _picture(record.request.image, pictures)
    uris = {media_key(record.request.image): ""}  # shown once, above
    others = []
    for one in asked_of(record)[1:]:
        key = media_key(one.probe.image)
        if key not in uris:
            uris[key] = _picture(one.probe.image, pictures)[0]
            others.append({"uri": uris[key], "label": LABELS[one.kind]})
    blocks = []
    for name, lines in rows.items():
        line = lines.get(record.id)
        if line is not None:
            blocks.append(
                {"name": name, "error": line.get("error", ""), "cells": _cells(record, line)}
            )
    return {
        "id": record.id,
        "uri": image,
        "wide": shown,
        "question": record.request.question,
        "target": record.request.target.strip(),
        "others": [other for other in others if other["uri"]],
        "blocks": blocks,
    }


def _cells(record: EditRecord, line: Line) -> list[dict[str, Any]]:
    found = []
    for kind, probes in line.get("probes", {}).items():
        for probe in probes:
            found.append(
                {
                    "label": LABELS[kind],
                    "question": probe["question"],
                    "before": probe["before"],
                    "after": probe["after"],
                    "frame": "right" if right(kind, probe) else "wrong",
                    "wanted": probe["answer"] if kind == "portability" else "",
                }
            )
    return found


def _picture(ref: Any, pictures: Pictures) -> tuple[str, bool]:
    """A picture as text, and whether it is wide; empty where there is none or it is spoilt."""
    if ref is None:
        return "", False
    try:
        image = load_image(ref)
    except ImageProblem:
        return "", False
    return pictures.uri(image), is_wide(image)
