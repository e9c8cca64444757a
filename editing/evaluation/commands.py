"""The arguments of `mmtune edit`, and what it shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mmtune.shown import Findings

DONE, FAILED = 0, 1


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the command, see `editing.commands.add_commands`."""
    edit = new("edit", "edit a model with every record of a file, and score what became of it")
    edit.add_argument("config", help="a YAML file, or the name of a shipped config")
    edit.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.limit=100")
    edit.add_argument("--overwrite", action="store_true", help="begin afresh, whatever is there")
    edit.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    edit.set_defaults(show=_edit)


def _edit(options: argparse.Namespace) -> Findings:
    from editing.config import load_edit_config
    from editing.evaluation.page import PAGE
    from editing.evaluation.running import evaluate
    from editing.evaluation.tables import failure_lines, rich_table

    config = load_edit_config(options.config, options.overrides)
    report = evaluate(config, options.runs, options.overwrite)
    lines = [*failure_lines(report), f"report: {options.runs / config.name / PAGE}"]
    return Findings([rich_table(report)], lines, FAILED if report.failed else DONE, wide=True)
