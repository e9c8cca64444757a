"""The table of an evaluation, as cells that a terminal, markdown and a page can show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from editing.config import UNEDITED
from editing.evaluation.outcomes import KINDS
from editing.evaluation.summary import Key, Report, RowSummary, shown_definitions
from editing.metrics.definitions import AGREEMENT, GENERATED, TOKEN_ACCURACY, Definition

if TYPE_CHECKING:
    from rich.table import Table

    from editing.metrics.aggregate import Difference
    from mmtune.tasks.base import Metric

COLUMNS: dict[str, Key] = {
    "reliability": ("reliability", GENERATED.name),
    "token accuracy": ("reliability", TOKEN_ACCURACY.name),
    "text generality": ("text_generality", GENERATED.name),
    "image generality": ("image_generality", GENERATED.name),
    "text locality": ("text_locality", AGREEMENT.name),
    "image locality": ("image_locality", AGREEMENT.name),
    "portability": ("portability", GENERATED.name),
}
FACTS = ("n", "s/edit", "failed")


@dataclass(frozen=True)
class Cell:
    """One number: the value, its interval, and how far it is from the unedited model.

    Attributes:
        value, interval: as text; empty where nothing was measured.
        gain: difference with its interval; empty where it says nothing.
        sign: 1 for better than unedited, -1 for worse, 0 where the interval holds zero.
    """

    value: str
    interval: str = ""
    gain: str = ""
    sign: int = 0

    def __str__(self) -> str:
        return " ".join(filter(None, (self.value, self.interval, self.gain)))


@dataclass(frozen=True)
class TableLine:
    """A row of the table."""

    name: str
    count: int
    cells: list[Cell]
    facts: list[str]


def columns(report: Report) -> dict[str, Key]:
    """The columns that anything was measured for, in order."""
    there = {key for row in report.rows for key in row.metrics}
    return {name: key for name, key in COLUMNS.items() if key in there}


def header(report: Report) -> list[str]:
    """Names of the columns."""
    count = ["N"] if counted(report) else []
    return ["editor", *count, *columns(report), *FACTS]


def counted(report: Report) -> bool:
    """Whether rows differ in the number of edits."""
    return report.config.protocol.kind != "single"


def table_lines(report: Report) -> list[TableLine]:
    """The rows, in the order of the report."""
    shown = columns(report)
    return [
        TableLine(row.name, row.count, [cell(row, key) for key in shown.values()], _facts(row))
        for row in report.rows
    ]


def cell(row: RowSummary, key: Key) -> Cell:
    """What a row has for a kind and definition."""
    summary, gain = row.metrics.get(key), row.gains.get(key)
    if summary is None:
        return Cell("")
    definition, several = summary.definition, summary.images > 1
    better = 1 if definition.higher_is_better else -1
    return Cell(
        number(summary.macro.value, definition),
        _interval(summary.macro, definition) if several else "",  # one image tells no spread
        _gain(gain, definition, several) if gain else "",
        _sign(gain) * better if gain and several else 0,
    )


def number(value: float, definition: Definition, flag: str = "") -> str:
    """A share in percent, nats as they are."""
    return f"{100 * value:{flag}.1f}" if definition.unit == "share" else f"{value:{flag}.3g}"


def footnotes(report: Report) -> list[str]:
    """What the columns are, and what must stand beside the numbers."""
    definitions: dict[str, tuple[str, list[str]]] = {}
    for name, (kind, wanted) in columns(report).items():
        found = next(d for d in shown_definitions(kind, report.config) if d.name == wanted)
        definitions.setdefault(found.name, (found.meaning, []))[1].append(name)
    lines = [f"{', '.join(names)}: {d} ({text})" for d, (text, names) in definitions.items()]
    images = max((s.images for row in report.rows for s in row.metrics.values()), default=0)
    lines.append(
        f"percent; brackets: 95 % bootstrap intervals over {images:,} images; after them the "
        f"paired difference to the {UNEDITED} model. s/edit: median"
    )
    return [*report.notes, *lines]


def definition_tables(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """(kind, header, lines) of everything that was measured, for those who look closer."""
    found = []
    for kind in KINDS:
        names = [d.name for d in shown_definitions(kind, report.config)]
        names = [n for n in names if any((kind, n) in row.metrics for row in report.rows)]
        if not names:
            continue
        lines = [
            [label(report, row), *(_plain(row, (kind, name)) for name in names)]
            for row in report.rows
        ]
        found.append((kind.replace("_", " "), ["editor", *names], lines))
    return found


def label(report: Report, row: RowSummary) -> str:
    """A row's name, with its number of edits where rows differ in it."""
    return f"{row.name}, N = {row.count}" if counted(report) else row.name


def rich_table(report: Report) -> Table:
    """The table for a terminal."""
    from rich.text import Text

    from mmtune.tables import new_table

    config = report.config
    title = f"{config.name}: {config.protocol.kind} edits of {config.model.name}"
    table = new_table(*header(report), title=title, right=True)
    colours = {1: "green", -1: "red", 0: ""}
    previous: int | None = None
    for line in table_lines(report):
        if previous not in (None, line.count):
            table.add_section()
        previous = line.count
        count = [str(line.count)] if counted(report) else []
        cells = []
        for one in line.cells:
            text = Text(f"{one.value}\n{one.interval}".strip())
            if one.gain:
                text.append(f"\n{one.gain}", style=colours[one.sign])
            cells.append(text)
        table.add_row(line.name, *count, *cells, *line.facts)
    table.caption = "\n".join(footnotes(report))
    return table


def failure_lines(report: Report, most: int = 10) -> list[str]:
    """The first failures, one a line, and how many more there are."""
    failed = report.failed
    lines = [f"failed: {_at(report, n, c)}: {f.where}: {f.error}" for n, c, f in failed[:most]]
    return lines + ([f"and {len(failed) - most:,} more"] if len(failed) > most else [])


def markdown_table(report: Report) -> list[str]:
    """The table as markdown."""
    names = header(report)
    lines = [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    for line in table_lines(report):
        count = [str(line.count)] if counted(report) else []
        texts = [line.name, *count, *map(str, line.cells), *line.facts]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def _at(report: Report, name: str, count: int) -> str:
    return f"{name}, N = {count}" if counted(report) else name


def _facts(row: RowSummary) -> list[str]:
    seconds = "" if row.seconds is None else f"{row.seconds:.3g}"
    failed = "" if row.name == UNEDITED and not row.failures else f"{len(row.failures):,}"
    return [f"{row.scored:,}", seconds, failed]


def _plain(row: RowSummary, key: Key) -> str:
    found = cell(row, key)
    return f"{found.value} {found.interval}".strip()


def _gain(gain: Difference, definition: Definition, several: bool) -> str:
    value = number(gain.macro.value, definition, "+")
    return f"{value} {_interval(gain.macro, definition)}" if several else value


def _interval(metric: Metric, definition: Definition) -> str:
    return f"[{number(metric.low, definition)}, {number(metric.high, definition)}]"


def _sign(gain: Difference) -> int:
    return 1 if gain.macro.low > 0 else -1 if gain.macro.high < 0 else 0
