"""A clean copy of a file of edit records, and what was changed in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editing.audit import rephrases
from editing.audit.auditing import (
    duplicates,
    image_findings,
    record_findings,
    sorted_out,
    texts_of,
)
from editing.audit.kinds import KINDS, Finding
from editing.datasets import load_items, write_items
from mmtune.data.records import DataError, Problem
from mmtune.runs import write_text

OUTER = "outer blanks"


@dataclass(frozen=True)
class Mend:
    """A text that was changed: why, where, and from what to what."""

    kinds: list[str]
    field: str
    before: str
    after: str


@dataclass(frozen=True)
class Change:
    """What became of one record that is not copied as it stands.

    Attributes:
        record: its number in the file.
        becomes: its number in the copy; None where it is left out.
        because: the defects that it is left out for.
        mends: the texts that were changed, also before it was left out.
    """

    record: int
    becomes: int | None
    because: list[Finding]
    mends: list[Mend]

    def as_json(self) -> dict[str, Any]:
        """One line of the file of changes."""
        reasons = [{"kind": f.kind, "field": f.field, "text": f.text} for f in self.because]
        action = "left out" if self.becomes is None else "mended"
        return {
            "record": self.record,
            "action": action,
            "becomes": self.becomes,
            "because": reasons,
            "mends": [vars(mend) for mend in self.mends],
        }


@dataclass(frozen=True)
class Fixed:
    """A clean copy: its items, and what was done to the records that are not copied as they are."""

    items: list[Any]
    changes: list[Change]

    @property
    def mended(self) -> int:
        """Records that are in the copy with another text."""
        return sum(change.becomes is not None for change in self.changes)

    @property
    def left_out(self) -> int:
        """Records that are not in the copy."""
        return sum(change.becomes is None for change in self.changes)


def fix(
    items: Sequence[Any],
    keep: frozenset[str] = frozenset(),
    images: str | None = None,
    progress: bool = True,
) -> Fixed:
    """Mend what can be mended and leave out what cannot be an edit.

    An audit of the copy finds none of the kinds that are "mended" or "left out". What other data
    could mend alone stays: images shared with another file, locality that training has seen.

    Args:
        items: what stands in the file; it is not changed.
        keep: kinds to leave as they are.
        images: folder of the images; records whose images are missing or broken are left out.
        progress: draw a progress bar over the images.
    """
    well_formed = {n: copy.deepcopy(item) for n, item in sorted_out(items)[0].items()}
    every = [well_formed.get(number, item) for number, item in enumerate(items)]
    mends = {number: _mend(item, keep) for number, item in well_formed.items()}
    good, findings = sorted_out(every)  # mending may leave a text empty, or the target as it was
    findings += [f for number, item in good.items() for f in record_findings(number, item)]
    if images is not None:
        findings += image_findings(good, images, progress)
    because = _fatal(findings, keep)
    left = {number: item for number, item in good.items() if number not in because}
    because |= _fatal(duplicates(left), keep)
    kept = [number for number in range(len(every)) if number not in because]
    becomes = {number: at for at, number in enumerate(kept)}
    changes = [
        Change(n, becomes.get(n), because.get(n, []), mends.get(n, []))
        for n in range(len(every))
        if n in because or mends.get(n)
    ]
    return Fixed([every[number] for number in kept], changes)


def fix_file(
    path: str,
    out: Path,
    keep: frozenset[str] = frozenset(),
    images: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Fixed:
    """Write a clean copy of a file, and its changes beside it; the file itself is not touched.

    Args:
        path: the file.
        out: the copy; `changes_file` says where its changes are.
        keep, images, progress: as in `fix`.
        overwrite: replace a copy that is already there.

    Raises:
        DataError: a file that cannot be read, or of which nothing would be left.
        ValueError: `out` is the file itself, or is there already.
    """
    log = changes_file(out)
    if out.resolve() == Path(path).resolve() or log.resolve() == Path(path).resolve():
        raise ValueError(f"--fix {out} would replace {path}, which was read; choose another name.")
    if not overwrite and (taken := [p for p in (out, log) if p.exists()]):
        raise ValueError(f"{taken[0]} exists; choose another name, or replace it with --overwrite.")
    fixed = fix(load_items(path), keep, images, progress)
    if not fixed.items:
        text = f"all {len(fixed.changes)} records would be left out, so no copy was written"
        raise DataError([Problem(path, "no usable record", text)])
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(change.as_json()) + "\n" for change in fixed.changes]
    write_text(log, "".join(lines))
    write_items(out, fixed.items)
    return fixed


def changes_file(out: Path) -> Path:
    """Where the changes of a copy are written: clean.json -> clean.changes.jsonl."""
    return out.with_suffix(".changes.jsonl")


def _mend(item: dict[str, Any], keep: frozenset[str]) -> list[Mend]:
    """Change the texts of an item in place."""
    mends = []
    for name, place, key in texts_of(item):
        before, kinds = place[key], []
        text = before
        if name == "rephrase":
            text, kinds = rephrases.mend(text, item["src"].strip(), keep)
        if OUTER not in keep and text != text.strip():
            text, kinds = text.strip(), [*kinds, OUTER]
        if text != before:
            place[key] = text
            mends.append(Mend(kinds, name, before, text))
    return mends


def _fatal(findings: Sequence[Finding], keep: frozenset[str]) -> dict[int, list[Finding]]:
    """Record -> the defects that it is left out for."""
    found: dict[int, list[Finding]] = {}
    for finding in findings:
        if KINDS[finding.kind].fix == "left out" and finding.kind not in keep:
            found.setdefault(finding.record, []).append(finding)
    return found
