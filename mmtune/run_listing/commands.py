"""The arguments of `mmtune runs`, and what it shows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.shown import Findings

if TYPE_CHECKING:
    from rich.table import Table

    from mmtune.run_listing.base import Run

COLUMNS = (
    "name", "kind", "state", "headline", "trainable", "time", "started", "commit", "report",
)  # fmt: skip


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the command; `new` makes the parser of a command from its name and summary.

    The parsed options have `show`, which takes them and returns `Findings`.
    """
    runs = new("runs", "list runs of every kind, or show some side by side")
    runs.add_argument("names", nargs="*", metavar="RUN", help="runs of one kind, to compare")
    runs.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    runs.add_argument("--plot", action="store_true", help="write runs.html into that folder")
    runs.add_argument("--json", action="store_true", help="print JSON instead of tables")
    runs.set_defaults(show=_runs)


def _runs(options: argparse.Namespace) -> Findings:
    from mmtune.run_listing.comparing import as_json
    from mmtune.run_listing.listing import listing, named

    others: Sequence[str] = ()
    if options.names:
        runs: Sequence[Run] = named(list(dict.fromkeys(options.names)), options.runs)
    else:
        found = listing(options.runs)
        runs, others = found.runs, found.others
    lines, page = [], None
    if options.plot:
        from mmtune.run_listing.page import write_page

        options.runs.mkdir(parents=True, exist_ok=True)
        page = write_page(runs, options.runs, compared=bool(options.names))
        lines.append(f"page: {page}")
    if options.json:
        content = as_json(runs) if options.names else {"runs": [run.as_json() for run in runs]}
        content |= {"page": str(page)} if page else {}
        return Findings([], [json.dumps(content, indent=2, default=str, ensure_ascii=False)])
    tables = _side_by_side(runs) if options.names else [_table(runs, options.runs)]
    return Findings(tables, [*_remarks(runs, others), *lines], wide=True)


def _table(runs: Sequence[Run], root: Path) -> Table:
    from mmtune.run_listing.comparing import headline, seconds, trainable
    from mmtune.tables import new_table

    table = new_table(*COLUMNS, title=f"{len(runs)} runs in {root}")
    for name in ("trainable", "time"):
        table.columns[COLUMNS.index(name)].justify = "right"
    for run in runs:
        day = run.started[:10]
        costs = (trainable(run), seconds(run))
        report = str(run.report or "")
        table.add_row(run.name, run.kind, run.state, headline(run), *costs, day, run.commit, report)
    return table


def _side_by_side(runs: Sequence[Run]) -> list[Table]:
    from mmtune.run_listing.comparing import difference_rows, fact_rows, number_rows
    from mmtune.run_listing.listing import interval_of
    from mmtune.tables import new_table

    names, interval = [run.name for run in runs], interval_of(runs[0].kind)
    tables = []
    for title, rows, note in (
        ("what differs in the configs", difference_rows(runs), ""),
        ("numbers", number_rows(runs), f"brackets: {interval}" if interval else ""),
        (runs[0].kind, fact_rows(runs), ""),
    ):
        table = new_table("", *names, title=title, right=True)
        table.caption = note or None
        for row in rows:
            table.add_row(*row)
        tables += [table] if rows else []
    return tables


def _remarks(runs: Sequence[Run], others: Sequence[str]) -> list[str]:
    lines = [f"{run.state}: {run.name}: {run.why}" for run in runs if run.why]
    return [*lines, f"hold no run: {', '.join(others)}"] if others else lines
