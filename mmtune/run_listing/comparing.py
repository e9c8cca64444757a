"""Runs side by side: how their configs differ, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.report.numbers import duration
from mmtune.run_listing.base import Run

ABSENT = "–"
Rows = list[list[str]]


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {at: value} if at else {}
    found: dict[str, Any] = {}
    for key, own in value.items():
        found |= flat(own, f"{at}.{key}" if at else str(key))
    return found


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each run's config, where they differ; the name is none.

    A key that a config does not have is `ABSENT` there.
    """
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key != "name")
    rows = {key: [config.get(key, ABSENT) for config in configs] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def difference_rows(runs: Sequence[Run]) -> Rows:
    """`differences` as texts."""
    return [[key, *map(_text, row)] for key, row in differences(runs).items()]


def number_rows(runs: Sequence[Run]) -> Rows:
    """Every number of any run, in order; empty where a run has it not."""
    by_run = [{number.name: number for number in run.numbers} for run in runs]
    names = dict.fromkeys(name for numbers in by_run for name in numbers)
    return [
        [name, *(str(numbers[name]) if name in numbers else "" for numbers in by_run)]
        for name in names
    ]


def fact_rows(runs: Sequence[Run]) -> Rows:
    """State, costs, date, commit and report of each run."""
    rows = {
        "state": [run.state for run in runs],
        "trainable": [trainable(run) for run in runs],
        "time": [seconds(run) for run in runs],
        "started": [run.started for run in runs],
        "commit": [run.commit for run in runs],
        "report": [str(run.report or "") for run in runs],
    }
    return [[name, *texts] for name, texts in rows.items() if any(texts)]


def trainable(run: Run) -> str:
    """Its trainable parameters as text, or nothing."""
    return "" if run.trainable is None else f"{run.trainable:,}"


def seconds(run: Run) -> str:
    """The time that it took as text, or nothing."""
    return "" if run.seconds is None else duration(run.seconds)


def headline(run: Run) -> str:
    """Name and value of its headline, or nothing."""
    return "" if run.headline is None else f"{run.headline.name} {run.headline}"


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """A comparison as JSON: config differences and numbers by name of the run."""
    names = [run.name for run in runs]
    return {
        "runs": [run.as_json() for run in runs],
        "differences": {
            key: dict(zip(names, row, strict=True)) for key, row in differences(runs).items()
        },
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "null" if value is None else str(value)
