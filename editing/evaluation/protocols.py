"""Single, sequential and batch editing of records by one editor, a line on disk for each record.

A run that was stopped at any moment goes on to the same lines: what an edit draws follows from the
record, and an edit that grows is read back from disk whenever it is written.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from editing.edits import load
from editing.evaluation.asking import Unedited
from editing.evaluation.journal import Journal, Line, in_words
from editing.evaluation.outcomes import Found, base_outcomes, edited_outcomes, image_key
from mmtune.backbones.base import SiteError
from mmtune.data.records import DataError
from mmtune.runs import RunError

if TYPE_CHECKING:
    from editing.config import ProtocolOptions
    from editing.edits import Edit
    from editing.methods.base import Editor
    from editing.mllm import MLLM
    from editing.requests import EditRecord

RECORDS, EDITS, GROWING, SAVED = "records.jsonl", "edits.jsonl", "growing", "edits"
NUMBERS = (int, float)  # of `Edit.about`: how it went; what was asked and how the config says


@dataclass(frozen=True)
class Bench:
    """What all editors of a run share.

    Attributes:
        mllm: the model, unedited.
        records: in order.
        protocol: how edits are made and scored.
        seed: of the run.
        base: record id -> its line about the unedited model.
        unedited: what it says about records at work.
    """

    mllm: MLLM
    records: Sequence[EditRecord]
    protocol: ProtocolOptions
    seed: int
    base: dict[str, Line]
    unedited: Unedited

    def problem(self, record: EditRecord) -> str | None:
        """Why a record is edited by nobody."""
        error = self.base[record.id].get("error")
        return f"the unedited model could not be asked: {error}" if error else None


@dataclass(frozen=True)
class Row:
    """One editor of a run: its row's name, and the folder that is its own."""

    name: str
    editor: Editor
    folder: Path

    def line(self, record: EditRecord, count: int) -> Line:
        """What every line about a record begins with."""
        return {"editor": self.name, "count": count, **head(record)}


def head(record: EditRecord) -> Line:
    """Which record a line is about."""
    return {"record": record.id, "where": record.where, "image": image_key(record)}


def groups(count: int, size: int) -> Iterator[range]:
    """Numbers of the records of each whole group of `size`."""
    for start in range(0, count - size + 1, size):
        yield range(start, start + size)


def wanted(protocol: ProtocolOptions, count: int) -> list[tuple[int, int]]:
    """(number of edits, number of a record) of every line that a finished row has."""
    if protocol.kind == "batch":
        return [(n, i) for n in protocol.numbers for group in groups(count, n) for i in group]
    if protocol.kind == "sequential":
        return [(n, i) for n in protocol.numbers for i in range(n)]
    return [(1, i) for i in range(count)]


def unedited_of(mllm: MLLM, protocol: ProtocolOptions) -> Unedited:
    """What the unedited model says, as editors of a protocol need it."""
    return Unedited(mllm, bool(protocol.compat), again=protocol.kind == "single")


def ask_base(
    unedited: Unedited, records: Sequence[EditRecord], protocol: ProtocolOptions, to: Path
) -> None:
    """Write a line about the unedited model for each record that has none."""
    journal = Journal(to)
    done = {line["record"] for line in journal.lines}
    size = 1 if protocol.kind == "single" else protocol.batch_size
    with tqdm(total=len(records), initial=len(done), desc="unedited", disable=None) as bar:
        for start in range(0, len(records), size):
            chunk = records[start : start + size]
            if all(record.id in done for record in chunk):
                continue
            for record, found in zip(chunk, _base(unedited, chunk, protocol), strict=True):
                if record.id not in done:
                    journal.add({**head(record), **found})
                    bar.update()


def run_rows(bench: Bench, rows: Sequence[Row]) -> None:
    """Edit and score what is not on disk yet.

    Where each record is edited by itself every editor edits it before the next one comes, so that
    what they share is computed once.

    Raises:
        RunError: an editor cannot be used on this model at all.
    """
    for row in rows:
        for leftover in row.folder.glob("*/.*.partial-*"):
            shutil.rmtree(leftover)
    if bench.protocol.kind == "single":
        _single(bench, rows)
        return
    run = {"sequential": _sequential, "batch": _batch}[bench.protocol.kind]
    every = len(wanted(bench.protocol, len(bench.records)))
    for row in rows:
        journal = Journal(row.folder / RECORDS)
        with tqdm(total=every, initial=len(journal.lines), desc=row.name, disable=None) as bar:
            run(bench, row, journal, bar)


def _single(bench: Bench, rows: Sequence[Row]) -> None:
    journals = {row.name: Journal(row.folder / RECORDS) for row in rows}
    done = {(n, line["record"]) for n, journal in journals.items() for line in journal.lines}
    every = len(bench.records) * len(rows)
    with tqdm(total=every, initial=len(done), desc="edits", disable=None) as bar:
        for number, record in enumerate(bench.records):
            for row in rows:
                if (row.name, record.id) in done:
                    continue
                made = _made(bench, row, None, [record])
                line = row.line(record, 1) | made.line
                if made.edit is not None:
                    _keep(bench, row, made.edit, f"{number:06d}")
                    line |= _scored(bench, [record], made.edit)[0]
                journals[row.name].add(line)
                bar.update()


def _sequential(bench: Bench, row: Row, journal: Journal, bar: tqdm) -> None:
    numbers = bench.protocol.numbers
    last = numbers[-1]
    log = Journal(row.folder / EDITS)
    done, edit = _grown(row.folder / GROWING, bench, log)
    if done in numbers:
        _score_all(bench, row, log, edit, done, journal, bar)
    for record in bench.records[done:last]:
        made = _made(bench, row, edit, [record])
        log.add({"editor": row.name, "number": done + 1, **head(record), **made.line})
        edit = made.edit or edit
        done += 1
        if done in numbers or done % bench.protocol.save_every == 0:
            edit = _written(row.folder / GROWING, edit, done)
        if done in numbers:
            _score_all(bench, row, log, edit, done, journal, bar)
    shutil.rmtree(row.folder / GROWING, ignore_errors=True)


def _score_all(
    bench: Bench,
    row: Row,
    log: Journal,
    edit: Edit | None,
    count: int,
    journal: Journal,
    bar: tqdm,
) -> None:
    """Score the first `count` records, all of which are edited now."""
    if edit is not None:
        _keep(bench, row, edit, f"{count:06d}")
    logged = {line["record"]: line for line in log.lines}
    notes = {r.id: _about(logged[r.id]) for r in bench.records[:count]}
    _score(bench, row, range(count), edit, count, notes, journal, bar)


def _batch(bench: Bench, row: Row, journal: Journal, bar: tqdm) -> None:
    done = {(line["count"], line["record"]) for line in journal.lines}
    for size in bench.protocol.numbers:
        for number, group in enumerate(groups(len(bench.records), size)):
            records = [bench.records[i] for i in group]
            if all((size, record.id) in done for record in records):
                continue
            good = [r for r in records if bench.problem(r) is None]
            made = _made(bench, row, None, good or records[:1])
            if made.edit is not None:
                _keep(bench, row, made.edit, f"{size:06d}-{number:06d}")
            notes = {r.id: {"error": p} if (p := bench.problem(r)) else made.line for r in records}
            _score(bench, row, group, made.edit, size, notes, journal, bar)


def _score(
    bench: Bench,
    row: Row,
    numbers: range,
    edit: Edit | None,
    count: int,
    notes: dict[str, Line],
    journal: Journal,
    bar: tqdm,
) -> None:
    """Score some records under one edit, several at once, and write a line for each.

    Args:
        bench, row: what is run.
        numbers: of the records.
        edit: that is applied.
        count: edits that are in it.
        notes: record id -> what its line says about the edit; with an error it is not asked.
        journal: to write to; what is there is kept.
        bar: to move.
    """
    done = {line["record"] for line in journal.lines if line["count"] == count}
    size = bench.protocol.batch_size
    for start in range(numbers.start, numbers.stop, size):
        chunk = [bench.records[i] for i in range(start, min(start + size, numbers.stop))]
        if all(record.id in done for record in chunk):
            continue
        asked = [r for r in chunk if "error" not in notes[r.id]]
        found = dict(zip((r.id for r in asked), _scored(bench, asked, edit), strict=True))
        for record in chunk:
            if record.id not in done:
                own = notes[record.id] | found.get(record.id, {})
                journal.add(row.line(record, count) | own)
                bar.update()


@dataclass(frozen=True)
class _Made:
    """An edit, or None, and what a line says about how it was made."""

    edit: Edit | None
    line: Line


def _made(bench: Bench, row: Row, grown: Edit | None, records: Sequence[EditRecord]) -> _Made:
    """One edit of these records; with `grown`, on top of it."""
    problem = bench.problem(records[0])
    if problem:
        return _Made(None, {"error": problem})
    requests = [record.request for record in records]
    generator = _generator(bench.seed, row.editor.settings.seed, [r.id for r in records])
    begun = _now(bench.mllm)
    try:
        if grown is None:
            edit = row.editor.edit(bench.mllm, requests, generator)
        else:
            edit = row.editor.extend(bench.mllm, grown, requests, generator)
    except Exception as error:
        if _hopeless(error):
            raise RunError(f"editors.{row.name} cannot be used here: {error}") from error
        return _Made(None, {"error": in_words(error)})
    seconds = (_now(bench.mllm) - begun) / len(requests)
    about = {key: value for key, value in edit.about.items() if isinstance(value, NUMBERS)}
    return _Made(edit, {"seconds": seconds, "edit": about})


def _base(unedited: Unedited, chunk: Sequence[EditRecord], protocol: ProtocolOptions) -> list[Line]:
    try:
        outcomes = base_outcomes(unedited.mllm, chunk, protocol.compat, unedited)
        return [{"probes": found} for found in outcomes]
    except Exception as error:
        if len(chunk) == 1:
            return [{"error": in_words(error)}]
    return [line for record in chunk for line in _base(unedited, [record], protocol)]


def _scored(bench: Bench, records: Sequence[EditRecord], edit: Edit | None) -> list[Line]:
    """{probes} or {error} of each record; one that fails is asked alone and fails alone."""
    if not records:
        return []
    before: list[Found] = [bench.base[record.id]["probes"] for record in records]
    try:
        compat = bench.protocol.compat
        found = edited_outcomes(bench.mllm, records, edit, before, compat, bench.unedited)
        return [{"probes": probes} for probes in found]
    except Exception as error:
        if _hopeless(error):
            raise
        if len(records) == 1:
            return [{"error": in_words(error)}]
    return [line for record in records for line in _scored(bench, [record], edit)]


def _hopeless(error: Exception) -> bool:
    """Whether an editor would fail on every record alike: it lacks a place, or files of its own."""
    from editing.meta.base import TrainedError

    return isinstance(error, SiteError | TrainedError | DataError)


def _generator(*of: Any) -> torch.Generator:
    """A generator that is the same for the same values."""
    digest = hashlib.sha256(repr(of).encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _now(mllm: MLLM) -> float:
    if mllm.device.type == "cuda":
        torch.cuda.synchronize(mllm.device)
    return time.perf_counter()


def _keep(bench: Bench, row: Row, edit: Edit, name: str) -> None:
    if bench.protocol.save_edits:
        edit.save(row.folder / SAVED / name)


def _about(line: Line) -> Line:
    return {key: line[key] for key in ("seconds", "edit", "error") if key in line}


def _written(folder: Path, edit: Edit | None, done: int) -> Edit | None:
    """Write the growing edit, and go on with what was written, as a run that was stopped does."""
    if edit is None:
        return None
    here = folder / f"{done:06d}"
    edit.save(here)
    for other in _versions(folder):
        if other != here:
            shutil.rmtree(other)
    return load(here)


def _grown(folder: Path, bench: Bench, log: Journal) -> tuple[int, Edit | None]:
    """(edits made, what they grew to) of a run that was stopped; its log is cut to these."""
    found = _versions(folder)
    done = int(found[-1].name) if found else 0
    if done > len(log.lines):
        raise RunError(f"{log.path} is shorter than {found[-1]}: start again with --overwrite.")
    log.keep(done)
    return done, load(found[-1]) if found else None


def _versions(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[0-9]*") if (p / "edit.json").is_file())
