"""The comparison as one HTML file: table, pictures, and what was not measured."""

from __future__ import annotations

from pathlib import Path

from mmtune.compare.plots import Point, losses, scatter
from mmtune.compare.table import Table, search_lines
from mmtune.report.html import fill
from mmtune.runs import RunFolder, write_text
from mmtune.yaml_source import as_yaml

PAGE = "compare.html"


def write_page(table: Table, root: Path) -> Path:
    """Write compare.html. Returns its path."""
    write_text(root / PAGE, render_page(table, root))
    return root / PAGE


def render_page(table: Table, root: Path) -> str:
    """The page; loss curves are read from the cells below `root`."""
    run = table.config.any_run
    document = table.config.document
    return fill(
        "compare.html",
        title=table.config.name,
        summary=f"{len(table.config.methods)} methods on {run.model.name}, {run.task}",
        header=table.header(),
        lines=table.lines(errors=False),
        notes=table.notes(),
        errors=[(Path(o.cell.folder).name, o.error, o.cell.folder) for o in table.failed],
        search=search_lines(table.choices) if table.choices else None,
        scatter=_scatter(table),
        losses=losses(_curves(table, root)),
        config=as_yaml(document),
        manifest=table.base.manifest,
    )


def _scatter(table: Table) -> str:
    primary = table.base.primary
    points = [
        Point(row.method, row.trainable, row.quality[primary])
        for row in table.rows()
        if row.trainable
    ]
    return scatter(primary, points, table.base.metrics[primary]["value"]) if points else ""


def _curves(table: Table, root: Path) -> dict[str, list[list[tuple[int, float]]]]:
    found: dict[str, list[list[tuple[int, float]]]] = {m: [] for m in table.config.methods}
    for outcome in table.outcomes:
        if outcome.status == "done":
            log = RunFolder(root / outcome.cell.folder).log()
            found[outcome.cell.method].append(
                [(line["step"], line["loss"]) for line in log if "loss" in line]
            )
    return found
