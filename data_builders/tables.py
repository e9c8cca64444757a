"""The tables of `mmtune build`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data_builders.progress import counted
from mmtune.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table

    from data_builders.dry_runs import Outlook
    from data_builders.pipeline import Built

NAMED = 3  # records of each kind of defect


def build_table(name: str, built: Built) -> Table:
    """What went into each step, and what became of it."""
    table = new_table(
        "stage", "by", "in", "kept", "rejected", "faults", "seconds", title=name, right=True
    )
    for report in built.reports:
        table.add_row(
            report.name,
            report.by,
            f"{report.samples:,}",
            f"{report.kept:,}",
            counted(report.rejected.items()) or "0",
            counted(report.faults.items()) or "0",
            f"{report.seconds:,.1f}",
        )
    return table


def defect_table(path: Path) -> Table:
    """The defects in a file of `data_builders.stages.assemble`, the first of each kind by name."""
    defects = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    table = new_table("defect", "split", "records", "such as", title="defects")
    table.columns[2].justify = "right"
    kinds = dict.fromkeys((one["kind"], one["split"]) for one in defects)
    for kind, split in kinds:
        own = [one for one in defects if (one["kind"], one["split"]) == (kind, split)]
        named = [f"{one['record']} ({one['id']}): {one['text']}" for one in own[:NAMED]]
        records = len({one["record"] for one in own})
        table.add_row(kind, split, f"{records:,}", "\n".join(named))
    return table


def outlook_table(name: str, found: Outlook) -> Table:
    """How far each step is, and what it would read."""
    table = new_table("stage", "by", "state", "samples", "why", title=name)
    for step in found.steps:
        count = found.samples.get(step.name)
        faults = counted(found.faults.get(step.name, {}).items())
        why = found.stale.get(step.name, [f"faults: {faults}"] if faults else [])
        shown = "" if count is None else f"{count:,}"
        table.add_row(step.name, step.choice.by, found.states[step.name], shown, "; ".join(why))
    return table
