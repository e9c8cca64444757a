"""The arguments of `mmtune edit-train`, and what it shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mmtune.shown import Findings


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the command, see `editing.commands.add_commands`."""
    train = new("edit-train", "train an editor that must be trained before it edits")
    train.add_argument("config", help="a YAML file, or the name of a shipped config")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.lr=1e-5")
    train.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    train.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    train.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    train.set_defaults(show=_train)


def _train(options: argparse.Namespace) -> Findings:
    from editing.meta.config import load_meta_config
    from editing.meta.page import HEADER, lines_of
    from editing.meta.running import edit_train
    from mmtune.runs import RunFolder
    from mmtune.tables import new_table

    config = load_meta_config(options.config, options.overrides)
    run = edit_train(
        config,
        RunFolder(options.runs / config.name),
        options.resume,
        options.overwrite,
    )
    table = new_table(*HEADER, title=run.config.name, right=True)
    for row in lines_of(run):
        table.add_row(*row)
    result = run.result
    early = ", stopped early" if result.stopped_early else ""
    lines = [
        *run.notes,
        f"kept:    step {result.best_step:,} of {result.steps:,}{early}",
        f"report:  {run.folder.path / 'report.html'}",
        f"trained: {run.trained}   (editor option: trained: {run.trained})",
    ]
    return Findings([table], lines)
