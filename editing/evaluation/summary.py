"""From the lines of a run to its numbers: every definition, of every editor after every count."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from editing.config import UNEDITED, EditConfig
from editing.datasets import stand_in_note
from editing.evaluation.journal import Line
from editing.evaluation.outcomes import KINDS, LOCALITY, definitions_for, image_key, kind_scores
from editing.evaluation.protocols import wanted
from editing.metrics.aggregate import Difference, Score, Summary, paired, summarize
from editing.metrics.definitions import NLL, PROBABILITY, Definition, Kind, definitions_of
from editing.requests import EditRecord

Key = tuple[Kind, str]  # a kind of metric and the name of a definition


@dataclass(frozen=True)
class Failure:
    """A record that has no scores: what it is, and what was raised."""

    record: str
    where: str
    error: str


@dataclass(frozen=True)
class RowSummary:
    """One row of the table.

    Attributes:
        name: of the row; `UNEDITED` for the model as it is.
        count: edits that are applied when records are scored.
        records: those that should be scored.
        seconds: median time of one edit; None where none was made.
        failures: records without scores.
        metrics: what was found, by kind and definition.
        gains: difference to the unedited model on the same records, where it says something.
    """

    name: str
    count: int
    records: int
    seconds: float | None
    failures: list[Failure]
    metrics: dict[Key, Summary]
    gains: dict[Key, Difference] = field(default_factory=dict)

    @property
    def scored(self) -> int:
        """Records with scores."""
        return self.records - len(self.failures)


@dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
        config: of the run.
        rows: for each count the unedited model, and then the editors.
        notes: what must stand beside the numbers.
        records: how many there are.
    """

    config: EditConfig
    rows: list[RowSummary]
    notes: list[str]
    records: int

    @property
    def failed(self) -> list[tuple[str, int, Failure]]:
        """(row, count, failure) of every record that an editor has no scores for."""
        return [(r.name, r.count, f) for r in self.rows if r.name != UNEDITED for f in r.failures]

    def as_json(self) -> dict[str, Any]:
        """The content of results.json; shares are in [0, 1], NLL and KL in nats."""
        definitions = {
            d.name: {"meaning": d.meaning, "unit": d.unit, "higher_is_better": d.higher_is_better}
            for kind in KINDS
            for d in shown_definitions(kind, self.config)
        }
        return {
            "name": self.config.name,
            "protocol": self.config.protocol.kind,
            "model": self.config.model.name,
            "records": self.records,
            "notes": self.notes,
            "definitions": definitions,
            "rows": [_row_json(row) for row in self.rows],
        }


def shown_definitions(kind: Kind, config: EditConfig) -> tuple[Definition, ...]:
    """Every definition that a kind of metric is reported in, the one to quote first."""
    own = definitions_for(kind, config.protocol.compat)
    if kind in LOCALITY:
        return own
    first = definitions_of(kind)
    return (*first, PROBABILITY, NLL, *own[len(first) :])


def summed_up(
    config: EditConfig,
    records: Sequence[EditRecord],
    base: Mapping[str, Line],
    rows: Mapping[str, Sequence[Line]],
    notes: Sequence[str] = (),
) -> Report:
    """Average the lines of a run.

    Args:
        config: of the run.
        records: in order.
        base: record id -> the line of the unedited model.
        rows: name of a row -> its lines.
        notes: what else must stand beside the numbers.
    """
    found: list[RowSummary] = []
    every = wanted(config.protocol, len(records))
    by_place = {
        name: {(line["count"], line["record"]): line for line in lines}
        for name, lines in rows.items()
    }
    for count in dict.fromkeys(count for count, _ in every):
        chosen = [records[i] for n, i in every if n == count]
        before = [base[record.id] for record in chosen]
        found.append(_row(config, UNEDITED, count, chosen, before, None))
        for name, places in by_place.items():
            lines = [places[count, r.id] for r in chosen if (count, r.id) in places]
            if len(lines) == len(chosen):
                found.append(_row(config, name, count, chosen, lines, before))
    said = [stand_in_note(records), *notes, *_remarks(config, found, len(records))]
    return Report(config, found, [note for note in said if note], len(records))


def _row(
    config: EditConfig,
    name: str,
    count: int,
    records: Sequence[EditRecord],
    lines: Sequence[Line],
    before: Sequence[Line] | None,
) -> RowSummary:
    images = [image_key(record) for record in records]
    metrics: dict[Key, Summary] = {}
    gains: dict[Key, Difference] = {}
    for kind in KINDS:
        for definition in shown_definitions(kind, config):
            scores = _scores(lines, kind, definition)
            if all(score is None for score in scores):
                continue
            key = (kind, definition.name)
            metrics[key] = summarize(definition, scores, images)
            if before is not None and kind not in LOCALITY:
                gains[key] = paired(scores, _scores(before, kind, definition), images)
    failures = [
        Failure(line["record"], line["where"], line["error"]) for line in lines if "error" in line
    ]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    return RowSummary(
        name,
        count,
        len(lines),
        statistics.median(seconds) if seconds else None,
        failures,
        metrics,
        gains,
    )


def _scores(lines: Sequence[Line], kind: Kind, definition: Definition) -> list[Score | None]:
    return [kind_scores(line.get("probes", {}), kind, definition) for line in lines]


def _remarks(config: EditConfig, rows: Sequence[RowSummary], records: int) -> list[str]:
    protocol, found = config.protocol, []
    how = {
        "single": "each record is edited, scored and undone by itself",
        "sequential": "edits pile up; after N of them all N records are scored",
        "batch": "N records are one edit",
    }
    found.append(f"{protocol.kind}: {how[protocol.kind]}")
    if protocol.kind == "batch":
        for size in protocol.numbers:
            if records % size:
                text = f"{records % size} of {records:,} records fill no group of {size} and are"
                found.append(f"{text} left out there")
    for row in rows:
        if row.failures:
            at = "" if protocol.kind == "single" else f" at N = {row.count}"
            text = f"{row.name}{at}: {len(row.failures):,} of {row.records:,} records failed"
            found.append(f"{text} and are in none of its means")
    for compat in protocol.compat:
        for row in rows:
            for kind in LOCALITY:
                wanting = definitions_of(kind, compat)[0].name
                if row.scored and (kind, wanting) not in row.metrics:
                    text = "its edits change answers only, so there are no whole sequences"
                    found.append(f"{row.name}: {wanting} ({kind}) is missing: {text}")
    return list(dict.fromkeys(found))


def _row_json(row: RowSummary) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for (kind, name), summary in row.metrics.items():
        values = {k: v for k, v in asdict(summary).items() if k not in ("definition", "groups")}
        del values["group_macro"]
        gain = row.gains.get((kind, name))
        values["difference"] = asdict(gain) if gain else None
        metrics.setdefault(kind, {})[name] = values
    return {
        "row": row.name,
        "count": row.count,
        "records": row.records,
        "failed": [asdict(failure) for failure in row.failures],
        "seconds_per_edit": row.seconds,
        "metrics": _finite(metrics),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinities: None in their place."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
