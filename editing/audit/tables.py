"""What an audit found, as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editing.audit.kinds import KINDS
from mmtune.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table

    from editing.audit.auditing import Audit

SHOWN = 160  # characters of an example


def defect_table(found: Audit) -> Table:
    """Every kind that was found, and the names of those that were not."""
    table = new_table("defect", "records", "%", "--fix", "meaning", title=found.path)
    for column in table.columns[1:3]:
        column.justify = "right"
    table.columns[0].no_wrap = True
    counts = found.counts()
    for kind, count in counts.items():
        if count:
            share = f"{100 * count / found.records:.1f}"
            table.add_row(kind, f"{count:,}", share, KINDS[kind].fix, KINDS[kind].meaning)
    absent = ", ".join(kind for kind, count in counts.items() if not count)
    table.caption = f"of {found.records:,} records; none with: {absent or '(every kind was found)'}"
    return table


def example_table(found: Audit, examples: int) -> Table | None:
    """The first records of every kind that was found; None without any."""
    table = new_table("defect", "record", "field", "example", title="examples")
    table.columns[1].justify = "right"
    for kind in found.counts():
        shown = [f for f in found.findings if f.kind == kind][:examples]
        for at, finding in enumerate(shown):
            # Texts are shown as Python literals: line breaks and stray blanks are what is wrong.
            cut = finding.text if len(finding.text) <= SHOWN else finding.text[: SHOWN - 3] + "..."
            table.add_row("" if at else kind, f"{finding.record}", finding.field, cut)
    return table if table.row_count else None


def fact_table(found: Audit) -> Table:
    """Numbers about the whole file."""
    table = new_table("fact", "count", "of", title="facts", right=True)
    for fact in found.facts:
        table.add_row(fact.name, f"{fact.value:,}", "" if fact.of is None else f"{fact.of:,}")
    return table
