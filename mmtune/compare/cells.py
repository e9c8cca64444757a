"""One cell of a comparison: an ordinary run in its own process, found again when it is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.compare.config import Cell
from mmtune.compare.process import call_apart, call_here
from mmtune.config import load_config, to_yaml
from mmtune.runs import RunFolder, write_json, write_text

if TYPE_CHECKING:
    from mmtune.tasks.base import Evaluation

ERROR, OUTPUT, MEASURED = "error.txt", "output.txt", "measured.json"
Setup = Callable[[], None] | None


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: the cell.
        status: "done", "failed" or "not run".
        error: one line, where it failed.
        results: the content of results.json, where it is done.
        measured: what `mmtune.compare.measuring.Measured` holds, where it is done.
    """

    cell: Cell
    status: str
    error: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What is on disk for a cell: "done", "failed", "begun", "changed" or "absent"."""

    kind: str
    detail: str = ""


def state(cell: Cell, root: Path) -> State:
    """Look whether a cell is finished, with the config that it has now."""
    folder = RunFolder(root / cell.folder)
    if not folder.config.is_file():
        return State("absent")
    then, now = folder.config.read_text(encoding="utf-8"), to_yaml(cell.config)
    if then != now:
        return State("changed", _difference(then, now))
    if folder.results.exists():
        return State("done")
    error = folder.path / ERROR
    if error.exists():
        return State("failed", error.read_text(encoding="utf-8").partition("\n")[0])
    return State("begun")


def outcome(cell: Cell, root: Path) -> Outcome:
    """What is known of a cell from its folder."""
    found = state(cell, root)
    if found.kind == "failed":
        return Outcome(cell, "failed", found.detail)
    if found.kind != "done":
        return Outcome(cell, "not run")
    folder = root / cell.folder
    return Outcome(cell, "done", "", _json(folder / "results.json"), _json(folder / MEASURED))


def run_cell(
    cell: Cell,
    root: Path,
    before: Evaluation,
    setup: Setup = None,
    watch: Callable[[], None] = lambda: None,
    again: bool = False,
    apart: bool = True,
) -> Outcome:
    """Train a cell, going on from its newest checkpoint where it has one.

    Args:
        cell: what to train.
        root: the comparison's folder.
        before: the base model's evaluation of the cell's split.
        setup: called first in the cell's process.
        watch: called about twice a second.
        again: start afresh, whatever is there.
        apart: in a process of its own.
    """
    folder = RunFolder(root / cell.folder)
    if again or state(cell, root).kind in ("absent", "changed"):
        shutil.rmtree(folder.path, ignore_errors=True)
    folder.start(to_yaml(cell.config), resume=True)
    (folder.path / ERROR).unlink(missing_ok=True)
    call = call_apart if apart else call_here
    ended = call(
        train_cell,
        (folder.path, cell.split, before),
        folder.path / OUTPUT,
        setup,
        watch,
    )
    if ended.error is not None:
        write_text(folder.path / ERROR, f"{ended.error}\n\n{ended.traceback}")
    return outcome(cell, root)


def train_cell(path: Path, split: str, before: Evaluation) -> None:
    """Train and measure as the config in the cell's folder says; everything is written there."""
    from mmtune.compare.measuring import measure
    from mmtune.finetuning import fine_tune

    folder = RunFolder(path)
    config = load_config(folder.config)

    def inspect(task: Any, model: Any) -> None:
        write_json(path / MEASURED, measure(config, task, model, folder.adapter))

    fine_tune(config, folder, resume=True, split=split, before=before, inspect=inspect)


def steps_done(cell: Cell, root: Path) -> int:
    """The last optimiser step that a running cell has logged."""
    log = RunFolder(root / cell.folder).log()
    return log[-1]["step"] if log else 0


def _difference(then: str, now: str) -> str:
    """The lines of a config that changed, such as "lr: 0.1 -> lr: 0.2"."""
    old, new = then.splitlines(), now.splitlines()
    gone = [line.strip() for line in old if line not in new]
    come = [line.strip() for line in new if line not in old]
    return f"{', '.join(gone) or 'nothing'} -> {', '.join(come) or 'nothing'}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
