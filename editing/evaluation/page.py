"""An evaluation as one HTML file that needs nothing else, and as markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editing.config import UNEDITED, to_yaml
from editing.datasets import stand_in_note
from editing.evaluation.gallery import gallery
from editing.evaluation.plots import bars, count_curves
from editing.evaluation.tables import (
    COLUMNS,
    cell,
    counted,
    definition_tables,
    failure_lines,
    footnotes,
    header,
    markdown_table,
    table_lines,
)
from mmtune.report.html import fill
from mmtune.report.pictures import Pictures
from mmtune.runs import write_text

if TYPE_CHECKING:
    from editing.evaluation.journal import Line
    from editing.evaluation.summary import Report
    from editing.requests import EditRecord

PAGE, MARKDOWN = "report.html", "report.md"


def write_pages(
    report: Report,
    records: Sequence[EditRecord],
    rows: Mapping[str, Sequence[Line]],
    root: Path,
) -> None:
    """Write report.html and report.md.

    Args:
        report: what was found.
        records: of the run.
        rows: name of a row -> its lines.
        root: the run's folder, which holds the manifest.
    """
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    write_text(root / MARKDOWN, render_markdown(report))
    write_text(root / PAGE, render_page(report, records, rows, manifest))


def render_page(
    report: Report,
    records: Sequence[EditRecord],
    rows: Mapping[str, Sequence[Line]],
    manifest: Mapping[str, Any],
) -> str:
    """The page."""
    pictures = Pictures()
    items = gallery(records, rows, pictures)
    return fill(
        "edit.html",
        title=report.config.name,
        summary=summary(report),
        warning=stand_in_note(records),
        tiles=_tiles(report),
        header=header(report),
        counted=counted(report),
        lines=table_lines(report),
        notes=footnotes(report),
        failures=failure_lines(report, 20),
        bars=bars(report),
        most=max(row.count for row in report.rows) if counted(report) else None,
        curves=count_curves(report),
        gallery=items,
        left_out=pictures.left_out,
        details=definition_tables(report),
        config=to_yaml(report.config),
        manifest=manifest,
    )


def render_markdown(report: Report) -> str:
    """Tables, notes and config; pictures are on the page only."""
    lines = [f"# {report.config.name}", "", summary(report), "", *markdown_table(report), ""]
    lines += [f"- {note}" for note in footnotes(report)]
    if failed := failure_lines(report, 20):
        lines += ["", "## What failed", "", *(f"- {line}" for line in failed)]
    for kind, names, table in definition_tables(report):
        lines += ["", f"## {kind.capitalize()}", "", f"| {' | '.join(names)} |"]
        lines += [f"|---|{'---:|' * (len(names) - 1)}", *(f"| {' | '.join(r)} |" for r in table)]
    lines += ["", "## Config", "", "```yaml", to_yaml(report.config).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def summary(report: Report) -> str:
    """One line: how many editors, records and what was edited."""
    editors = len(report.config.editors)
    return (
        f"{editors} editor{'s' if editors != 1 else ''} on {report.records:,} records, "
        f"{report.config.protocol.kind} edits of {report.config.model.name}"
    )


def _tiles(report: Report) -> list[dict[str, Any]]:
    """Each editor's reliability after the most edits, beside that of the unedited model."""
    last = max(row.count for row in report.rows)
    rows = {row.name: row for row in report.rows if row.count == last}
    key, base = COLUMNS["reliability"], rows.pop(UNEDITED)
    found = []
    for name, row in rows.items():
        then, now = cell(base, key), cell(row, key)
        if now.value:
            took = "" if row.seconds is None else f"{row.seconds:.3g} s an edit"
            found.append(
                {
                    "label": f"{name}: reliability, %",
                    "value": f"{then.value} → {now.value}",
                    "gain": now.gain,
                    "sign": now.sign,
                    "detail": took,
                }
            )
    return found
