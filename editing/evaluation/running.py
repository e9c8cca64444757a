"""`mmtune edit`: does what is missing of an evaluation, and writes what is known."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from editing.config import EditConfig, row_document, to_yaml
from editing.evaluation.journal import Journal, Line
from editing.evaluation.page import write_pages
from editing.evaluation.protocols import (
    RECORDS,
    Bench,
    Row,
    ask_base,
    run_rows,
    unedited_of,
    wanted,
)
from editing.evaluation.summary import Report, summed_up
from editing.loading import mllm_of, records_of
from editing.methods.base import editor
from mmtune.runs import RunError, files_named_in, manifest, sha256, write_json, write_text

if TYPE_CHECKING:
    from editing.mllm import MLLM
    from editing.requests import EditRecord
    from mmtune.data.checking import Checked

log = logging.getLogger(__name__)
CONFIG, MANIFEST, BASE, ROWS = "config.yaml", "manifest.json", "base.jsonl", "editors"
RESULTS = "results.json"


def evaluate(
    config: EditConfig, runs: Path, overwrite: bool = False, mllm: MLLM | None = None
) -> Report:
    """Edit and score every record with every editor; write results.json, report.html and report.md.

    What is on disk already is kept, so that the same call goes on where another one stopped; an
    editor whose settings changed starts again.

    Args:
        config: the evaluation.
        runs: folder of run folders; everything is written into runs/NAME.
        overwrite: begin afresh, whatever is there.
        mllm: the model, where it is loaded already.

    Raises:
        RunError: the folder holds something else; the model or an editor cannot be used at all.
        DataError: bad records.
        ValueError: a model that cannot be loaded, an editor that was not trained.
    """
    root = runs / config.name
    _check(root, config, overwrite)
    rows = {
        name: Row(name, editor(row.editor, row.options), root / ROWS / name)
        for name, row in config.editors.items()
    }
    data = records_of(config.data)
    _check_counts(config, len(data.records))
    _check_data(root, data, overwrite)
    if overwrite:
        shutil.rmtree(root, ignore_errors=True)
    _begin(root, config, rows)
    try:
        base = _run(root, config, data.records, rows, mllm)
    except KeyboardInterrupt:
        log.warning("what is finished is kept in %s; the same command goes on with the rest", root)
        raise
    lines = {name: Journal(row.folder / RECORDS).lines for name, row in rows.items()}
    report = summed_up(config, data.records, base, lines, _left_out(data))
    write_json(root / RESULTS, report.as_json())
    write_pages(report, data.records, lines, root)
    return report


def _run(
    root: Path,
    config: EditConfig,
    records: Sequence[EditRecord],
    rows: Mapping[str, Row],
    mllm: MLLM | None,
) -> dict[str, Line]:
    """Whatever is missing; a model is loaded only for that. Returns record id -> its base line."""
    missing = [row for row in rows.values() if not _finished(row, config, records)]
    unedited = None
    if missing or not (root / MANIFEST).exists():
        mllm = mllm_of(config.model) if mllm is None else mllm
        if not (root / MANIFEST).exists():
            files = files_named_in(config.data)
            found = manifest(config.seed, str(mllm.device), files, sys.argv)
            write_json(root / MANIFEST, found)
        unedited = unedited_of(mllm, config.protocol)
        ask_base(unedited, records, config.protocol, root / BASE)
    base = {line["record"]: line for line in Journal(root / BASE).lines}
    if all("error" in line for line in base.values()):
        first = next(iter(base.values()))
        raise RunError(
            f"{config.model.name} could be asked about none of {len(records):,} records, which "
            f"are left out: {first['where']}: {first['error']}"
        )
    if missing:
        assert mllm is not None
        assert unedited is not None
        run_rows(Bench(mllm, records, config.protocol, config.seed, base, unedited), missing)
    return base


def _finished(row: Row, config: EditConfig, records: Sequence[EditRecord]) -> bool:
    every = {(n, records[i].id) for n, i in wanted(config.protocol, len(records))}
    return every <= {(x["count"], x["record"]) for x in Journal(row.folder / RECORDS).lines}


def _check(root: Path, config: EditConfig, overwrite: bool) -> None:
    """RunError where the folder holds something else than this evaluation."""
    if not root.exists() or not any(root.iterdir()):
        return
    file = root / CONFIG
    then = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(then, dict) or "editors" not in then or "protocol" not in then:
        raise RunError(
            f"{root} exists and holds no evaluation of edits, so it is left alone. "
            "Choose another name with name=NAME."
        )
    now = yaml.safe_load(to_yaml(config))
    changed = [
        text
        for key in ("seed", "model", "data", "protocol")
        for text in _differences(then.get(key), now[key], key)
    ]
    if changed and not overwrite:
        raise RunError(
            f"{root} holds an evaluation with another config: {'; '.join(changed[:5])}. Go on with "
            "the same one, replace it with --overwrite, or use name=NAME for another folder."
        )


def _differences(then: Any, now: Any, key: str) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            text
            for name in {**then, **now}
            for text in _differences(then.get(name), now.get(name), f"{key}.{name}")
        ]
    return [] if then == now else [f"{key}: {then!r} -> {now!r}"]


def _check_counts(config: EditConfig, records: int) -> None:
    most = max(config.protocol.numbers)
    if most > records:
        fitting = [n for n in config.protocol.numbers if n < records]
        raise RunError(
            f"protocol.counts has {most:,}, and there are {records:,} records. Set "
            f"protocol.counts={[*fitting, records]}, or read more of them (data.limit)."
        )


def _check_data(root: Path, data: Checked, overwrite: bool) -> None:
    """RunError where the records on disk are of another file than before."""
    import json

    file = root / MANIFEST
    if overwrite or not file.exists():
        return
    known = json.loads(file.read_text(encoding="utf-8"))["data"]
    for path in map(Path, data.files):
        if str(path) in known and known[str(path)]["sha256"] != sha256(path):
            raise RunError(
                f"{path} changed since {root} was begun: replace that with --overwrite, or use "
                "name=NAME for another folder."
            )


def _begin(root: Path, config: EditConfig, rows: Mapping[str, Row]) -> None:
    """Write the config, and delete what editors with other settings did."""
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / CONFIG, to_yaml(config))
    for name, row in rows.items():
        text = yaml.safe_dump(row_document(config.editors[name]), sort_keys=False)
        file = row.folder / CONFIG
        if row.folder.exists() and (not file.exists() or file.read_text("utf-8") != text):
            log.warning("editors.%s has other settings than before, so it starts again", name)
            shutil.rmtree(row.folder)
        row.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, text)


def _left_out(data: Checked) -> list[str]:
    return [f"{n:,} records were left out: {reason}" for reason, n in data.skipped.items()]
