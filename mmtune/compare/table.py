"""The table of a comparison: one row a method, numbers over its seeds, and what is missing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.compare.base import Base
from mmtune.compare.cells import Outcome
from mmtune.compare.choosing import Choice
from mmtune.compare.config import CompareConfig
from mmtune.metrics.seeds import SeedMean, over_seeds
from mmtune.report.markdown import table_lines
from mmtune.report.numbers import percent, size
from mmtune.runs import write_text

RESULTS, MARKDOWN = "results.jsonl", "compare.md"
NOTHING = "–"


@dataclass(frozen=True)
class Row:
    """One method over its finished seeds; numbers are None where none has finished.

    Attributes:
        method: its name in the config.
        quality: metric -> mean over seeds with a t-interval.
        trainable, share: parameters, and percent of all.
        step_seconds: median over seeds of each run's median step.
        peak_memory: bytes, the most of any seed.
        adapter_bytes: on disk.
        forward_ratio: forward time divided by the base's, not merged; median over seeds.
        merges: whether the adapter folds into the stock weights.
        status: "done", or how many seeds are.
        error: the first one, in one line.
    """

    method: str
    quality: dict[str, SeedMean]
    trainable: int | None
    share: float | None
    step_seconds: float | None
    peak_memory: int | None
    adapter_bytes: int | None
    forward_ratio: float | None
    merges: bool | None
    status: str
    error: str


@dataclass(frozen=True)
class Table:
    """Everything that a comparison found."""

    config: CompareConfig
    base: Base
    outcomes: Sequence[Outcome]
    choices: Sequence[Choice]

    @property
    def metrics(self) -> list[str]:
        """The metrics that are columns."""
        return self.config.metrics or [self.base.primary]

    @property
    def failed(self) -> list[Outcome]:
        """The cells that failed."""
        return [o for o in self.outcomes if o.status == "failed"]

    @property
    def memory_kind(self) -> str:
        """Of what the peak memory is."""
        return next((o.results["memory_kind"] for o in self.outcomes if o.results), "")

    def rows(self) -> list[Row]:
        """One row per method, in the order of the config."""
        return [
            _row(name, [o for o in self.outcomes if o.cell.method == name])
            for name in self.config.methods
        ]

    def header(self) -> list[str]:
        """Names of the columns."""
        memory = f"peak memory ({self.memory_kind})" if self.memory_kind else "peak memory"
        costs = ["trainable", "share", "step", memory, "adapter file", "forward", "merges"]
        return ["method", *self.metrics, *costs, "status"]

    def lines(self, errors: bool = True) -> list[list[str]]:
        """The table as text: the base model first; `errors` stand beside the status."""
        base = [f"{self.base.metrics[name]['value']:.1f}" for name in self.metrics]
        first = ["base", *base, "0", "0 %", *[NOTHING] * 3, "1.00 ×", NOTHING, "not tuned"]
        rows = self.rows()
        statuses = [f"{r.status}; {r.error}" if errors and r.error else r.status for r in rows]
        texts = [_texts(row, self.metrics) for row in rows]
        return [first, *([*t, status] for t, status in zip(texts, statuses, strict=True))]

    def notes(self) -> list[str]:
        """What the numbers are, and what they are not."""
        run, seeds = self.config.any_run, self.config.seeds
        return [
            f"Model {run.model.name} ({run.model.dtype}), task {run.task}, test split of "
            f"{self.base.queries:,} queries; seeds {', '.join(map(str, seeds))}; "
            f"{_budget(self)}.",
            "± is half a 95 % t-interval over seeds: how far other seeds may be off, not other "
            "queries or other data. The base model has no seed.",
            "step: median time of an optimiser step, without waiting for data. Peak memory: of a "
            "process that trains this cell alone. forward: time of one batch in eval mode relative "
            "to the stock model, measured in turns, adapter not merged; a method that merges takes "
            "the stock model's time once merged.",
            _rates(self),
            _missing(self.outcomes),
        ]


def _row(method: str, outcomes: Sequence[Outcome]) -> Row:
    done = [o for o in outcomes if o.status == "done"]
    results, measured = [o.results for o in done], [o.measured for o in done]
    names = list(results[0]["after"]) if results else []
    return Row(
        method=method,
        quality={n: over_seeds([r["after"][n]["value"] for r in results]) for n in names},
        trainable=_some(max, (r["trainable"] for r in results)),
        share=_some(max, (r["share_percent"] for r in results)),
        step_seconds=_some(statistics.median, (r["step_seconds"] for r in results)),
        peak_memory=_some(max, (r["peak_memory"] for r in results)),
        adapter_bytes=_some(max, (m["adapter_bytes"] for m in measured)),
        forward_ratio=_some(statistics.median, (m["forward_ratio"] for m in measured)),
        merges=all(m["merges"] for m in measured) if measured else None,
        status="done" if len(done) == len(outcomes) else f"{len(done)} of {len(outcomes)} seeds",
        error=next((o.error for o in outcomes if o.error), ""),
    )


def _some(combine: Callable[[list[Any]], Any], values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return combine(known) if known else None


def _texts(row: Row, metrics: Sequence[str]) -> list[str]:
    def text(value: Any, form: Callable[[Any], str]) -> str:
        return NOTHING if value is None else form(value)

    return [
        row.method,
        *(text(row.quality.get(name), plus_minus) for name in metrics),
        text(row.trainable, lambda n: f"{n:,}"),
        text(row.share, percent),
        text(row.step_seconds, milliseconds),
        text(row.peak_memory, size),
        text(row.adapter_bytes, size),
        text(row.forward_ratio, lambda r: f"{r:.2f} ×"),
        text(row.merges, lambda m: "yes" if m else "no"),
    ]


def milliseconds(seconds: float) -> str:
    """Such as "1,250 ms" or "3.41 ms"."""
    value = 1000 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def plus_minus(mean: SeedMean) -> str:
    """Such as "36.2 ± 1.3", or the value alone for one seed."""
    return f"{mean.value:.1f}" + ("" if mean.half is None else f" ± {mean.half:.1f}")


def _budget(table: Table) -> str:
    steps = {o.results["steps"] for o in table.outcomes if o.results}
    training = table.config.any_run.training
    batch = training.batch_size * training.accumulation
    return f"{' or '.join(map(str, sorted(steps))) or 'no'} steps of batch {batch} for each method"


def _rates(table: Table) -> str:
    runs = table.config.methods.items()
    rates = ", ".join(f"{name} {run.training.lr:g}" for name, run in runs)
    search = table.config.search
    if not any(choice.best is not None for choice in table.choices) or search is None:
        return f"Learning rates, as the config gives them (no search was run): {rates}."
    other = [
        c.method for c in table.choices if c.best != table.config.methods[c.method].training.lr
    ]
    edge = [c.method for c in table.choices if c.at_edge]
    text = f"Learning rates: {rates}; each method tried {len(search.lr)} on the val split."
    if other:
        text += f" Not what the search chose: {', '.join(other)}."
    if edge:
        text += f" The search chose the lowest or highest rate tried for {', '.join(edge)}."
    return text


def _missing(outcomes: Sequence[Outcome]) -> str:
    missing = [f"{Path(o.cell.folder).name} ({o.status})" for o in outcomes if o.status != "done"]
    return f"Without a result: {', '.join(missing)}." if missing else "Every cell has a result."


def record(outcome: Outcome) -> dict[str, Any]:
    """One line of results.jsonl."""
    results, cell = outcome.results, outcome.cell
    numbers = {
        name: results.get(name)
        for name in ("trainable", "total", "share_percent", "steps", "seconds", "step_seconds",
                     "peak_memory", "memory_kind")
    }  # fmt: skip
    return {
        "method": cell.method,
        "seed": cell.seed,
        "status": outcome.status,
        "error": outcome.error,
        "tuner": cell.config.method,
        "lr": cell.config.training.lr,
        "split": cell.split,
        "metrics": {name: metric["value"] for name, metric in results.get("after", {}).items()},
        **numbers,
        **outcome.measured,
        "folder": cell.folder,
    }


def write_table(table: Table, root: Path) -> None:
    """Write results.jsonl and compare.md, each whole or not at all."""
    records = [json.dumps(record(o), ensure_ascii=False) for o in table.outcomes]
    write_text(root / RESULTS, "".join(line + "\n" for line in records))
    write_text(root / MARKDOWN, render_markdown(table))


def render_markdown(table: Table) -> str:
    """The table, the search's table where there is one, and the notes."""
    lines = [f"# {table.config.name}", "", *table_lines(table.header(), table.lines()), ""]
    if table.choices:
        header, rows = search_lines(table.choices)
        lines += ["## Search for the learning rate", "", *table_lines(header, rows), ""]
    return "\n".join(lines + [f"- {note}" for note in table.notes()]) + "\n"


def search_lines(choices: Sequence[Choice]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the search's table."""
    rates = list(choices[0].tried)
    header = [f"{choices[0].metric} on val", *(f"lr {rate:g}" for rate in rates), "chosen"]
    rows = []
    for choice in choices:
        tried = [
            plus_minus(mean) if mean else "failed" if rate in choice.errors else NOTHING
            for rate, mean in choice.tried.items()
        ]
        best = NOTHING if choice.best is None else f"{choice.best:g}"
        rows.append([choice.method, *tried, best + (" (edge)" if choice.at_edge else "")])
    return header, rows
